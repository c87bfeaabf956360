"""Everything that a training run can be told, as frozen values; `auto` is replaced by `train.resolve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benthic.spec.layout import Layout
from benthic.spec.model import ModelConfig  # noqa: TC001 (fields.field_types resolves it)
from benthic.train.curve import Curve

Auto = Literal["auto"]
Phase = Literal["attention", "dispatch", "experts", "combine"]
Recomputed = Literal[
    "attention",
    "dispatch",
    "experts",
    "combine",
    "norms",
    "up_projections",
    "swiglu",
    "expert_inputs",
    "expert_outputs",
    "deepseek-v3",
]
FloatType = Literal["float32", "bfloat16"]
NumberType = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which order.

    path: folder written by `benthic data build`.
    mask_documents: attention and losses stay inside one document. The DeepSeek-V3 report packs without this
        mask (section 4.1); set it to false to do the same.
    packing: "stream" lays documents end to end and cuts rows out of the stream; "whole" fills rows with whole
        documents. "auto": whole where some tokens are not to be learned (conversations), else stream.
    seed: of the shuffle of documents and rows; every epoch is shuffled anew.
    verify: compare the checksum of every shard before the first step.
    """

    path: str = ""
    mask_documents: bool = True
    packing: Literal["stream", "whole"] | Auto = "auto"
    seed: int = 0
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, how fast.

    steps: optimizer steps in the whole run.
    seq_len: tokens of one row.
    local_batch_size: rows of one microbatch.
    global_batch_size: rows of one optimizer step, over all microbatches and ranks.
    batch_curve: rows of a step by tokens seen, instead; rounded down to what schedule and ranks can divide.
    lr: the highest learning rate; `schedule` "constant" stays there, "cosine" falls to `final_lr` x lr at
        the last step, "curve" takes `lr_curve` instead.
    warmup_steps: the learning rate climbs linearly from 0 over so many steps, whatever the schedule.
    max_norm: gradients are scaled down to this global norm; 0 leaves them alone.
    seed: of the initial weights.
    threads: CPU threads of one process ("auto": torch's choice, and one beside a GPU); part of what makes a
        run repeatable.
    cuda_graph: launch all of a step before its update as one CUDA graph, from the third step of a size on,
        so that no step waits for its host. "auto": where that is possible.
    timeout_s: a collective that takes longer ends the run.
    stuck_s: a step (evaluation, save) that takes longer ends the run, after every rank has written what it
        is in the middle of to `RUN/logs/stuck-rank-N.txt`; must be below `timeout_s` to come first. 0: never.
    spike_factor: a step whose loss exceeds so many times the median of the last `spike_window` losses leaves
        parameters, optimizer and router biases alone; 0: every step counts.
    spike_window: see there; nothing is skipped until half of so many losses are known.
    """

    steps: int
    seq_len: int | Auto = "auto"
    local_batch_size: int | Auto = "auto"
    global_batch_size: int | Auto = "auto"
    batch_curve: Curve | None = None
    lr: float = 3e-4
    schedule: Literal["constant", "cosine", "curve"] = "cosine"
    final_lr: float = 0.1
    lr_curve: Curve | None = None
    warmup_steps: int = 0
    max_norm: float = 1.0
    seed: int = 0
    threads: int | Auto = "auto"
    cuda_graph: bool | Auto = "auto"
    timeout_s: float = 600.0
    stuck_s: float = 0.0
    spike_factor: float = 0.0
    spike_window: int = 64


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the settings of the DeepSeek-V3 report, section 4.2; decay touches matrices only.

    name: "muon" takes Muon for the network's matrices and AdamW for embedding, head, norms and routers
        (`train.muon`); one learning rate serves both.
    moment_dtype: bfloat16 halves the optimizer's memory, as the report does (section 3.3.3).
    store_param_remainders: keep the float32 master of a bfloat16 weight as the weight and 16 more bits, which
        saves 2 bytes a parameter. No bit of a master is lost; a weight whose master lies exactly between two,
        one in 2^16, is rounded away from zero instead of to the even one.
    momentum: of Muon.
    newton_schulz_dtype: precision of Muon's orthogonalisation; bfloat16 as in the Moonlight report.
    """

    name: Literal["adamw", "muon"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moment_dtype: FloatType = "float32"
    store_param_remainders: bool = False
    momentum: float = 0.95
    newton_schulz_dtype: FloatType = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside the main one, and the loss-free balancing.

    mtp_weight: λ of DeepSeek-V3 report eq. (25), by tokens seen.
    mtp_normaliser: "tokens" divides each depth's sum by the number of main targets, as eq. (24) does;
        "targets" by the number of that depth's own targets, as Megatron-Core does.
    balance_alpha: α of the sequence-wise balance loss, eq. (17).
    bias_update_speed: γ of the loss-free balancing, section 2.1.2; 0 leaves the bias as it is.
    recentre_bias: subtract the mean of the update (Moonlight).
    """

    mtp_weight: Curve = field(default_factory=lambda: Curve.constant(0.3))
    mtp_normaliser: Literal["tokens", "targets"] = "tokens"
    balance_alpha: float = 1e-4
    bias_update_speed: Curve = field(default_factory=lambda: Curve.constant(1e-3))
    recentre_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What the numbers are kept in.

    weights: "float32" keeps one copy; "bfloat16" runs on bfloat16 weights beside float32 masters and float32
        gradients; "fp8" keeps the float32 masters of linear layers, from which an FP8 copy for the products
        is made once a step, and all others as "bfloat16" does (DeepSeek-V3 report, section 3.3.3).
    matmul: precision of the products of linear layers; weights are cast or quantised on the way in. With
        "fp8" the layers that the report keeps wide (section 3.3.1) multiply in bfloat16.
    power_of_two_scales: round the FP8 scales of activations and gradients up to powers of two.
    fp8_swiglu: keep the input of every SwiGLU for backward as FP8 with 1 x 128 scales, and compute its output
        again from that (report section 3.3.3).
    e5m6_attention: keep the output of attention for backward in the 12 bits of E5M6, for the gradients of
        attention and of the projection after it (report section 3.3.3).
    """

    weights: NumberType | Auto = "auto"
    matmul: NumberType | Auto = "auto"
    power_of_two_scales: bool = False
    fp8_swiglu: bool = False
    e5m6_attention: bool = False


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How tokens reach experts that other ranks hold.

    kind: "all_to_all" is the process group's collective, which runs anywhere; "nvlink" is our kernels writing
        the memory of the other GPUs of one host; "local" is one rank with all experts. "auto": the fastest
        that can run between the ranks of `layout.ep_degree`.
    fp8: tokens travel to their experts as E4M3 with one scale for 128 elements, and so does the gradient of
        what the experts return; what comes home stays wide (DeepSeek-V3 report, section 3.3.3). "auto": with
        products in FP8.
    """

    kind: Literal["local", "all_to_all", "nvlink"] | Auto = "auto"
    fp8: bool | Auto = "auto"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how many to keep, and whether to export at the end.

    every: optimizer steps between checkpoints; the last step is always saved. 0 saves the last one only.
    keep_latest_k: older ones are deleted after a new one is safely written; 0 keeps all.
    async_save: copy to host memory and write from there while training goes on; a failure ends the run at
        the next save. The last save waits. "auto": on a GPU.
    export: write the finished model, with its tokenizer, as Hugging Face files to `RUN/hf`.
    export_dtype: precision of the exported weights.
    """

    every: int = 100
    keep_latest_k: int = 2
    async_save: bool | Auto = "auto"
    export: bool = True
    export_dtype: FloatType = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on the held-out documents.

    every: optimizer steps between evaluations; 0 evaluates after the last step only.
    max_tokens: whole documents are taken until this many tokens; 0 takes all.
    """

    every: int = 0
    max_tokens: int = 65536


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training.

    every: optimizer steps between console lines.
    load_every: optimizer steps between records of how many tokens each expert got.
    tensorboard: write event files to `RUN/tensorboard`.
    timeline_every: optimizer steps between records of when each pipeline slot ran, in `RUN/spans.jsonl`,
        which is drawn at the end; 0: none.
    wandb: project of Weights & Biases that gets the same numbers as TensorBoard; empty: none.
    pictures: draw the loss curve and the expert loads at the end.
    sample_tokens: tokens of sample text at the end; 0 writes none.
    sample_prompt: how the sample starts.
    """

    every: int = 10
    load_every: int = 10
    tensorboard: bool = True
    timeline_every: int = 0
    wandb: str = ""
    pictures: bool = True
    sample_tokens: int = 0
    sample_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, from tokens to checkpoint.

    device: "auto" takes a CUDA GPU where there is one.
    layout: how the ranks divide the work; one rank by default.
    recompute: what is computed again in the backward pass instead of kept: whole phases of each block, or
        pieces (`train.recompute`): "norms", "up_projections" (with what else stands between the latents and
        attention), "swiglu" outputs, "expert_outputs" (the rows that combine weighs), for which
        "deepseek-v3" stands, and "expert_inputs" (a token's copies, from its one row). No number changes.
    offload: phases of each block whose kept activations wait for the backward pass in host memory.
    init_from: folder of a Hugging Face checkpoint whose weights the run starts from; empty starts from random
        ones.
    init_mtp: "checkpoint" takes its MTP layers too, which it must have if the model does; "fresh" begins with
        random ones.
    """

    model: ModelConfig
    train: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    layout: Layout = field(default_factory=Layout)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recompute: tuple[Recomputed, ...] = ()
    offload: tuple[Phase, ...] = ()
    init_from: str = ""
    init_mtp: Literal["checkpoint", "fresh"] = "checkpoint"
