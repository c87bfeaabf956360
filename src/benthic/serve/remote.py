"""A front's end of the main process: to the app it is the engine, and whatever else is one for all fronts."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Final

import msgspec
import zmq
import zmq.asyncio

from benthic.errors import EngineDeadError, ServerClosingError
from benthic.serve.api_errors import ApiError
from benthic.serve.fleet_routes import InstanceCard, InstanceList
from benthic.serve.front_messages import (
    FAILURES,
    Active,
    Answer,
    Ask,
    Cards,
    Census,
    Ended,
    Failed,
    FromHub,
    Hello,
    Join,
    Leave,
    Mark,
    Open,
    Question,
    Refusal,
    Report,
    Scrape,
    Seat,
    State,
    Take,
    ToFront,
    ToHub,
    Welcome,
)
from benthic.serve.journal import Entry, Journal
from benthic.serve.messages import Abort, Delta, Generate, Ready, Stats
from benthic.serve.process import as_pipe
from benthic.serve.streams import EngineStream, Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.sched.routing import Role
    from benthic.serve.metrics import Metrics
    from benthic.serve.sums import Counts

logger = logging.getLogger("benthic.serve.front")

REPORT_S: Final = 0.5
"""Seconds between two reports of what a front has counted and has in flight."""


class FrontJournal(Journal):
    """A front's requests, and what the other fronts say of theirs."""

    others: dict[int, list[Entry]]

    def __init__(self, clock: Callable[[], float], *, slot: int, slots: int) -> None:
        super().__init__(clock, slot=slot, slots=slots)
        self.others = {}

    @property
    def own(self) -> tuple[Entry, ...]:
        """Requests in flight here."""
        return super().active

    @property
    def active(self) -> tuple[Entry, ...]:
        """Requests in flight anywhere, in order of arrival."""
        everywhere = itertools.chain(self.own, *self.others.values())
        return tuple(sorted(everywhere, key=lambda entry: entry.arrival_s))


class RemoteClient:
    """Talks to the main process; belongs to one event loop.

    Args:
        seat: this front's place.
        journal: of this front.
        stop: called when the main process wants this one to drain, and again when at once.
    """

    def __init__(self, seat: Seat, journal: FrontJournal, stop: Callable[[], None]) -> None:
        self._seat = seat
        self._journal = journal
        self._stop = stop
        self._context = zmq.asyncio.Context()
        sending: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context)
        self._to_hub = as_pipe(sending.socket(zmq.PUSH))
        self._from_hub = as_pipe(self._context.socket(zmq.PULL))
        self._to_hub.connect(seat.to_hub)
        self._from_hub.connect(seat.to_front)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromHub).decode
        self._decode_entries = msgspec.msgpack.Decoder(list[Entry]).decode
        self._outbox: list[ToHub] = []
        self._streams = Streams()
        self._others = 0
        self._census = 0
        self.counts: Callable[[], Counts] = list
        self._state = State(stats=None, trouble="the front is starting", instances=b"")
        self._death: str | None = None
        self._questions: dict[int, asyncio.Future[float | bytes]] = {}
        self._num_questions = 0
        self._loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self._listener = asyncio.create_task(self._listen())
        self._listener.add_done_callback(self._stop_if_broken)
        journal.on_end(lambda entry: self.post(Ended(entry=entry)))
        self.post(Hello())

    # --- what the app uses

    @property
    def stats(self) -> Stats | None:
        """The engines' latest report; None before the first."""
        return self._state.stats

    @property
    def in_flight(self) -> int:
        """Requests of all fronts that have neither finished nor been aborted."""
        return len(self._streams) + self._others

    @property
    def trouble(self) -> str | None:
        """Why requests cannot be served now; None when all is well."""
        return self._death or self._state.trouble

    async def welcome(self) -> Welcome:
        """Wait for the main process's first words."""
        return await asyncio.shield(self._welcome)

    async def wait_ready(self) -> Ready:
        """What the engines said of the model. Raises: EngineDeadError."""
        return (await self.welcome()).ready

    def open(self, requests: Sequence[Generate]) -> EngineStream:
        """Submit requests that belong together; their deltas come on one stream. Raises: EngineDeadError."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        stream = EngineStream(self, [request.request_id for request in requests])
        self._streams.update(dict.fromkeys([request.request_id for request in requests], stream))
        self.post(Open(requests=tuple(requests)))
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request; an id that is not in flight is ignored."""
        if self._streams.pop(request_id, None) is not None:
            self.post(Abort(request_id=request_id))

    async def close(self) -> None:
        """Fail what is in flight here; the engines go on for other fronts."""
        for request_id in self._streams:
            self.post(Abort(request_id=request_id))
        self.die("the server is shutting down", ServerClosingError)

    # --- beside that

    def post(self, message: ToHub) -> None:
        """Tell the main process at the loop's next turn."""
        if not self._outbox:
            self._loop.call_soon(self.flush)
        self._outbox.append(message)

    def flush(self) -> None:
        """Send what there is; the queue has no limit."""
        if self._outbox and not self._to_hub.closed:
            self._to_hub.send(self._encode((self._seat.number, self._outbox)))
            self._outbox.clear()

    async def ask(self, question: Question) -> float | bytes:
        """The answer of the main process. Raises: ApiError, EngineDeadError."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        self._num_questions += 1
        number = self._num_questions
        answer = self._questions[number] = self._loop.create_future()
        self.post(Ask(number=number, question=question))
        try:
            return await answer
        finally:
            del self._questions[number]

    def report(self) -> None:
        """Say what was counted here and what is in flight."""
        counts = msgspec.Raw(self._encode(self.counts()))
        active = msgspec.Raw(self._encode(self._journal.own))
        self.post(Report(census=self._census, counts=counts, active=active))

    def die(self, cause: str, kind: type[EngineDeadError] = EngineDeadError) -> None:
        """Fail everything in flight, once."""
        if self._death is not None:
            return
        self._death = cause
        error = kind(cause)
        self._streams.fail(error)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(error)

    async def leave(self) -> None:
        """Say the last words and end the pipes."""
        self.flush()
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        self._from_hub.close(linger=0)
        self._to_hub.close()
        await asyncio.to_thread(self._context.term)

    # --- what the main process says

    async def _listen(self) -> None:
        while True:
            self.take(await self._from_hub.recv())

    def _stop_if_broken(self, listener: asyncio.Task[None]) -> None:
        """After an error in here nobody would be answered: end at once, and be started again."""
        error = None if listener.cancelled() else listener.exception()
        if error is not None:
            logger.error("the front cannot go on", exc_info=error)
            self.die(f"the front failed ({type(error).__name__}); see its log")
            self._stop()
            self._stop()

    def take(self, frame: bytes) -> None:
        """One frame of the main process."""
        self._others, messages = self._decode(frame)
        for message in messages:
            if isinstance(message, Delta):
                self._streams.deliver(message)
            else:
                self._apply(message)

    def _apply(self, message: ToFront) -> None:
        if isinstance(message, State):
            self._state = message
        elif isinstance(message, Failed):
            self._fail(message)
        elif isinstance(message, Mark):
            self._journal.enter(message.request_id, message.name, message.where, at_s=message.at_s)
        elif isinstance(message, Active):
            self._journal.others[message.front] = self._decode_entries(message.entries)
        elif isinstance(message, Ended):
            self._journal.show(message.entry)
        elif isinstance(message, Answer):
            self._answer(message)
        elif isinstance(message, Census):
            self._census = message.number
            self.report()
        elif isinstance(message, Welcome):
            self._state = message.state
            for entry in message.ended:
                self._journal.show(entry)
            self._welcome.set_result(message)
        else:
            self._stop()

    def _fail(self, failed: Failed) -> None:
        error = FAILURES[failed.failure](failed.message)
        found = {self._streams.pop(name) for name in failed.request_ids if name in self._streams}
        for stream in found:
            stream.fail(error)

    def _answer(self, answer: Answer) -> None:
        question = self._questions.get(answer.number)
        if question is None or question.done():  # whoever asked has left
            return
        value = answer.value
        if isinstance(value, Refusal):
            question.set_exception(ApiError(value.status, value.message, param=value.param, code=value.code))
        else:
            question.set_result(value)

    @property
    def instances(self) -> bytes:
        """JSON of the instances as they were a moment ago; empty without a fleet."""
        return self._state.instances


class RemoteWhole:
    """The whole server, as the main process knows it.

    Args:
        client: the pipe to it.
        metrics: of this front.
    """

    def __init__(self, client: RemoteClient, metrics: Metrics) -> None:
        self._client = client
        self.metrics = metrics
        client.counts = metrics.counts
        self.instances = RemoteInstances(client) if client.instances else None

    async def exposition(self) -> bytes:
        """What `/metrics` says."""
        return _bytes(await self._client.ask(Scrape()))

    async def take(self, who: str) -> float:
        """Use one of a key's requests; 0, or the seconds until it has one."""
        seconds = await self._client.ask(Take(who=who))
        return 0.0 if isinstance(seconds, bytes) else seconds

    async def run(self) -> None:
        """Report what is counted here, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._client.report()


class RemoteInstances:
    """The instances behind the main process."""

    def __init__(self, client: RemoteClient) -> None:
        self._client = client

    @property
    def seen(self) -> list[InstanceCard]:
        """How they were a moment ago."""
        return InstanceList.model_validate_json(self._client.instances).data

    async def cards(self) -> list[InstanceCard]:
        """How they are."""
        return InstanceList.model_validate_json(_bytes(await self._client.ask(Cards()))).data

    async def join(self, role: Role) -> InstanceCard:
        """Start one more. Raises: ApiError."""
        return InstanceCard.model_validate_json(_bytes(await self._client.ask(Join(role=role))))

    async def leave(self, name: str, *, now: bool) -> InstanceCard:
        """Give one nothing new and end it when it is done, or `now`. Raises: ApiError."""
        return InstanceCard.model_validate_json(_bytes(await self._client.ask(Leave(name=name, now=now))))


def _bytes(value: float | bytes) -> bytes:
    assert isinstance(value, bytes)  # noqa: S101 (both ends are here: only `Take` is answered by a number)
    return value
