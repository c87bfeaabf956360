"""The sizes of one microbatch on one rank, which everything that happens to it is priced by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benthic.plan.cost.ops import Dtype
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one microbatch on one rank. `tokens` are its own, between the layers.

    `idle`: share of experts without a row, whose weights nothing reads. `cut`: the host calls a mixture in
    phases, since slots overlap those of two microbatches. `fp8_swiglu`, `e5m6_attention`: what is kept of a
    SwiGLU's input and of attention's output. `recorded`: a step is one CUDA graph.
    """

    model: ModelConfig
    rows: int
    seq_len: int
    tp: int
    cp: int
    ep: int
    gpus_per_node: int
    products: Dtype
    again: frozenset[str]
    skew: float = 1.0
    idle: float = 0.0
    kept_pairs: float | None = None
    cut: bool = False
    fp8_swiglu: bool = False
    e5m6_attention: bool = False
    recorded: bool = False

    @property
    def tokens(self) -> float:
        """Tokens of this rank between the layers."""
        return self.rows * self.seq_len / (self.tp * self.cp)

    @property
    def joined(self) -> bool:
        """Whether experts are one step with copying and summing: `benthic.model.mixture`."""
        return self.products == "fp8" and self.ep == 1

    @property
    def gathered(self) -> float:
        """Tokens whose heads and columns this rank computes: those of its tensor group."""
        return self.tokens * self.tp
