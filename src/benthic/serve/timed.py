"""An engine that also says how long each request waited for its first step, and what drafting achieved."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from benthic.sched.batching import Started
from benthic.serve.engine import Clock, Engine

if TYPE_CHECKING:
    from benthic.sched.batching import Finished, StepPlan
    from benthic.serve.build import Parts
    from benthic.serve.messages import Delta, Generate, Stats
    from benthic.serve.options import EngineOptions
    from benthic.serve.sample import Logprobs


class TimedEngine(Engine):
    """Fills `Delta.queued_s` of first deltas, and the counts of drafts in `Stats`.

    Args:
        parts: as for `Engine`.
        options: settings.
        clock: seconds since some fixed moment.
    """

    def __init__(self, parts: Parts, options: EngineOptions, *, clock: Clock = time.monotonic) -> None:
        super().__init__(parts, options, clock=clock)
        self._added_s: dict[str, float] = {}
        self._queued_s: dict[str, float] = {}

    def add(self, request: Generate) -> None:
        """As `Engine.add`; the wait begins."""
        super().add(request)
        self._added_s[request.request_id] = self._clock()

    def stats(self) -> Stats:
        """As `Engine.stats`, with drafts."""
        totals = self._scheduler.totals
        return msgspec.structs.replace(
            super().stats(), drafted=totals.drafted, accepted_drafts=totals.accepted_drafts
        )

    def _observe(self, plan: StepPlan) -> None:
        super()._observe(plan)
        for event in plan.events:
            if isinstance(event, Started) and event.request_id in self._added_s:
                self._queued_s[event.request_id] = self._clock() - self._added_s.pop(event.request_id)

    def _delta(
        self, request_id: str, tokens: list[int], end: Finished | None, logprobs: Logprobs | None
    ) -> Delta:
        queued_s = self._queued_s.pop(request_id, None)
        delta = super()._delta(request_id, tokens, end, logprobs)
        return delta if queued_s is None else msgspec.structs.replace(delta, queued_s=queued_s)

    def _forget(self, request_id: str) -> None:
        super()._forget(request_id)
        self._added_s.pop(request_id, None)
        self._queued_s.pop(request_id, None)
