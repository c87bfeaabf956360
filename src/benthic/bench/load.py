"""Puts requests on the wire when they are due, and keeps an eye on its own lateness.

Open loop: requests go out on a schedule, whatever the server does (with a bound on those in flight, a request
that waits for its slot still counts from the moment it was due). Closed loop: so many in flight, the next one
when one ends. The sender is an argument: tests give one with known latencies and a clock that jumps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benthic import collector
from benthic.bench.samples import Answer, Lag, Sample
from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from benthic.bench.workload import Work

Clock = Callable[[], float]
Send = Callable[["Work"], Awaitable[Answer]]
PROBE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Run:
    """All requests of one run, in order of schedule, and the client's lateness.

    Attributes:
        samples: one a request.
        late_s: how late the event loop woke up, every `PROBE_S`.
        busy: share of one core that the client used.
    """

    samples: tuple[Sample, ...]
    late_s: Sequence[float]
    busy: float

    @property
    def lag(self) -> Lag:
        """The lateness, summarised."""
        return Lag.of(self.samples, self.late_s, self.busy)


@dataclass(kw_only=True)
class Load:
    """One way to load one server.

    Attributes:
        send: puts one request on the wire and waits for its answer.
        clock: seconds; the one that `send` stamps with.
        max_concurrency: most requests in flight, or None.
        on_done: called when requests end, with how many did.
    """

    send: Send
    clock: Clock
    max_concurrency: int | None = None
    on_done: Callable[[int], None] = field(default=lambda _: None)

    async def open_loop(
        self, works: Sequence[Work], at_s: Sequence[float], *, began: float | None = None
    ) -> Run:
        """Send `works[i]` at `at_s[i]` seconds from `began` on the clock (None: from now)."""
        slots = None if self.max_concurrency is None else asyncio.Semaphore(self.max_concurrency)
        async with _watched(self.clock) as probe:
            start = self.clock() if began is None else began
            async with asyncio.TaskGroup() as group:
                tasks = []
                for work, offset in zip(works, at_s, strict=True):
                    due = start + offset
                    wait = due - self.clock()
                    if wait > 0.0:
                        await asyncio.sleep(wait)
                    tasks.append(group.create_task(self._one(work, due, slots)))
        return probe.run([task.result() for task in tasks])

    async def closed_loop(self, works: Sequence[Work]) -> Run:
        """Keep `max_concurrency` requests in flight (all of them without a bound) until each was sent."""
        queue = iter(enumerate(works))
        samples: dict[int, Sample] = {}

        async def worker() -> None:
            for index, work in queue:
                samples[index] = await self._one(work, self.clock(), None)

        async with _watched(self.clock) as probe, asyncio.TaskGroup() as group:
            for _ in range(min(len(works), self.max_concurrency or len(works))):
                group.create_task(worker())
        return probe.run([samples[index] for index in range(len(works))])

    async def warm_up(self, works: Sequence[Work]) -> None:
        """Send requests whose times nobody wants.

        Raises:
            ServeError: one of them failed; the rest of the test would measure failures.
        """
        for sample in (await self.closed_loop(works)).samples:
            if sample.answer.error is not None:
                msg = f"a warm-up request failed: {sample.answer.error}"
                raise ServeError(msg)

    async def _one(self, work: Work, due: float, slots: asyncio.Semaphore | None) -> Sample:
        if slots is None:
            return self._sample(work, due, due, await self.send(work))
        waited = slots.locked()
        async with slots:
            ready = self.clock() if waited else due
            return self._sample(work, due, ready, await self.send(work))

    def _sample(self, work: Work, due: float, ready: float, answer: Answer) -> Sample:
        known = None if isinstance(work.prompt, str) else len(work.prompt)
        sample = Sample(origin_s=due, ready_s=ready, input_tokens=known, answer=answer)
        self.on_done(1)
        return sample


@dataclass(kw_only=True)
class _Probe:
    """Notes how late the event loop wakes a sleeper, and how busy this process is."""

    clock: Clock
    late_s: list[float] = field(default_factory=list)
    busy: float = 0.0

    async def watch(self) -> None:
        while True:
            before = self.clock()
            await asyncio.sleep(PROBE_S)
            self.late_s.append(max(0.0, self.clock() - before - PROBE_S))

    def run(self, samples: Sequence[Sample]) -> Run:
        return Run(samples=tuple(samples), late_s=self.late_s, busy=self.busy)


@asynccontextmanager
async def _watched(clock: Clock) -> AsyncIterator[_Probe]:
    """A probe for the length of a run, which Python's garbage collector does not interrupt."""
    collector.settle()
    probe = _Probe(clock=clock)
    watcher = asyncio.create_task(probe.watch())
    began, began_cpu = clock(), time.process_time()
    try:
        with collector.paused():
            yield probe
    finally:
        watcher.cancel()
        elapsed = clock() - began
        probe.busy = (time.process_time() - began_cpu) / elapsed if elapsed > 0.0 else 0.0
