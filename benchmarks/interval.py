"""How sure a ratio of two medians is: percentile bootstrap over rounds that timed both sides."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Times = Sequence[Sequence[float]]
"""Seconds by candidate and round."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of rates with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interval's width as a share of the value."""
        return (self.high - self.low) / 2 / self.value

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_of_best(ours: Times, theirs: Times, *, draws: int = 2000, seed: int = 0) -> Ratio:
    """How many times faster the best of `ours` is than the best of `theirs`, by medians over rounds.

    Every candidate was timed once in every round. Rounds are resampled whole, so that what disturbed a round
    disturbs both sides of a draw, and each draw chooses its own best candidates.
    """
    rounds = len(ours[0])
    generator = random.Random(seed)  # noqa: S311 (resampling, not secrets)
    drawn = sorted(_ratio(ours, theirs, generator.choices(range(rounds), k=rounds)) for _ in range(draws))
    low, high = drawn[int(0.025 * draws)], drawn[int(0.975 * draws) - 1]
    return Ratio(_ratio(ours, theirs, range(rounds)), low, high)


def _ratio(ours: Times, theirs: Times, rounds: Sequence[int]) -> float:
    return _best(theirs, rounds) / _best(ours, rounds)


def _best(times: Times, rounds: Sequence[int]) -> float:
    return min(statistics.median([each[i] for i in rounds]) for each in times)
