"""What to send and when, for every rate of a sweep; and the points that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from benthic.bench.samples import Measures, measure
from benthic.bench.search import Trial
from benthic.errors import ConfigError
from benthic.spec.arrivals import arrival_times
from benthic.spec.traces import Trace, at_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.bench.load import Run
    from benthic.bench.workload import Source, Work
    from benthic.spec.objectives import Objectives


class Loads(Protocol):
    """What puts a run's requests on the wire: one process (`load.Load`) or several (`crew.Crew`)."""

    async def open_loop(self, works: Sequence[Work], at_s: Sequence[float]) -> Run:
        """Send `works[i]` at `at_s[i]` seconds from the start."""

    async def closed_loop(self, works: Sequence[Work]) -> Run:
        """Send the next one when one ends."""

    async def warm_up(self, works: Sequence[Work]) -> None:
        """Send requests whose times nobody wants."""


RECORDED = None
"""The rate of a trace that is replayed as it was recorded."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A workload that can be offered at any rate.

    Attributes:
        source: of prompts.
        count: requests of a run; a trace is cut to its first `count`.
        trace: gives the arrival times; None draws them.
        min_duration_s: a run at rate r has at least r x this many requests, so that queues can build up.
        burstiness: of drawn arrivals.
        seed: of drawn arrivals.
    """

    source: Source
    count: int
    trace: Trace | None = None
    min_duration_s: float = 0.0
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            msg = f"a run has {self.count} requests, but at least 1 is needed"
            raise ConfigError(msg)
        if self.trace is not None and self.count > len(self.trace):
            msg = f"{self.count} requests are asked, but the trace holds {len(self.trace)} that fit"
            raise ConfigError(msg)
        if self.trace is not None and self.min_duration_s > 0.0:
            msg = f"min_duration = {self.min_duration_s:g} s cannot lengthen a trace. Leave it out."
            raise ConfigError(msg)

    def works(self, rate: float | None, run: int) -> Sequence[Work]:
        """The requests of one run."""
        longer = 0 if rate is None or math.isinf(rate) else math.ceil(rate * self.min_duration_s)
        return self.source.works(max(self.count, longer), run)

    def times(self, rate: float | None, count: int) -> tuple[float, ...]:
        """Seconds at which they are due."""
        if self.trace is None:
            assert rate is not None  # noqa: S101 (`RECORDED` needs a trace; the caller checks)
            return arrival_times(count, rate=rate, burstiness=self.burstiness, seed=self.seed)
        trace = self.trace[:count]
        return tuple(each.at_s for each in (trace if rate is RECORDED else at_rate(trace, rate)))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. `rate` was asked (None: a trace as recorded); `offered` is what its schedule came to.

    `offered` is None for a closed loop, which has no schedule. `spoiled` says why the client may have set the
    numbers.
    """

    rate: float | None
    offered: float | None
    measures: Measures
    run: Run
    spoiled: str | None

    @property
    def trial(self) -> Trial:
        """What a search needs to know."""
        return Trial(attainment=self.measures.attainment or 0.0, spoiled=self.spoiled)


@dataclass(kw_only=True)
class Sweep:
    """Runs a scenario at one rate after another; every run has prompts of its own."""

    scenario: Scenario
    load: Loads
    objectives: Objectives | None
    percentiles: tuple[float, ...]
    max_lag_s: float
    on_start: Callable[[float | None, int], None]
    on_point: Callable[[Point], None]
    runs: int = 0

    async def warm_up(self, count: int) -> None:
        """Send `count` requests first, one after another if the load has no bound of its own."""
        if count:
            await self.load.warm_up(self.scenario.source.works(count, self._next()))

    async def at(self, rate: float | None) -> Point:
        """One run. An infinite rate is a closed loop: so many requests in flight as the load allows."""
        works = self.scenario.works(rate, self._next())
        self.on_start(rate, len(works))
        offered = None
        if rate is not RECORDED and math.isinf(rate):
            run = await self.load.closed_loop(works)
        else:
            times = self.scenario.times(rate, len(works))
            offered = len(times) / times[-1] if times[-1] > 0.0 else None
            run = await self.load.open_loop(works, times)
        measures = measure(run.samples, self.objectives, percentiles=self.percentiles, lag=run.lag)
        point = Point(
            rate=rate,
            offered=offered,
            measures=measures,
            run=run,
            spoiled=run.lag.limited(self.max_lag_s),
        )
        self.on_point(point)
        return point

    def _next(self) -> int:
        self.runs += 1
        return self.runs
