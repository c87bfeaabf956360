"""When to plan the next step: as late as it still begins when the one in flight ends.

With two steps in flight, a request that comes while step n runs meets n + 1 planned already and waits for
both. Planned only so long before n ends as the host needs to plan and launch, n + 1 takes it along. Nobody
knows when n ends; the shortest of the latest steps of its kind says when it may.

A wrong guess costs the device a pause and lasts for one step: a step that has ended before anybody waited
for it was planned behind too late, so what was known of its kind is forgotten, and steps behind that kind
are planned at once until it has been measured anew.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.sched.plans import StepPlan

LATEST: Final = 6
"""Steps of a kind, and launches, that are remembered."""

ENOUGH: Final = 3
"""Steps of a kind before one is waited for: the first may have compiled something."""

DECODES: Final = 8
"""Decoding sequences that make no other kind; the graphs of decode steps are padded likewise."""

PROMPT_TOKENS: Final = 128
"""Prompt tokens that make no other kind."""


class Kind(NamedTuple):
    """What decides most of a step's time; contexts change slowly enough for `LATEST` to follow."""

    decodes: int
    prompt_tokens: int

    @classmethod
    def of(cls, plan: StepPlan) -> Kind:
        """That of a plan, in sizes rounded up."""
        prompt_tokens = sum([chunk.length for chunk in plan.prefills])
        return cls(-(-len(plan.decode_ids) // DECODES), -(-prompt_tokens // PROMPT_TOKENS))


class Departed(NamedTuple):
    """A step in flight: its kind, and when its launch was over."""

    kind: Kind
    launched_s: float


class Tempo:
    """Hears of launches and landings in order and says when the next plan is due; reads no clock.

    Args:
        margin_s: how long before its last moment a plan is made, beside what the host needs for it.

    Raises:
        ConfigError: the margin is not positive: a step that ends as foretold would be overdue.
    """

    def __init__(self, margin_s: float) -> None:
        if not 0.0 < margin_s < inf:
            msg = f"margin_s = {margin_s}, but a plan has to be made more than 0 s early; 0.002 is usual"
            raise ConfigError(msg)
        self._margin_s = margin_s
        self._departed: deque[Departed] = deque()
        self._seconds: dict[Kind, deque[float]] = {}
        self._host: deque[float] = deque(maxlen=LATEST)
        self._waits_s = self._landed_s = -inf

    def launched(self, plan: StepPlan, began_s: float, now: float) -> None:
        """The host began `plan` at `began_s` and has launched it."""
        self._host.append(now - began_s)
        self._departed.append(Departed(Kind.of(plan), now))

    def waits(self, now: float) -> None:
        """The host begins to wait for the oldest step."""
        self._waits_s = now

    def landed(self, now: float) -> None:
        """The oldest step has ended."""
        kind, launched_s = self._departed.popleft()
        if now - self._waits_s < self._margin_s / 4:
            self._seconds.pop(kind, None)
        else:
            took = now - max(launched_s, self._landed_s)
            self._seconds.setdefault(kind, deque(maxlen=LATEST)).append(took)
        self._landed_s = now

    def due(self) -> float:
        """When to begin the next plan; -inf for at once, as while nothing is in flight."""
        end = self._landed_s
        for kind, launched_s in self._departed:
            seconds = self._seconds.get(kind, ())
            if len(seconds) < ENOUGH:
                return -inf
            end = max(end, launched_s) + min(seconds)
        return end - max(self._host) - self._margin_s if self._departed else -inf
