"""How one serving instance spreads over GPUs, what it keeps in their memory, and how many blocks are left."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

from benthic.errors import ConfigError
from benthic.spec import kv
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.spec.hardware import Hardware
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

WeightDtype = Literal["fp8", "bf16"]

_SCALES = 4 / (128 * 128)
"""Bytes of float32 scales for a byte of FP8 weights in blocks of 128 x 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLayout:
    """Degrees of one instance.

    Attributes:
        tp_degree: GPUs that share the heads and dense columns of a token.
        dp_degree: groups of those, each with sequences and a cache of its own.
        weights: dtype of matrices that checkpoints store in FP8.
        cache: dtype of latents.
        overlap: two half batches, so that the exchange of one hides behind the products of the other.
        skew: what the busiest GPU's experts get over the mean.
        redundant_experts: further copies of busy experts, over the whole instance.
    """

    tp_degree: int = 1
    dp_degree: int = 1
    weights: WeightDtype = "bf16"
    cache: WeightDtype = "bf16"
    overlap: bool = False
    skew: float = 1.0
    redundant_experts: int = 0

    @property
    def gpus(self) -> int:
        """GPUs of the instance; its experts are spread over all of them."""
        return self.tp_degree * self.dp_degree

    @property
    def name(self) -> str:
        """`TP2 DP4 EP8`: degrees above one."""
        parts = (("TP", self.tp_degree), ("DP", self.dp_degree), ("EP", self.gpus))
        return " ".join([f"{word}{degree}" for word, degree in parts if degree > 1]) or "1 GPU"

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Everything that does not divide."""
        heads, experts = model.num_attention_heads, model.n_routed_experts + self.redundant_experts
        if heads % self.tp_degree:
            yield (
                f"num_attention_heads = {heads} does not divide over tp_degree = {self.tp_degree}. "
                f"Set it to a divisor of {heads}."
            )
        if model.n_routed_experts and experts % self.gpus:
            yield (
                f"{experts} experts do not divide over the {self.gpus} GPUs of an instance. Take GPUs that "
                f"divide {experts}, or other redundant_experts."
            )


class GpuMemory(NamedTuple):
    """Bytes of one GPU of an instance, and the cache tokens that a rank has in what is left."""

    total: float
    weights: float
    reserve: float
    token_bytes: float

    @property
    def cache(self) -> float:
        """What is left for latents."""
        return self.total - self.weights - self.reserve

    def blocks(self, block_size: int) -> int:
        """Cache blocks of one rank; below 1 the weights do not fit."""
        return int(self.cache // (self.token_bytes * block_size))


def memory_of(
    model: ModelConfig,
    layout: ServingLayout,
    hardware: Hardware,
    *,
    utilisation: float = 0.9,
    activations: float = 3.5e9,
    mtp: bool = False,
) -> GpuMemory:
    """Share one GPU's memory out. Latents are the same on every tensor-parallel rank, so each keeps them all.

    Args:
        model: whose weights.
        layout: over which GPUs.
        hardware: of which kind.
        utilisation: part of the memory that may be used.
        activations: bytes for the largest step, graphs, libraries and buffers of exchanges.
        mtp: whether the MTP module drafts.
    """
    weights = sum([_bytes(p, layout, model) for p in parameters(model, include_mtp=mtp)])
    cached = kv.mla_fp8(model) if layout.cache == "fp8" else kv.mla(model, mtp=mtp)
    return GpuMemory(utilisation * hardware.hbm_bytes, weights, activations, cached.value)


def check(model: ModelConfig, layout: ServingLayout) -> None:
    """Raises: ConfigError with everything that does not divide."""
    problems = list(layout.problems(model))
    if problems:
        raise ConfigError(" ".join(problems))


def _bytes(param: Param, layout: ServingLayout, model: ModelConfig) -> float:
    size: float = 2.0
    if layout.weights == "fp8" and param.fp8:
        size = 1.0 + _SCALES
    share = Fraction(1)
    if "expert" in param.axes:
        experts = model.n_routed_experts
        share = Fraction(experts + layout.redundant_experts, experts * layout.gpus)
    elif {"heads", "ffn", "vocab"} & set(param.axes):
        share = Fraction(1, layout.tp_degree)
    return size * float(param.numel * share)
