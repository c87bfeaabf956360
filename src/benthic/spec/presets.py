"""Models by name: the released ones with their exact hyper-parameters, and two small ones of our own.

Released values are those of each checkpoint's `config.json`, with one exception: `initializer_range` is the
standard deviation the reports say was used for training (0.006; DeepSeek-V3 report section 4.2, DeepSeek-V2
report section 3.1.2), where the files carry an unused 0.02.
"""

from __future__ import annotations

from typing import Final

from benthic.errors import UnknownFieldError
from benthic.spec.model import ModelConfig, Yarn

DEEPSEEK_V3: Final = ModelConfig(
    name="deepseek-v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    rope_scaling=Yarn(factor=40.0),
    max_position_embeddings=163840,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
)

DEEPSEEK_V2: Final = ModelConfig(
    name="deepseek-v2",
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_group=8,
    topk_group=3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    rope_scaling=Yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
    bos_token_id=100000,
    eos_token_id=100001,
)

DEEPSEEK_V2_LITE: Final = ModelConfig(
    name="deepseek-v2-lite",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    rope_scaling=Yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
    bos_token_id=100000,
    eos_token_id=100001,
)

MOONLIGHT: Final = ModelConfig(
    name="moonlight-16b-a3b",
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    routed_scaling_factor=2.446,
    rope_theta=50000.0,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    bos_token_id=163584,
    eos_token_id=163586,
)

KIMI_K2: Final = ModelConfig(
    name="kimi-k2",
    vocab_size=163840,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=64,
    n_routed_experts=384,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    routed_scaling_factor=2.827,
    rope_theta=50000.0,
    rope_scaling=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0),
    max_position_embeddings=131072,
    initializer_range=0.02,
    bos_token_id=163584,
    eos_token_id=163585,
)

TINY: Final = ModelConfig(
    name="tiny",
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=6,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.0,
    max_position_embeddings=1024,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
)

NANO: Final = ModelConfig(
    name="nano",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.5,
    max_position_embeddings=256,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
)

ALIASES: Final[dict[str, str]] = {"deepseek-r1": "deepseek-v3"}
_PRESETS: Final[dict[str, ModelConfig]] = {
    preset.name: preset
    for preset in (DEEPSEEK_V3, DEEPSEEK_V2, DEEPSEEK_V2_LITE, MOONLIGHT, KIMI_K2, TINY, NANO)
}


def names() -> tuple[str, ...]:
    """Every name that `get` accepts, largest models first, aliases last."""
    return (*_PRESETS, *ALIASES)


def get(name: str) -> ModelConfig:
    """The model called `name` (case is ignored).

    Raises:
        UnknownFieldError: no such model; the message names the nearest one.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in _PRESETS:
        raise UnknownFieldError(kind="model", name=name, known=names())
    return _PRESETS[key]
