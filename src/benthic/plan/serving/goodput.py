"""The highest rate at which enough requests meet all their targets, and the curve on the way there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.plan.serving.outcome import Outcome
    from benthic.spec.objectives import Objectives


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is to be kept, and by which share of the requests (DistServe section 2)."""

    objectives: Objectives
    attainment: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 < self.attainment <= 1.0:
            msg = f"attainment = {self.attainment} is not a share in (0, 1]"
            raise ConfigError(msg)


class Trial(NamedTuple):
    """One simulated rate: requests a second, the share that met all targets, and quantiles in seconds."""

    rate: float
    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    output_rate: float


class Goodput(NamedTuple):
    """`rate` is the highest that passed (0: none did), `failed` the lowest that did not (inf: none)."""

    rate: float
    failed: float
    trials: tuple[Trial, ...]

    @property
    def at_best(self) -> Trial | None:
        """The trial at `rate`."""
        return next((trial for trial in self.trials if trial.rate == self.rate), None)


def trial_of(rate: float, outcome: Outcome, targets: Targets) -> Trial:
    """What a run at `rate` came to."""
    return Trial(
        rate=rate,
        attainment=outcome.attainment(targets.objectives),
        ttft_p50_s=outcome.quantile("ttft_s", 0.5),
        ttft_p90_s=outcome.quantile("ttft_s", 0.9),
        tpot_p50_s=outcome.quantile("tpot_s", 0.5),
        tpot_p90_s=outcome.quantile("tpot_s", 0.9),
        output_rate=outcome.output_rate,
    )


def find_goodput(
    run: Callable[[float], Outcome],
    targets: Targets,
    *,
    start: float,
    precision: float = 0.03,
    least: float | None = None,
    most: float = math.inf,
) -> Goodput:
    """Double or halve from `start` until a passing and a failing rate are known, then halve the gap.

    Where no target bounds how long a request may wait, a rate fails at which waits grow.

    Args:
        run: simulates a rate.
        targets: what must be kept.
        start: where a search begins; the better the guess, the fewer runs.
        precision: the gap at which it ends, over its upper end.
        least: below this rate nothing is looked for; a thousandth of `start` when None.
        most: above it neither.
    Raises: ConfigError for a start that is not above 0.
    """
    if not 0.0 < start < math.inf:
        msg = f"the search begins at {start} requests/s, but a rate is finite and above 0"
        raise ConfigError(msg)
    trials: dict[float, Trial] = {}

    bounds = targets.objectives
    queues = bounds.ttft_s is None and bounds.e2e_s is None

    def passes(rate: float) -> bool:
        outcome = run(rate)
        trials[rate] = trial_of(rate, outcome, targets)
        return trials[rate].attainment >= targets.attainment and not (queues and outcome.falls_behind)

    low, high = _bracket(passes, min(start, most), start / 1000.0 if least is None else least, most)
    while low > 0.0 and high < math.inf and high - low > precision * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if passes(middle) else (low, middle)
    return Goodput(low, high, tuple(sorted(trials.values())))


def _bracket(passes: Callable[[float], bool], start: float, least: float, most: float) -> tuple[float, float]:
    """A rate that passes (0: none does) and one above that fails (inf: none up to `most`); steps widen."""
    rate, factor = start, 1.25
    if passes(rate):
        while rate < most:
            higher = min(factor * rate, most)
            if not passes(higher):
                return rate, higher
            rate, factor = higher, min(2.0, factor * 1.25)
        return rate, math.inf
    while rate > least:
        lower = max(rate / factor, least)
        if passes(lower):
            return lower, rate
        rate, factor = lower, min(2.0, factor * 1.25)
    return 0.0, rate


def curve(run: Callable[[float], Outcome], targets: Targets, rates: Sequence[float]) -> tuple[Trial, ...]:
    """One trial for each of `rates`."""
    return tuple([trial_of(rate, run(rate), targets) for rate in rates])
