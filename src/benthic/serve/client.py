"""The HTTP process's end of the engine: submit, stream, abort, and know whether it is alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq
import zmq.asyncio

from benthic.errors import AdmissionError, EngineDeadError, OverloadedError, ServerClosingError
from benthic.serve.messages import Abort, Delta, Drain, Fatal, Generate, Ready, Rejected, Stats
from benthic.serve.process import Pipes, Reply, Request, as_pipe, start_engine, watch_end
from benthic.serve.streams import Aborter, EngineStream, Streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from benthic.serve.process import EngineFactory, Place

logger = logging.getLogger("benthic.serve.client")


GRACE_S = 0.25
"""A process whose pipes have ended has so long to end by itself."""

CUT = "the connection to the engine has ended"


class Client(Aborter, Protocol):
    """What the HTTP side needs of whoever computes: one engine, or a router before several."""

    @property
    def stats(self) -> Stats | None:
        """The latest report; None before the first."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests submitted that have neither finished nor been aborted."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why requests cannot be served now; None when all is well."""
        ...

    async def wait_ready(self) -> Ready:
        """Wait until requests can be served. Raises: EngineDeadError."""
        ...

    def open(self, requests: Sequence[Generate]) -> EngineStream:
        """Submit requests that belong together. Raises: EngineDeadError."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


class EngineClient:
    """Starts the engine process and talks to it; belongs to one event loop.

    Args:
        factory: builds the engine in its process.
        place: where that process runs; None for one beside this.
        stall_s: an engine that says nothing for so long is given up: it is killed and its requests fail.
        silent_s: after this much silence `trouble` names it, so that health checks fail before requests do.
        clock: seconds, monotonic.
        log_level: of the engine process.
    """

    def __init__(
        self,
        factory: EngineFactory,
        *,
        place: Place | None = None,
        stall_s: float = 300.0,
        silent_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        log_level: int = logging.INFO,
    ) -> None:
        self._context = zmq.asyncio.Context()
        self._to_engine: zmq.Socket[bytes] = as_pipe(zmq.Context.shadow(self._context).socket(zmq.PUSH))
        self._from_engine = as_pipe(self._context.socket(zmq.PULL))
        self._hang_ups = [watch_end(self._to_engine), watch_end(self._from_engine)]
        self._pipes = self._meet(place)
        self._unsent: deque[bytes] = deque()
        self._decode = msgspec.msgpack.Decoder(list[Reply]).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._streams = Streams()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stats: Stats | None = None
        self._death: str | None = None
        self._dead = asyncio.Event()
        self._fatal: str | None = None
        self._closing = False
        self._clock = clock
        self._heard_s = clock()
        self._stall_s = stall_s
        self._silent_s = silent_s
        start = start_engine if place is None else place.start
        self._process = start(factory, self._pipes, log_level)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]

    def _meet(self, place: Place | None) -> Pipes:
        """Open this end of the pipes.

        On this host the engine listens for requests, elsewhere it calls here: it knows this address, and
        nobody knows its own before it is placed.
        """
        if place is None:
            pipes = Pipes.create()
            self._to_engine.connect(pipes.requests)
            self._from_engine.bind(pipes.replies)
            return pipes
        for each in (self._to_engine, self._from_engine):
            each.bind(f"tcp://{place.host}:0")
        return Pipes(
            self._to_engine.getsockopt_string(zmq.LAST_ENDPOINT),
            self._from_engine.getsockopt_string(zmq.LAST_ENDPOINT),
        )

    # --- what callers use

    async def wait_ready(self) -> Ready:
        """Wait until the model is loaded. Raises: EngineDeadError with the engine's own words."""
        return await asyncio.shield(self._ready)

    @property
    def stats(self) -> Stats | None:
        """The engine's latest report; None before the first."""
        return self._stats

    @property
    def in_flight(self) -> int:
        """Requests submitted that have neither finished nor been aborted."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._process.pid

    @property
    def pipes(self) -> Pipes:
        """Where this process and the engine's meet."""
        return self._pipes

    @property
    def trouble(self) -> str | None:
        """Why the engine cannot be relied on now; None when it is well."""
        if self._death is not None:
            return self._death
        if not self._ready.done():
            return "the engine is still loading the model"
        silence_s = self._clock() - self._heard_s
        if silence_s > self._silent_s:
            return f"the engine has not been heard of for {silence_s:.0f} s (limit {self._silent_s:.0f} s)"
        return None

    def open(self, requests: Sequence[Generate]) -> EngineStream:
        """Submit requests that belong together; their deltas come on one stream.

        Raises:
            EngineDeadError: there is no engine to take them.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)
        stream = EngineStream(self, [request.request_id for request in requests])
        for request in requests:
            if request.request_id in self._streams:
                msg = f"request id {request.request_id!r} is already in flight"
                raise ValueError(msg)
            self._streams[request.request_id] = stream
            self._send(request)
        return stream

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Stream one request; leaving the loop early aborts it (close the iterator to be prompt)."""
        async with self.open([request]) as stream:
            async for delta in stream:
                yield delta

    def abort(self, request_id: str) -> None:
        """Stop a request and free its blocks at the next step; an id that is not in flight is ignored."""
        if self._streams.pop(request_id, None) is not None and self._death is None:
            self._send(Abort(request_id=request_id))

    def release(self, lease_id: str) -> None:
        """Let the engine hand on the blocks of a held request that has ended; unknown names are ignored."""
        self.post(Abort(request_id=lease_id))

    def post(self, message: Request) -> None:
        """Tell the engine something that is not answered; one that is gone hears nothing."""
        if self._death is None:
            self._send(message)

    async def wait_dead(self) -> str:
        """Wait until the engine is gone; returns why."""
        await self._dead.wait()
        return self._death or ""

    async def close(self, timeout_s: float = 5.0) -> None:
        """Ask the engine to leave, kill it after `timeout_s`, and fail what was still in flight; once."""
        if self._closing:
            return
        self._closing = True
        if self._death is None:
            for request_id in tuple(self._streams):
                self._send(Abort(request_id=request_id))
            self._send(Drain())
            if not self._ready.done():
                self._process.kill()
        await asyncio.to_thread(self._process.join, timeout_s)
        if self._process.is_alive():
            logger.warning("the engine did not leave within %.1f s; killing it", timeout_s)
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._die("the server is shutting down", ServerClosingError)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in (*self._hang_ups, self._to_engine, self._from_engine):
            socket.close(linger=0)
        self._context.term()
        self._pipes.remove()

    # --- the two tasks

    async def _listen(self) -> None:
        while True:
            self._take(await self._from_engine.recv())

    def _take(self, frame: bytes) -> None:
        self._heard_s = self._clock()
        self._flush()
        for reply in self._decode(frame):
            if isinstance(reply, Delta):
                self._streams.deliver(reply)
            elif isinstance(reply, Stats):
                self._stats = reply
            elif isinstance(reply, Ready):
                self._ready.set_result(reply)
            elif isinstance(reply, Fatal):
                self._fatal = reply.message
            else:
                self._reject(reply)

    def _reject(self, rejected: Rejected) -> None:
        stream = self._streams.pop(rejected.request_id, None)
        if stream is not None:
            error = OverloadedError if rejected.now else AdmissionError
            stream.fail(error(rejected.message))

    async def _watch(self) -> None:
        """Notice the end of the process at once, of a pipe soon, and silence of `stall_s`."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        sentinel = self._process.sentinel
        loop.add_reader(sentinel, ended.set)
        try:
            while not await set_within(ended, min(1.0, self._stall_s / 4)):
                if self._is_cut() and not await set_within(ended, GRACE_S):
                    self._give_up(CUT)
                self._kill_if_stalled()
        finally:
            loop.remove_reader(sentinel)
        await self._read_last_words()
        self._die(self._cause())

    def _is_cut(self) -> bool:
        """Whether a pipe has ended, which loses messages, whatever is connected to it now."""
        return not self._closing and any(hang_up.poll(0) for hang_up in self._hang_ups)

    def _kill_if_stalled(self) -> None:
        silence_s = self._clock() - self._heard_s
        if self._ready.done() and silence_s > self._stall_s and self._process.is_alive():
            self._give_up(f"the engine said nothing for {silence_s:.0f} s (limit {self._stall_s:.0f} s)")

    def _give_up(self, why: str) -> None:
        """Kill the process, unless it has named another reason."""
        self._fatal = self._fatal or why
        logger.error("%s; killing it", self._fatal)
        self._process.kill()

    async def _read_last_words(self) -> None:
        """Let replies that were already in the pipe arrive before anything is declared lost."""
        while await self._from_engine.poll(50):
            await asyncio.sleep(0)  # `_listen` takes them

    def _cause(self) -> str:
        self._process.join()
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        left = code == 0 and not self._closing  # on its own: nobody heard it any more
        reason = self._fatal or (CUT if left else "")
        why = f": {reason}" if reason else ""
        return f"the engine process (pid {self._process.pid}) {how}{why}"

    def _die(self, cause: str, kind: type[EngineDeadError] = EngineDeadError) -> None:
        """Fail everything in flight, once."""
        if self._death is not None:
            return
        self._death = cause
        self._dead.set()
        if self._ready.done() and not self._closing:
            logger.error("%s; %d requests in flight are lost", cause, len(self._streams))
        error = kind(cause)
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(self._fatal or cause))
            self._ready.exception()  # marked as seen: `wait_ready` may never be called
        self._streams.fail(error)

    def _send(self, message: Request) -> None:
        """Hand a message to the pipe, whose queue has no limit; `_watch` notices when nobody reads it."""
        self._unsent.append(self._encode(message))
        self._flush()

    def _flush(self) -> None:
        """Send what is left; a pipe takes nothing before an engine that calls here has done so."""
        with contextlib.suppress(zmq.Again):
            while self._unsent:
                self._to_engine.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is set by then. `wait_for` would lose a cancellation that comes as the event is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
