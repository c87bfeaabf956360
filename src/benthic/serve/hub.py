"""The main process's end of its fronts: their requests go to the engines, deltas come back in batches.

What limits it is the cost of a token, so nobody is woken for one: a stream hands each delta to a list, and
all that the loop found before its next turn leaves as one message a front.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq
import zmq.asyncio

from benthic.errors import BenthicError, EngineDeadError, ServeError
from benthic.serve.api_errors import ApiError
from benthic.serve.fleet_routes import InstanceList
from benthic.serve.front_link import NOBODY, FrontLink, failure_of
from benthic.serve.front_messages import (
    Active,
    Answer,
    Ask,
    Cards,
    Census,
    Ended,
    Failed,
    FromFront,
    Hello,
    Join,
    Leave,
    Mark,
    Open,
    Refusal,
    Report,
    Seat,
    State,
    Stopping,
    Take,
    ToFront,
    ToHub,
    Welcome,
)
from benthic.serve.journal import Journal
from benthic.serve.messages import Abort
from benthic.serve.process import as_pipe
from benthic.serve.sums import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pydantic import BaseModel

    from benthic.serve.client import Client
    from benthic.serve.fleet_routes import Instances
    from benthic.serve.journal import PhaseName
    from benthic.serve.messages import Generate, Ready
    from benthic.serve.service import ServiceSettings
    from benthic.serve.streams import EngineStream
    from benthic.serve.whole import Alone

logger = logging.getLogger("benthic.serve.hub")

STATE_S: Final = 0.25
"""Seconds between two looks at how the engines are."""

CENSUS_S: Final = 1.0
"""How long `/metrics` waits for what each front has counted; its last report counts after that."""

LAST_WORDS: Final = 10
"""How often the pipe is looked into for the last words of a front; others go on speaking."""


class RoutedJournal(Journal):
    """The main process's journal: what a router notes of a request goes to the front that answers it."""

    tell: Callable[[str, PhaseName, str], None] | None = None

    def enter(self, request_id: str, name: PhaseName, where: str = "", *, at_s: float | None = None) -> None:
        """A phase begins."""
        if self.tell is None:
            super().enter(request_id, name, where, at_s=at_s)
        else:
            self.tell(request_id, name, where)


class Hub:
    """Speaks with the fronts of a server; belongs to one event loop.

    Args:
        client: where requests go; it is up.
        ready: what it said of the model.
        whole: what is one for all fronts; what they count is added to its metrics.
        settings: limits of the whole server.
        journal: gets every request that ended.
        started_at: seconds since 1970.
        log_level: of the fronts' processes.
    """

    def __init__(
        self,
        client: Client,
        *,
        ready: Ready,
        whole: Alone,
        settings: ServiceSettings,
        journal: RoutedJournal,
        started_at: int,
        log_level: int,
    ) -> None:
        self._client = client
        self._ready = ready
        self._whole = whole
        self._settings = settings
        self._journal = journal
        self._started_at = started_at
        self._log_level = log_level
        self._folder = Path(tempfile.mkdtemp(prefix="benthic-fronts-"))
        self._context = zmq.asyncio.Context()
        self._sending: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context)
        self._from_fronts = as_pipe(self._context.socket(zmq.PULL))
        self._from_fronts.bind(f"ipc://{self._folder}/hub")
        self._decode = msgspec.msgpack.Decoder(FromFront).decode
        self._decode_counts = msgspec.msgpack.Decoder(Counts).decode
        self._fronts: dict[int, FrontLink] = {}
        self._owners: dict[str, FrontLink] = {}
        self._gone: list[msgspec.Raw] = []
        self._num_joined = 0
        self._census = 0
        self._reported = asyncio.Event()
        self._state = self._look()
        self._answering: set[asyncio.Task[None]] = set()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]
        journal.tell = self._mark

    # --- fronts come and go

    def join(self, slot: int, slots: int) -> FrontLink:
        """A place for a front whose process is about to start."""
        number = self._num_joined
        self._num_joined += 1
        address = f"ipc://{self._folder}/{number}"
        socket = as_pipe(self._sending.socket(zmq.PUSH))
        socket.bind(address)
        seat = Seat(
            number=number, slot=slot, slots=slots, to_hub=f"ipc://{self._folder}/hub", to_front=address,
            log_level=self._log_level,
        )  # fmt: skip
        front = self._fronts[number] = FrontLink(seat, socket, lambda: self._client.in_flight)
        front.heard_s = self._journal.clock()
        return front

    async def leave(self, front: FrontLink) -> None:
        """A front's process has ended: hear its last words, abort its requests, keep what it counted."""
        for _ in range(LAST_WORDS):
            if not await self._from_fronts.poll(20):
                break
            await asyncio.sleep(0)  # `_listen` takes them
        del self._fronts[front.seat.number]
        self._gone.append(front.counts)
        self._reported.set()
        front.close()
        self._owners = {name: owner for name, owner in self._owners.items() if owner is not front}
        self._tell_others(front, Active(front=front.seat.number, entries=NOBODY))

    def silence_s(self, front: FrontLink) -> float:
        """Seconds since a front was heard."""
        return self._journal.clock() - front.heard_s

    def tell_all(self, message: ToFront) -> None:
        """Tell every front."""
        for front in self._fronts.values():
            front.post(message)

    async def wait_broken(self) -> None:
        """Wait for an error in here, and raise it: without this, nobody is answered any more."""
        await asyncio.gather(*self._tasks)

    def stop_all(self) -> None:
        """Let every front drain, or stop at once when it drains already."""
        self.tell_all(Stopping())

    async def close(self) -> None:
        """End the pipes; the fronts have ended."""
        for task in (*self._tasks, *self._answering):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._answering, return_exceptions=True)
        for front in self._fronts.values():
            front.close()
        self._from_fronts.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- what fronts say

    async def _listen(self) -> None:
        while True:
            self.take(await self._from_fronts.recv())

    def take(self, frame: bytes) -> None:
        """One frame of a front; of one that is gone nothing counts any more."""
        number, messages = self._decode(frame)
        front = self._fronts.get(number)
        if front is None:
            return
        front.heard_s = self._journal.clock()
        for message in messages:
            self._apply(front, message)

    def _apply(self, front: FrontLink, message: ToHub) -> None:
        if isinstance(message, Open):
            self._open(front, message.requests)
        elif isinstance(message, Abort):
            stream = front.streams.pop(message.request_id, None)
            if stream is not None:
                stream.abort(message.request_id)
        elif isinstance(message, Ended):
            self._journal.conclude(message.entry)
            self._tell_others(front, message)
        elif isinstance(message, Report):
            front.counts, front.census = message.counts, message.census
            self._reported.set()
            self._tell_others(front, Active(front=front.seat.number, entries=message.active))
        elif isinstance(message, Ask):
            self._start(self._answer(front, message))
        elif isinstance(message, Hello):
            ended = list(self._journal.ended)
            front.post(
                Welcome(ready=self._ready, started_at=self._started_at, ended=ended, state=self._state)
            )
        else:
            front.serving.set()

    def _tell_others(self, front: FrontLink, message: ToFront) -> None:
        for other in self._fronts.values():
            if other is not front:
                other.post(message)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    # --- requests

    def _open(self, front: FrontLink, requests: tuple[Generate, ...]) -> None:
        names = tuple([request.request_id for request in requests])
        excess = self._settings.excess(self._client.in_flight, len(requests))
        if excess is not None:
            front.post(Failed(request_ids=names, failure="overloaded", message=excess))
            return
        try:
            stream = self._client.open(requests)
        except EngineDeadError as error:
            self._fail(front, names, error)
            return
        for name in names:
            front.streams[name] = stream
            self._owners[name] = front
        self._start(self._carry(front, names, stream))

    async def _carry(self, front: FrontLink, names: tuple[str, ...], stream: EngineStream) -> None:
        """Pass the deltas of one stream on until it ends."""
        try:
            async with stream:
                await stream.relay(front.deliver)
        except BenthicError as error:
            self._fail(front, names, error)
        except Exception as error:
            self._fail(front, names, ServeError(f"the server failed ({type(error).__name__}); see its log"))
            raise
        finally:
            for name in names:
                front.streams.pop(name, None)
                self._owners.pop(name, None)

    def _fail(self, front: FrontLink, names: tuple[str, ...], error: BenthicError) -> None:
        """Say why requests end; first how the engines are, so that whoever asks next is refused at once."""
        self._share_state()
        front.post(Failed(request_ids=names, failure=failure_of(error), message=str(error)))

    def _mark(self, request_id: str, name: PhaseName, where: str) -> None:
        front = self._owners.get(request_id)
        if front is not None:
            front.post(Mark(request_id=request_id, name=name, where=where, at_s=self._journal.clock()))

    # --- the server as a whole

    async def _answer(self, front: FrontLink, ask: Ask) -> None:
        try:
            value: float | bytes | Refusal = await self._value(ask)
        except ApiError as error:
            value = Refusal(status=error.status, message=str(error), param=error.param, code=error.code)
        except Exception as error:
            words = f"the server failed ({type(error).__name__}); see its log"
            front.post(Answer(number=ask.number, value=Refusal(status=500, message=words)))
            raise
        front.post(Answer(number=ask.number, value=value))

    async def _value(self, ask: Ask) -> float | bytes:
        question = ask.question
        if isinstance(question, Take):
            return await self._whole.take(question.who)
        if isinstance(question, Cards | Join | Leave):
            return await _about(self._whole.instances, question)
        await self._take_census()
        return self._whole.metrics.render(self.counts())

    async def _take_census(self) -> None:
        """Let every front say what it has counted by now; one that is too busy has said so before."""
        self._census += 1
        number = self._census
        self.tell_all(Census(number))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CENSUS_S):
                while any(each.census < number for each in self._fronts.values() if each.serving.is_set()):
                    self._reported.clear()
                    await self._reported.wait()

    def counts(self) -> list[Counts]:
        """What each front has counted, those that are gone too."""
        known = [*self._gone, *(front.counts for front in self._fronts.values())]
        return [self._decode_counts(each) for each in known]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(STATE_S)
            self._share_state()
            for front in self._fronts.values():
                front.flush()  # what was meant for a front whose end of the pipe was not there yet

    def _share_state(self) -> None:
        """Tell every front how the engines are, if that has changed."""
        state = self._look()
        if state != self._state:
            self._state = state
            self.tell_all(state)

    def _look(self) -> State:
        instances = self._whole.instances
        shown = b"" if instances is None else _json(InstanceList(data=list(instances.seen)))
        return State(stats=self._client.stats, trouble=self._client.trouble, instances=shown)


async def _about(instances: Instances | None, question: Cards | Join | Leave) -> bytes:
    """What a fleet's routes ask for. Raises: ApiError."""
    if instances is None:
        raise ApiError(404, "one engine serves here, no instances")
    if isinstance(question, Join):
        return _json(await instances.join(question.role))
    if isinstance(question, Leave):
        return _json(await instances.leave(question.name, now=question.now))
    return _json(InstanceList(data=await instances.cards()))


def _json(body: BaseModel) -> bytes:
    return body.model_dump_json().encode()
