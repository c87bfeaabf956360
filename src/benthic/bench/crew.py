"""Processes that share the requests of a run: one of Python reads so many tokens a second and no more.

Helper i of n sends requests i, i + n, … of a run. All processes of a host have one clock, so each request is
due when the whole schedule says. Bounds on requests in flight are divided: one may wait for a slot of its
helper while another helper has a free one.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from benthic import collector
from benthic.bench.client import connect
from benthic.bench.load import Load, Run
from benthic.bench.samples import Delivery, Sample
from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from benthic.bench.client import Target
    from benthic.bench.load import Clock
    from benthic.bench.workload import Work

AHEAD_S = 0.1
"""From the word to begin to the first request due: so long may the word take to reach every helper."""
REPORT_S = 0.1
"""Shortest time between two reports of a helper on how many of its requests ended."""
READY = "ready"

Result = TypeVar("Result")


@contextmanager
def shared(alone: Load, target: Target, count: int) -> Iterator[Load | Crew]:
    """A load of `count` processes for the length of the block; for 1 it is `alone`, in this process.

    No helper is left without a slot: `alone.max_concurrency` bounds their number too.
    """
    if count == 1:
        yield alone
        return
    with contextlib.ExitStack() as held:
        seats = [
            Seat(name=f"{i + 1} of {count}", target=target, clock=alone.clock, max_concurrency=slots)
            for i, slots in enumerate(divided(alone.max_concurrency, count))
        ]
        yield Crew(alone, [held.enter_context(_started(seat)) for seat in seats])


def divided(bound: int | None, count: int) -> list[int | None]:
    """Slots of each of at most `count` helpers; `bound` in all, and none has 0."""
    if bound is None:
        return [None] * count
    count = min(bound, count)
    return [bound // count + (i < bound % count) for i in range(count)]


class Crew:
    """Loads a server as `alone` would, from several processes. Warm-ups come from this one."""

    def __init__(self, alone: Load, helpers: Sequence[Helper]) -> None:
        self._alone = alone
        self.helpers = tuple(helpers)

    async def open_loop(self, works: Sequence[Work], at_s: Sequence[float]) -> Run:
        """Send `works[i]` at `at_s[i]` seconds from the start. Raises: ServeError when a helper ends."""
        return await self._run(works, at_s)

    async def closed_loop(self, works: Sequence[Work]) -> Run:
        """Keep `max_concurrency` requests in flight. Raises: ServeError when a helper ends."""
        return await self._run(works, None)

    async def warm_up(self, works: Sequence[Work]) -> None:
        """Send requests whose times nobody wants. Raises: ServeError when one of them failed."""
        await self._alone.warm_up(works)

    async def _run(self, works: Sequence[Work], at_s: Sequence[float] | None) -> Run:
        count = len(self.helpers)
        for i, helper in enumerate(self.helpers):
            helper.tell(Share(works=works[i::count], at_s=None if at_s is None else at_s[i::count]))
        await _together(helper.hear() for helper in self.helpers)
        began = self._alone.clock() + AHEAD_S
        for helper in self.helpers:
            helper.tell(began)
        parts = await _together(helper.result(self._alone.on_done) for helper in self.helpers)
        return merged(parts)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a helper is started with. `clock` goes by its name, so it must be a module's own function."""

    name: str
    target: Target
    clock: Clock
    max_concurrency: int | None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a helper is to send, and when from the start (None: a closed loop)."""

    works: Sequence[Work]
    at_s: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run as it goes through a pipe: a million deliveries are slow to pickle one by one.

    Attributes:
        samples: of the run, without deliveries.
        counts: deliveries of each sample.
        at_s, tokens: of all deliveries.
        late_s, busy: as in `Run`.
    """

    samples: list[Sample]
    counts: list[int]
    at_s: array[float]
    tokens: array[int]
    late_s: array[float]
    busy: float

    @classmethod
    def of(cls, run: Run) -> Part:
        """Pack a run."""
        answers = [sample.answer for sample in run.samples]
        return cls(
            samples=[replace(each, answer=replace(each.answer, deliveries=())) for each in run.samples],
            counts=[len(answer.deliveries) for answer in answers],
            at_s=array("d", (each.at_s for answer in answers for each in answer.deliveries)),
            tokens=array("q", (each.tokens for answer in answers for each in answer.deliveries)),
            late_s=array("d", run.late_s),
            busy=run.busy,
        )

    def unpacked(self) -> Iterator[Sample]:
        """The run's samples as they were."""
        deliveries = (Delivery(at_s=at_s, tokens=n) for at_s, n in zip(self.at_s, self.tokens, strict=True))
        for sample, count in zip(self.samples, self.counts, strict=True):
            own = tuple(next(deliveries) for _ in range(count))
            yield replace(sample, answer=replace(sample.answer, deliveries=own))


def merged(parts: Sequence[Part]) -> Run:
    """One run of all helpers' parts, in the order of the schedule."""
    samples: list[Sample | None] = [None] * sum(len(part.samples) for part in parts)
    with collector.paused():
        for i, part in enumerate(parts):
            samples[i :: len(parts)] = part.unpacked()
    return Run(
        samples=tuple(each for each in samples if each is not None),
        late_s=[late for part in parts for late in part.late_s],
        busy=max(part.busy for part in parts),
    )


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A helper as the main process sees it."""

    name: str
    process: BaseProcess
    pipe: Connection

    def tell(self, what: Share | float) -> None:
        """Send. Raises: ServeError when the helper is gone."""
        try:
            self.pipe.send(what)
        except OSError as error:
            raise self._gone() from error

    async def hear(self) -> Any:
        """What it sends next. Raises: ServeError when the helper is gone."""
        try:
            return await _received(self.pipe)
        except (EOFError, OSError) as error:
            raise self._gone() from error

    async def result(self, on_done: Callable[[int], None]) -> Part:
        """Its part of the run; counts of requests that ended come before it."""
        while isinstance(told := await self.hear(), int):
            on_done(told)
        return told

    def _gone(self) -> ServeError:
        self.process.join(1.0)
        return ServeError(
            f"client process {self.name} ended with status {self.process.exitcode} before its requests did. "
            "If it said why, that is above."
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C: it is the main process's business, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _started(seat: Seat) -> Iterator[Helper]:
    """A helper for the length of the block; it holds nothing that would have to be saved."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(seat, there), name=f"benthic-client-{seat.name}")
    with _deaf():
        process.start()
    there.close()
    try:
        yield Helper(name=seat.name, process=process, pipe=here)
    finally:
        process.kill()
        process.join()
        here.close()


async def _together(jobs: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results, or the first error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _received(pipe: Connection) -> Any:
    """The next message; other tasks run until it comes."""
    loop, come, number = asyncio.get_running_loop(), asyncio.Event(), pipe.fileno()
    loop.add_reader(number, come.set)
    try:
        await come.wait()
    finally:
        loop.remove_reader(number)
        os.set_blocking(number, True)  # uvloop does not poll what blocks
    return pipe.recv()


def _main(seat: Seat, pipe: Connection) -> None:
    """Body of a helper's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also where a thread started this
    with contextlib.suppress(EOFError):  # the main process is gone
        uvloop.run(_help(seat, pipe))


async def _help(seat: Seat, pipe: Connection) -> None:
    """Run after run, until this process is ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 (`_started` starts this)
    asyncio.get_running_loop().add_reader(parent.sentinel, os._exit, 1)  # nobody wants the samples any more
    async with connect(seat.target, seat.clock) as client:
        while True:
            share: Share = await _received(pipe)
            collector.settle()
            pipe.send(READY)
            began: float = await _received(pipe)
            tally = _Tally(seat.clock, pipe)
            load = Load(
                send=client.send, clock=seat.clock, max_concurrency=seat.max_concurrency, on_done=tally.add
            )
            if share.at_s is None:
                run = await load.closed_loop(share.works)
            else:
                run = await load.open_loop(share.works, share.at_s, began=began)
            tally.report()
            pipe.send(Part.of(run))


class _Tally:
    """Tells the main process how many requests ended, now and then."""

    def __init__(self, clock: Clock, pipe: Connection) -> None:
        self._clock, self._pipe = clock, pipe
        self._count, self._told_s = 0, clock()

    def add(self, count: int) -> None:
        """So many more ended."""
        self._count += count
        if self._clock() - self._told_s >= REPORT_S:
            self.report()

    def report(self) -> None:
        """Tell."""
        self._pipe.send(self._count)
        self._count, self._told_s = 0, self._clock()
