"""Recipes for clusters and for GPUs: whole configurations, with where each number is from.

What a report does and benthic does not is said in each docstring. Layouts fit the named machines; how long
they take is a question for `benthic plan`.
"""

from __future__ import annotations

from dataclasses import replace

from benthic.spec import presets
from benthic.spec.layout import Layout
from benthic.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)
from benthic.train.curve import Curve


def pretrain_100m() -> RunConfig:
    """111 M parameters, 37 M used by a token, from scratch on one GPU: 1.05 B tokens in 4,000 steps."""
    model = replace(
        presets.get("tiny"),
        name="benthic-100m",
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=8,
        n_routed_experts=32,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    return RunConfig(
        model=model,
        train=LoopConfig(
            steps=4000,
            seq_len=2048,
            local_batch_size=16,
            global_batch_size=128,
            lr=1e-3,
            schedule="cosine",
            final_lr=0.1,
            warmup_steps=200,
        ),
        loss=LossConfig(mtp_weight=Curve.constant(0.1)),
        checkpoint=CheckpointConfig(every=500),
        evaluate=EvaluateConfig(every=500, max_tokens=2**20),
    )


def finetune() -> RunConfig:
    """Fine-tuning of the checkpoint that `--init-from` names; the model here only stands in for it.

    Router biases stay as they were trained.
    """
    return RunConfig(
        model=presets.get("tiny"),
        train=LoopConfig(
            steps=500,
            local_batch_size=1,
            global_batch_size=16,
            lr=1e-5,
            schedule="cosine",
            final_lr=0.1,
            warmup_steps=20,
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),
        loss=LossConfig(mtp_weight=Curve.constant(0.1), bias_update_speed=Curve.constant(0.0)),
        checkpoint=CheckpointConfig(every=100),
        evaluate=EvaluateConfig(every=100),
    )


def moonlight_16b_2xh200() -> RunConfig:
    """Continued training of Moonlight on two H200, each with half of the experts; wants `--init-from`.

    1.05 B tokens at the learning rate where the report's second stage ends. About 101 GB a GPU before
    activations: 8.8 B parameters with bfloat16 weights and float32 gradients, their masters, and momenta in
    bfloat16.
    """
    loop = LoopConfig(
        steps=2000,
        seq_len=8192,
        local_batch_size=1,
        global_batch_size=64,
        lr=4.2e-5,
        schedule="cosine",
        final_lr=0.1,
        warmup_steps=100,
    )
    return _moonlight(loop, Layout(dp_degree=2, ep_degree=2))


def moonlight_16b_8xh100() -> RunConfig:
    """Moonlight from scratch on eight H100, each with 8 of the 64 experts: 5.2 T tokens.

    Moonlight report, section 3: 2,048 rows of 8K tokens, 4,096 after 200 B; 4.2e-4 after 2K steps, cosine to
    4.2e-5 by 5.2 T. Its last stage (up to 1e-4, to 0 over 500 B tokens of other data) is a run of its own.
    """
    loop = LoopConfig(
        steps=160_934,
        seq_len=8192,
        local_batch_size=1,
        global_batch_size=4096,
        batch_curve=Curve.parse("2048@200B,4096"),
        lr=4.2e-4,
        schedule="curve",
        lr_curve=Curve.parse("4.2e-4@33B,cosine:4.2e-5@5.167T"),
        warmup_steps=2000,
    )
    return _moonlight(loop, Layout(dp_degree=8, ep_degree=8))


def _moonlight(loop: LoopConfig, layout: Layout) -> RunConfig:
    """Muon, and a router bias whose update is centred, as the Moonlight report has them."""
    return RunConfig(
        model=presets.get("moonlight-16b-a3b"),
        train=loop,
        optimizer=OptimizerConfig(name="muon", moment_dtype="bfloat16"),
        loss=LossConfig(bias_update_speed=Curve.constant(1e-3), recentre_bias=True),
        precision=PrecisionConfig(weights="bfloat16", matmul="bfloat16"),
        checkpoint=CheckpointConfig(every=500),
        layout=layout,
        recompute=("attention", "experts"),
    )


def v2_lite_8xh100() -> RunConfig:
    """DeepSeek-V2-Lite as trained (DeepSeek-V2 report, appendix B), on eight H100.

    5.7 T tokens in batches of 4,608 rows of 4K; 4.2e-4 after 2K steps, times 0.316 at 80% and at 90%. Expert
    balance loss 0.001. The report also drops tokens at a capacity limit; here none is dropped.
    """
    model = replace(presets.get("deepseek-v2-lite"), rope_scaling=None, max_position_embeddings=4096)
    return RunConfig(
        model=model,
        train=LoopConfig(
            steps=302_000,
            seq_len=4096,
            local_batch_size=2,
            global_batch_size=4608,
            lr=4.2e-4,
            schedule="curve",
            lr_curve=Curve.parse("4.2e-4@4.56T,1.3272e-4@570B,4.193952e-5"),
            warmup_steps=2000,
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        loss=LossConfig(balance_alpha=1e-3, bias_update_speed=Curve.constant(0.0)),
        precision=PrecisionConfig(weights="bfloat16", matmul="bfloat16"),
        checkpoint=CheckpointConfig(every=1000),
        layout=Layout(dp_degree=8, ep_degree=8),
        recompute=("attention", "experts"),
    )


def deepseek_v3_2048_h800() -> RunConfig:
    """DeepSeek-V3 on 2,048 GPUs as its report trains it (sections 3.2, 3.3 and 4.2): 14.8 T tokens.

    16 pipeline ranks under DualPipe x 128 data ranks, experts over 64 ranks, ZeRO-1, no tensor parallelism.
    Learning rate, batch size, gamma and lambda follow the report by tokens seen, with these differences:
    the batch starts at 4,096 rows instead of 3,072, since DualPipe over 16 ranks needs 32 microbatches and
    128 data ranks make 3,072 rows only 24; it grows linearly (the report: "gradually"); no
    fill-in-the-middle. YaRN comes after pretraining.

    Memory, by `--dry-run`: 66.7 GiB (71.6 GB) on the fullest ranks, 43.0 of them activations; an 80 GB card
    has 79.6 GiB, which leaves 12.9 for what the dry run does not count. Norms, up-projections and SwiGLU
    outputs are recomputed and SwiGLU inputs kept in FP8 as in the report. Differently from it, expert outputs
    are recomputed too (weights multiply them after the down-projection, so backward reads them: one more
    grouped product), and the output of attention stays in bfloat16 (`precision.e5m6_attention` would free
    2.0 GiB).
    """
    model = replace(presets.get("deepseek-v3"), rope_scaling=None, max_position_embeddings=4096)
    return RunConfig(
        model=model,
        data=DataConfig(mask_documents=False, packing="stream"),
        train=LoopConfig(
            steps=241_458,
            seq_len=4096,
            local_batch_size=1,
            global_batch_size=15360,
            batch_curve=Curve.parse("4096@1M,linear:15360@469B"),
            lr=2.2e-4,
            schedule="curve",
            lr_curve=Curve.parse("2.2e-4@10T,cosine:2.2e-5@4.3T,2.2e-5@333B,7.3e-6"),
            warmup_steps=2000,
        ),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        loss=LossConfig(
            mtp_weight=Curve.parse("0.3@10T,0.1"),
            balance_alpha=1e-4,
            bias_update_speed=Curve.parse("0.001@14.3T,0"),
        ),
        precision=PrecisionConfig(weights="fp8", matmul="fp8", fp8_swiglu=True),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(pictures=False),
        layout=Layout(pp_degree=16, dp_degree=128, ep_degree=64, zero_stage=1, schedule="dualpipe"),
        recompute=("deepseek-v3",),
    )
