"""The hyper-parameters of one model, named as in Hugging Face's `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal, get_args

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]
MtpHidden = Literal["pre_norm", "post_norm"]


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

    def __post_init__(self) -> None:
        _refuse("rope_scaling", list(_mistyped(self)) or list(_yarn_rules(self)))

    @property
    def softmax_factor(self) -> float:
        """What YaRN multiplies the softmax scale by: `(0.1 * mscale_all_dim * ln(factor) + 1) ** 2`."""
        return _temperature(self.factor, self.mscale_all_dim) ** 2

    @property
    def rotary_factor(self) -> float:
        """What YaRN multiplies cos and sin by: 1 whenever `mscale == mscale_all_dim`, as in every release."""
        return _temperature(self.factor, self.mscale) / _temperature(self.factor, self.mscale_all_dim)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of the DeepSeek-V2/V3 architecture; field names are Hugging Face's.

    A layer is dense when its index is below `first_k_dense_replace`, otherwise it is a mixture of experts.
    `q_lora_rank=None` projects queries straight from the hidden state.
    `mtp_hidden` says which hidden state feeds the first MTP module: before or after the final norm.

    Raises:
        ConfigError: values contradict each other; one message names them all.
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
    mtp_hidden: MtpHidden = "pre_norm"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        _refuse(f"model {self.name!r}", list(_mistyped(self)) or list(_contradictions(self)))

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope dims followed by rope dims."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by: `qk_head_dim ** -0.5`, times the YaRN temperature if any."""
        factor = self.rope_scaling.softmax_factor if self.rope_scaling else 1.0
        return factor / math.sqrt(self.qk_head_dim)

    @property
    def latent_dim(self) -> int:
        """Elements cached per token and layer: the latent followed by the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (MTP layers count on from `num_hidden_layers`) is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


_NUMBER: Final[dict[str, tuple[type, ...]]] = {"int": (int,), "float": (int, float)}
_CHOICE: Final[dict[str, tuple[str, ...]]] = {
    "ScoringFunc": get_args(ScoringFunc),
    "TopkMethod": get_args(TopkMethod),
    "MtpHidden": get_args(MtpHidden),
}
_POSITIVE: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
)
_NOT_NEGATIVE: Final = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _refuse(what: str, wrong: list[str]) -> None:
    if wrong:
        listed = "".join(f"\n  - {line}" for line in wrong)
        message = f"{what} contradicts itself in {len(wrong)} place{'s'[: len(wrong) > 1]}:{listed}"
        raise ConfigError(message)


def _mistyped(config: Yarn | ModelConfig) -> Iterator[str]:
    """Fields whose value has another type than the annotation says; a config file may hold anything."""
    for field in fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if kind.endswith(" | None") and value is None:
            continue
        kind = kind.removesuffix(" | None")
        if kind in _NUMBER and not _is_number(value, _NUMBER[kind]):
            yield f"{field.name} = {value!r}, but it is {_article(kind)}"
        elif kind == "bool" and not isinstance(value, bool):
            yield f"{field.name} = {value!r}, but it is true or false"
        elif kind in _CHOICE and value not in _CHOICE[kind]:
            yield f"{field.name} = {value!r}, but it is one of {', '.join(_CHOICE[kind])}"
        elif kind == "Yarn" and not isinstance(value, Yarn):
            yield f"{field.name} = {value!r}, but it is a Yarn"


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a finite number"}[kind]


def _contradictions(config: ModelConfig) -> Iterator[str]:
    yield from _size_rules(config)
    yield from _router_rules(config)
    yield from _other_rules(config)


def _yarn_rules(yarn: Yarn) -> Iterator[str]:
    if yarn.factor < 1:
        yield f"factor = {yarn.factor} shortens the context; it must be at least 1"
    if yarn.original_max_position_embeddings <= 0:
        yield f"original_max_position_embeddings = {yarn.original_max_position_embeddings} must be positive"
    if yarn.mscale <= 0 or yarn.mscale_all_dim < 0:
        yield f"mscale = {yarn.mscale} must be positive, mscale_all_dim = {yarn.mscale_all_dim} not negative"
    if yarn.beta_slow <= 0 or yarn.beta_fast < yarn.beta_slow:
        yield f"beta_fast = {yarn.beta_fast} must be at least beta_slow = {yarn.beta_slow}, and both positive"


def _size_rules(config: ModelConfig) -> Iterator[str]:
    for name in _POSITIVE:
        if getattr(config, name) <= 0:
            yield f"{name} = {getattr(config, name)} must be positive"
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            yield f"{name} = {getattr(config, name)} must not be negative"
    if config.q_lora_rank is not None and config.q_lora_rank <= 0:
        yield f"q_lora_rank = {config.q_lora_rank} must be positive, or null for queries without a latent"
    if config.qk_rope_head_dim % 2:
        yield f"qk_rope_head_dim = {config.qk_rope_head_dim} is odd, but rotary dims come in pairs"
    if config.first_k_dense_replace > config.num_hidden_layers:
        yield (
            f"first_k_dense_replace = {config.first_k_dense_replace} dense layers, "
            f"but num_hidden_layers = {config.num_hidden_layers}"
        )


def _router_rules(config: ModelConfig) -> Iterator[str]:
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    if experts == 0:
        if config.n_shared_experts:
            yield f"n_shared_experts = {config.n_shared_experts}, but n_routed_experts = 0"
        return
    if config.moe_intermediate_size <= 0:
        yield f"moe_intermediate_size = {config.moe_intermediate_size}, but n_routed_experts = {experts}"
    if not 1 <= top_k <= experts:
        yield f"num_experts_per_tok = {top_k} must lie between 1 and n_routed_experts = {experts}"
    if (config.topk_method == "noaux_tc") != (config.scoring_func == "sigmoid"):
        yield (
            f"topk_method = {config.topk_method!r} with scoring_func = {config.scoring_func!r}: "
            "noaux_tc goes with sigmoid, greedy and group_limited_greedy go with softmax"
        )
    if config.n_group > 0:
        yield from _group_rules(config)


def _group_rules(config: ModelConfig) -> Iterator[str]:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    if groups > 1 and config.topk_method == "greedy":
        yield f"n_group = {groups}, but topk_method = 'greedy' knows no groups; use group_limited_greedy"
    if kept > groups:
        yield f"topk_group = {kept} groups are kept, but n_group = {groups}"
    if experts % groups:
        yield f"n_routed_experts = {experts} does not divide into n_group = {groups} groups"
        return
    size = experts // groups
    if kept * size < config.num_experts_per_tok:
        yield (
            f"topk_group = {kept} groups of {size} experts leave {kept * size} to choose from, "
            f"but num_experts_per_tok = {config.num_experts_per_tok}"
        )
    if groups > 1 and size < 2 and config.topk_method == "noaux_tc":
        yield f"n_group = {groups} leaves {size} expert a group, but noaux_tc ranks groups by their best two"


def _other_rules(config: ModelConfig) -> Iterator[str]:
    if config.rope_theta <= 1:
        yield f"rope_theta = {config.rope_theta} must be greater than 1"
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name)
        if not 0 <= token < config.vocab_size:
            yield f"{name} = {token} is no token: vocab_size = {config.vocab_size}"
