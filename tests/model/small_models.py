"""Small models that differ in one way each, shared by the tests of the network and its checkpoints."""

from __future__ import annotations

from dataclasses import replace

import torch

from benthic.model.initialise import initialise
from benthic.model.local import packed_sockets
from benthic.model.network import DeepSeek
from benthic.spec.model import ModelConfig, Yarn

BASE = ModelConfig(
    name="base",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.15,
    max_position_embeddings=128,
)
V2 = replace(
    BASE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1
)
V3_YARN = Yarn(factor=40.0, original_max_position_embeddings=64)
V2_YARN = replace(V3_YARN, mscale=0.707, mscale_all_dim=0.707)

VARIANTS: dict[str, ModelConfig] = {
    "q-lora, groups, interleaved": BASE,
    "direct queries, one group, half-split": replace(
        BASE, q_lora_rank=None, n_group=1, topk_group=1, rope_interleave=False
    ),
    "yarn with V3 temperature": replace(BASE, rope_scaling=V3_YARN),
    "yarn with unequal mscales": replace(BASE, rope_scaling=replace(V3_YARN, mscale_all_dim=0.5)),
    "Moonlight: epsilon 1e-5, theta 5e4, two shared experts": replace(
        BASE,
        q_lora_rank=None,
        rms_norm_eps=1e-5,
        rope_theta=5e4,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
    ),
    "no shared expert, weights not normalised": replace(BASE, n_shared_experts=0, norm_topk_prob=False),
    "odd sizes": replace(
        BASE,
        vocab_size=101,
        hidden_size=51,
        intermediate_size=37,
        moe_intermediate_size=13,
        num_attention_heads=7,
        n_routed_experts=15,
        n_group=3,
        topk_group=1,
        q_lora_rank=19,
        kv_lora_rank=11,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=9,
    ),
    "tied embeddings, all layers sparse": replace(BASE, tie_word_embeddings=True, first_k_dense_replace=0),
    "V2-Lite: softmax greedy, direct queries, V2 temperature": replace(
        V2, q_lora_rank=None, rope_scaling=V2_YARN, n_shared_experts=2
    ),
    "V2: softmax within groups, q-lora": replace(
        V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
}

LENGTHS = (5, 1, 9)


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> DeepSeek:
    """A model with nothing at a special value: norms are not 1, router biases not 0."""
    model = DeepSeek(config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("gate.bias"):
                tensor.uniform_(-0.6, 0.3, generator=generator)
    return model.to(dtype)


def packed(config: ModelConfig, lengths: tuple[int, ...] = LENGTHS, seed: int = 0):
    """Several random sequences one after another: `(tokens_T, positions_T, cu_seqlens, sockets)`."""
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sockets = packed_sockets(cu_seqlens, max(lengths), n_routed_experts=config.n_routed_experts)
    return tokens_T, positions_T, cu_seqlens, sockets


def furthest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    return float((actual - expected).abs().max() / scale)
