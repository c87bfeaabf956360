"""How sure a number is: a ratio of medians by bootstrap over rounds, a mean over seeds by Student's t."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Times = Sequence[Sequence[float]]
"""Seconds by candidate and round."""

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t for the mean of so many values."""


def mean_over_seeds(values: Sequence[float], digits: int) -> dict[str, float | list[float] | None]:
    """Mean of one value a seed and its 95 % interval, rounded; one seed says nothing of how sure it is."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": round(mean, digits), "interval_95": None}
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {
        "mean": round(mean, digits),
        "interval_95": [round(mean - half, digits), round(mean + half, digits)],
    }


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
