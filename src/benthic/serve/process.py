"""The engine's own process: messages in, steps, messages out.

The HTTP side tokenises, renders templates and writes JSON; the engine side computes. They share no memory and
no interpreter lock, so neither can stall the other. Two ZeroMQ pipes
join them, one each way, encoded by msgspec.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import msgspec
import zmq

from benthic import collector
from benthic.errors import AdmissionError, BenthicError, OverloadedError, PeerLostError
from benthic.serve.messages import (
    Abort,
    Delta,
    Drain,
    Fatal,
    Generate,
    MoreReady,
    PullEarly,
    Ready,
    Rejected,
    Stats,
)

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from typing import NoReturn

logger = logging.getLogger("benthic.serve.engine")

Request = Generate | PullEarly | MoreReady | Abort | Drain
Reply = Delta | Stats | Ready | Rejected | Fatal

HEARTBEAT_S = 1.0
"""An idle engine reports this often, so that silence means trouble."""

STATS_S = 0.25
"""A busy engine reports its totals at most this often."""

LAST_WORDS_S = 0.5
"""How long an engine's last message may take to leave the process."""


class EngineLike(Protocol):
    """What the loop below needs of an engine."""

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        ...

    def ready(self) -> Ready:
        """What the HTTP side needs to know about the model."""
        ...

    def add(self, request: Generate) -> None:
        """Queue a request. Raises: AdmissionError (never) or OverloadedError (not now)."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; an unknown id is ignored."""
        ...

    def step(self) -> list[Delta]:
        """Compute one batch and return the new tokens."""
        ...

    def stats(self) -> Stats:
        """Totals since the start and gauges of this instant."""
        ...


@runtime_checkable
class Wakeable(Protocol):
    """An engine that others can wake while it has no work."""

    @property
    def wake_fd(self) -> int:
        """A descriptor that is readable when `wake` should be called."""
        ...

    def wake(self) -> None:
        """Do what is due."""
        ...


@runtime_checkable
class Reading(Protocol):
    """An engine that reads what others have computed of a prompt; those that lend have only such readers."""

    def pull_early(self, request: Generate) -> None:
        """Begin to, until an abort of that name."""
        ...

    def more_ready(self, request_id: str, num_tokens: int) -> None:
        """More can be read."""
        ...


@runtime_checkable
class Patient(Protocol):
    """An engine that may hear of more requests before its next step."""

    @property
    def patience_s(self) -> float:
        """How long that step may wait for them."""
        ...


@runtime_checkable
class Shared(Protocol):
    """An engine whose work other processes share: it can be lost through them, and has to let them go."""

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words`, from another thread, when one is lost and the engine cannot notice."""
        ...

    def leave(self) -> None:
        """Let them go; the engine can do nothing more."""
        ...


EngineFactory = Callable[[], EngineLike]
"""Builds the engine inside its process; it must pickle, so use `functools.partial` of a module's function."""


@dataclass(frozen=True)
class Pipes:
    """Where the two processes meet: addresses of the pipe that leads to the engine and of the one back.

    On one host they are sockets in a private `folder`. Without one they are TCP ports of the HTTP process.
    """

    requests: str
    replies: str
    folder: Path | None = None

    @classmethod
    def create(cls) -> Pipes:
        """Make the folder (mode 700: the pipes carry other people's prompts)."""
        folder = Path(tempfile.mkdtemp(prefix="benthic-"))
        return cls(f"ipc://{folder}/requests", f"ipc://{folder}/replies", folder)

    def remove(self) -> None:
        """Delete the folder; a second call does nothing."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class EngineProcess(Protocol):
    """A process that runs an engine, wherever it is; a `multiprocessing.Process` is one."""

    @property
    def pid(self) -> int | None:
        """Its number on its host, once it has one."""
        ...

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once it has ended."""
        ...

    @property
    def exitcode(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        ...

    def is_alive(self) -> bool:
        """Whether it runs."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most so many seconds."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Place(Protocol):
    """Where engines are started, other than beside the HTTP process."""

    @property
    def host(self) -> str:
        """An address of this host that engines there can reach."""
        ...

    def start(self, factory: EngineFactory, pipes: Pipes, log_level: int) -> EngineProcess:
        """Start an engine: `engine_main` of these arguments; returns before it runs."""
        ...

    def close(self) -> None:
        """Let the place go; the engines have ended."""
        ...


AnySocket = TypeVar("AnySocket", bound=zmq.Socket)


def as_pipe(socket: AnySocket) -> AnySocket:
    """The socket without a high-water mark: what is queued is bounded by the requests in flight."""
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 1000)
    return socket


def watch_end(socket: zmq.Socket) -> zmq.Socket[bytes]:
    """A socket that is readable once a connection of `socket` has ended; close it by hand."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(socket.context)
    address = f"inproc://end-{socket.FD}"
    socket.monitor(address, zmq.EVENT_DISCONNECTED)
    watching = context.socket(zmq.PAIR)
    watching.connect(address)
    return watching


def start_engine(factory: EngineFactory, pipes: Pipes, log_level: int) -> BaseProcess:
    """Start the engine process (a fresh interpreter: CUDA and threads do not survive a fork)."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=engine_main, args=(factory, pipes, log_level), name="benthic-engine")
    process.start()
    return process


def engine_main(factory: EngineFactory, pipes: Pipes, log_level: int) -> None:
    """Body of the engine process.

    SIGINT and SIGTERM are left to the HTTP process: a terminal or a service manager sends them to both, and
    draining needs the engine alive. The engine leaves when told to, or when the HTTP process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    context = zmq.Context()
    inbox, outbox = as_pipe(context.socket(zmq.PULL)), as_pipe(context.socket(zmq.PUSH))
    # What was on its way when a pipe ends is lost, so nothing may follow on another connection.
    outbox.setsockopt(zmq.RECONNECT_IVL, -1)
    if pipes.folder is not None:
        inbox.bind(pipes.requests)
    else:
        inbox.setsockopt(zmq.RECONNECT_IVL, -1)
        inbox.connect(pipes.requests)
    outbox.connect(pipes.replies)
    loop = EngineLoop(inbox, outbox, functools.partial(last_words, context, pipes))
    try:
        orphaned = loop.run(factory)
    except PeerLostError as error:
        last_words(context, pipes, str(error))
    except BenthicError as error:
        loop.send([Fatal(message=str(error))])
        sys.exit(1)
    except Exception as error:
        loop.send([Fatal(message=f"{type(error).__name__}: {error}")])
        logger.exception("the engine failed")
        raise
    finally:
        inbox.close()
        outbox.close()
        context.term()
    if orphaned:
        logger.warning("the HTTP process or its pipe is gone; the engine exits")
        pipes.remove()


def last_words(context: zmq.Context, pipes: Pipes, message: str) -> NoReturn:
    """Say why this process ends and end it at once, whatever its other threads wait for."""
    outbox = as_pipe(context.socket(zmq.PUSH))
    outbox.connect(pipes.replies)
    outbox.send(msgspec.msgpack.encode([Fatal(message=message)]))
    time.sleep(LAST_WORDS_S)
    os._exit(1)


class EngineLoop:
    """Takes messages while an engine's next step may wait for them, and waits when there is no work."""

    def __init__(self, inbox: zmq.Socket, outbox: zmq.Socket, last_words: Callable[[str], None]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._last_words = last_words
        self._decode = msgspec.msgpack.Decoder(Request).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._draining = False
        self._patient: Patient | None = None
        self._last_stats_s = 0.0
        self._poller = zmq.Poller()
        self._poller.register(inbox, zmq.POLLIN)
        parent = multiprocessing.parent_process()
        self._parent_fd = None if parent is None else parent.sentinel
        if self._parent_fd is not None:
            self._poller.register(self._parent_fd, zmq.POLLIN)

    def run(self, factory: EngineFactory) -> bool:
        """Build the engine and serve until drained; True when the HTTP process or its pipe ended instead."""
        engine = factory()
        if isinstance(engine, Wakeable):
            self._poller.register(engine.wake_fd, zmq.POLLIN)
        self._patient = engine if isinstance(engine, Patient) else None
        shared = engine if isinstance(engine, Shared) else None
        if shared is not None:
            shared.watch(self._last_words)
        try:
            return self._serve(engine)
        finally:
            if shared is not None:
                shared.leave()

    def _serve(self, engine: EngineLike) -> bool:
        collector.settle()
        self.send([engine.ready(), engine.stats()])
        was_busy = False
        while True:
            replies, orphaned = self._take(engine)
            if orphaned:
                return True
            busy = engine.has_work
            if busy:
                replies.extend(engine.step())
            if self._stats_due(busy=engine.has_work, was_busy=was_busy):
                replies.append(engine.stats())
            if not self.send(replies):
                return True
            was_busy = busy
            if self._draining and not engine.has_work:
                return False

    def send(self, replies: Sequence[Reply]) -> bool:
        """Send everything of one step as one message; False when the pipe has ended, so nobody hears it."""
        try:
            if replies:
                self._outbox.send(self._encode(replies), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _take(self, engine: EngineLike) -> tuple[list[Reply], bool]:
        """Hand messages to the engine until its step is due; returns refusals and whether the parent is gone.

        Without work one message is enough. What is left of the time below a millisecond is not waited for.
        """
        replies: list[Reply] = []
        while True:
            working = engine.has_work
            wait_ms = int(1000 * self._patient.patience_s) if working and self._patient is not None else 0
            events = dict(self._poller.poll(wait_ms if working else int(HEARTBEAT_S * 1000)))
            if self._parent_fd is not None and self._parent_fd in events:
                return [], True
            if isinstance(engine, Wakeable) and engine.wake_fd in events:
                engine.wake()
            while self._inbox.poll(0):
                replies.extend(self._apply(engine, self._decode(self._inbox.recv())))
            if not wait_ms:
                return replies, False

    def _apply(self, engine: EngineLike, message: Request) -> list[Reply]:
        if isinstance(message, Abort):
            engine.abort(message.request_id)
        elif isinstance(message, Drain):
            self._draining = True
        elif isinstance(message, PullEarly | MoreReady):
            assert isinstance(engine, Reading)  # noqa: S101 (others are told of nothing)
            if isinstance(message, PullEarly):
                engine.pull_early(message.request)
            else:
                engine.more_ready(message.request_id, message.num_tokens)
        else:
            try:
                engine.add(message)
            except AdmissionError as error:
                return [Rejected(request_id=message.request_id, message=str(error))]
            except OverloadedError as error:
                return [Rejected(request_id=message.request_id, message=str(error), now=True)]
        return []

    def _stats_due(self, *, busy: bool, was_busy: bool) -> bool:
        """Report often while busy, at once when work ends, and as a heartbeat while idle."""
        now = time.monotonic()
        due = now - self._last_stats_s >= STATS_S or (was_busy and not busy)
        if due:
            self._last_stats_s = now
        return due
