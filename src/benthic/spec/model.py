"""The hyper-parameters of one model, named as in Hugging Face's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the rotary dims (DeepSeek-V3 report section 4.3).

    `factor` is the extension s; `mscale_all_dim` sets the softmax temperature
    `(0.1 * mscale_all_dim * ln(factor) + 1) ** 2`.
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of the DeepSeek-V2/V3 architecture; field names are Hugging Face's.

    A layer is dense when its index is below `first_k_dense_replace`, otherwise it is a mixture of experts.
    `q_lora_rank=None` projects queries straight from the hidden state.
    `mtp_hidden` says which hidden state feeds the first MTP module: before or after the final norm.
    """

    name: str = "custom"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_group: int = 1
    topk_group: int = 1
    scoring_func: ScoringFunc = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    mtp_hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    bos_token_id: int = 0
    eos_token_id: int = 1

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope dims followed by rope dims."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements cached per token and layer: the latent followed by the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (MTP layers count on from `num_hidden_layers`) is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace
