"""Which rank is slower than the others, time and again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_SLOW: Final = 1.2
_REPORTS: Final = 3


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of one report, and its time in medians of all ranks."""

    rank: int
    over_median: float


@dataclass
class Stragglers:
    """Watches reports of the same work's seconds by rank.

    A rank is told of when it was more than 20% slower than the median in three reports one after the other,
    and again every three reports while it stays so.
    """

    _slow: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: Sequence[float]) -> tuple[Slowest, list[str]]:
        """Take one report; who was slowest, and a line for every rank to tell of."""
        middle = median(seconds)
        ratios = {rank: took / middle if middle > 0 else 1.0 for rank, took in enumerate(seconds)}
        self._slow = Counter({rank: self._slow[rank] + 1 for rank, r in ratios.items() if r > _SLOW})
        rank = max(ratios, key=lambda each: (ratios[each], -each))
        told = [each for each, reports in sorted(self._slow.items()) if reports % _REPORTS == 0]
        return Slowest(rank, ratios[rank]), [self._line(each, ratios[each]) for each in told]

    def _line(self, rank: int, ratio: float) -> str:
        return (
            f"rank {rank} takes {100 * (ratio - 1):.0f}% longer for attention than the median rank, in "
            f"{self._slow[rank]} reports now: look at its clocks, temperature and neighbours"
        )
