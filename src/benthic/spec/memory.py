"""Bytes that training keeps for every parameter, term by term, and how ZeRO-1 divides them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benthic.errors import ConfigError
from benthic.spec.figure import Figure


@dataclass(frozen=True)
class Term:
    """One array with an element per parameter. `sharded`: whether ZeRO-1 divides it among data ranks."""

    name: str
    dtype: str
    bytes: int
    sharded: bool


@dataclass(frozen=True)
class Recipe:
    """What one training precision keeps per parameter."""

    name: str
    terms: tuple[Term, ...]
    source: str

    @property
    def bytes(self) -> int:
        """Bytes per parameter, all terms."""
        return sum(term.bytes for term in self.terms)

    def on_each_rank(self, ranks: int = 1) -> Figure:
        """Bytes per parameter on one of `ranks` data-parallel ranks under ZeRO-1.

        Master weights and moments are divided; gradients and running weights are not.
        """
        if ranks < 1:
            message = f"ranks = {ranks}, but ZeRO-1 needs at least one data-parallel rank"
            raise ConfigError(message)
        whole = sum(t.bytes for t in self.terms if not t.sharded)
        divided = self.bytes - whole
        return Figure(
            whole + divided / ranks, "B/parameter", f"{whole} + {divided}/{ranks} (ZeRO-1)", self.source
        )

    def total(self, parameters: int) -> Figure:
        """Bytes for a model of `parameters`, all ranks of one replica together, nothing stored twice."""
        rule = " + ".join(str(t.bytes) for t in self.terms)
        return Figure(self.bytes * parameters, "B", f"({rule}) N = {self.bytes} N", self.source)


MIXED_16: Final = Recipe(
    "BF16 mixed",
    (
        Term("running weight", "bf16", 2, sharded=False),
        Term("gradient", "bf16", 2, sharded=False),
        Term("master weight", "fp32", 4, sharded=True),
        Term("first moment", "fp32", 4, sharded=True),
        Term("second moment", "fp32", 4, sharded=True),
    ),
    "ZeRO (2020), section 3.1",
)
FP8_V3: Final = Recipe(
    "FP8, DeepSeek-V3",
    (
        Term("running weight", "fp8", 1, sharded=False),
        Term("gradient", "fp32", 4, sharded=False),
        Term("master weight", "fp32", 4, sharded=True),
        Term("first moment", "bf16", 2, sharded=True),
        Term("second moment", "bf16", 2, sharded=True),
    ),
    "DeepSeek-V3 report section 3.3.3",
)
FP8_BF16_GRADIENTS: Final = Recipe(
    "FP8, BF16 grads",
    (
        Term("running weight", "fp8", 1, sharded=False),
        Term("gradient", "bf16", 2, sharded=False),
        Term("master weight", "fp32", 4, sharded=True),
        Term("first moment", "bf16", 2, sharded=True),
        Term("second moment", "bf16", 2, sharded=True),
    ),
    "lecture notes that print 4 + 2 + 1 + 2 + 2 and call it 13; it is 11",
)
RECIPES: Final = (MIXED_16, FP8_V3, FP8_BF16_GRADIENTS)
