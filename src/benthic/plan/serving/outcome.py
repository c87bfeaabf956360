"""What became of every request of a simulated run, and what that makes of the deployment."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from benthic.spec.objectives import Latencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.sched.plans import Totals
    from benthic.spec.objectives import Objectives

Measure = Literal["ttft_s", "tpot_s", "e2e_s"]


class Served(NamedTuple):
    """One request: when it came, what it asked, and its times in seconds.

    `tpot_s` is the mean gap behind the first token, None for one token. `prefill` and `decode` name lanes.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float | None
    e2e_s: float
    cached_tokens: int
    preemptions: int
    prefill: str
    decode: str

    def meets(self, objectives: Objectives) -> bool:
        """Whether every bound holds."""
        return objectives.met(Latencies(ttft_s=self.ttft_s, tpot_s=self.tpot_s, e2e_s=self.e2e_s))


class GroupUse(NamedTuple):
    """What one instance did: steps, seconds that its device was busy, the counters of its schedulers."""

    name: str
    steps: int
    busy_s: float
    totals: tuple[Totals, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run.

    Attributes:
        served: the requests that ended, in order of arrival.
        refused: requests that no instance could ever hold.
        end_s: when the last one ended.
        groups: what each instance did.
        transferred_blocks: blocks that were pulled.
        front_busy_s: seconds that each front was busy.
    """

    served: tuple[Served, ...]
    refused: int
    end_s: float
    groups: tuple[GroupUse, ...]
    transferred_blocks: int = 0
    front_busy_s: tuple[float, ...] = ()

    @property
    def output_rate(self) -> float:
        """Output tokens a second from the first arrival that counts to the end, the drain included."""
        began = self.served[0].at_s if self.served else 0.0
        return sum([each.output_tokens for each in self.served]) / max(self.end_s - began, 1e-9)

    def without_first(self, count: int) -> Outcome:
        """The run without its first `count` requests, which found an empty deployment."""
        return replace(self, served=self.served[count:])

    @property
    def falls_behind(self) -> bool:
        """Whether the last third of the requests waited twice as long for a first token as the first third.

        Medians: a queue that grows all the time makes five times of it, one that only varies seldom two.
        """
        third = len(self.served) // 3
        early, late = (
            quantile([each.ttft_s for each in part], 0.5)
            for part in (self.served[:third], self.served[len(self.served) - third :])
        )
        return third > 0 and late > 2.0 * early

    @property
    def steps(self) -> int:
        """Steps of all instances."""
        return sum([group.steps for group in self.groups])

    def attainment(self, objectives: Objectives) -> float:
        """Share of requests that met every bound together (DistServe section 2); refused ones did not."""
        met = sum([each.meets(objectives) for each in self.served])
        return met / max(1, len(self.served) + self.refused)

    def quantile(self, measure: Measure, share: float) -> float:
        """The `share` quantile of a time, as `numpy.quantile` interpolates; nan when no request has it."""
        values = [getattr(each, measure) for each in self.served]
        return quantile([value for value in values if value is not None], share)

    def mean(self, measure: Measure) -> float:
        """The mean of a time; nan when no request has it."""
        values = [value for each in self.served if (value := getattr(each, measure)) is not None]
        return math.fsum(values) / len(values) if values else math.nan


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
