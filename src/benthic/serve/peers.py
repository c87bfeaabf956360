"""The other ranks of engines that take turns together, seen from one: met, told, heard, watched and let go.

Each pair of ranks has a connection of its own on this host. One message a turn goes each way, so that a rank
which reads one has been woken by it, and a rank that ends is noticed by all others, by name.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Final

import msgspec

from benthic.errors import PeerLostError
from benthic.parallel.start import broke
from benthic.sched.lockstep import Intent  # noqa: TC001 (msgspec reads the annotations of messages)
from benthic.serve.commands import Failed

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

MEET_S: Final = 300.0
"""How long the others may take to start."""

LOOK_S: Final = 0.01
"""Seconds between two looks whether another rank listens."""

FOUND_S: Final = 10.0
"""How long to look for the rank that is to blame when a collective has failed."""

GRACE_S: Final = 5.0
"""How long a rank may take to notice by itself that another has ended; with NCCL it may not notice at all."""


class Said(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a rank intends in the next turn."""

    intent: Intent


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Who is at the other end of a new connection."""

    rank: int
    pid: int


Message = Said | Hello | Failed

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Message).decode


@dataclass
class Link:
    """The connection to one rank. `failure` is what it said before its end; `gone` once nothing can come."""

    rank: int
    pid: int
    pipe: Connection
    failure: Failed | None = None
    gone: bool = False

    def read(self) -> Message | None:
        """Wait for its next message; None when it has ended, with or without a word."""
        try:
            message = _decode(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.gone = True
            return None
        if isinstance(message, Failed):
            self.failure, self.gone = message, True
            return None
        return message

    def drain(self) -> None:
        """Read what it has said and nobody has read."""
        while not self.gone and self.pipe.poll(0):
            self.read()

    def tell(self, message: Message) -> None:
        """Send, unless nobody is there: who reads next finds that out, and why."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(_encode(message))

    @property
    def to_blame(self) -> bool:
        """Whether it has ended for a reason of its own."""
        return self.gone and (self.failure is None or not self.failure.lost)

    @property
    def fate(self) -> str:
        """How it ended."""
        name = f"rank {self.rank} (pid {self.pid})"
        return f"{name} has ended" if self.failure is None else f"{name} failed: {self.failure.words}"


class Peers:
    """All ranks but this one.

    Args:
        rank: this one.
        links: the others, by rank.
    """

    def __init__(self, rank: int, links: list[Link]) -> None:
        self.rank = rank
        self._links = links
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._called = selectors.DefaultSelector()
        for link in links:
            self._called.register(link.pipe, selectors.EVENT_READ)

    @classmethod
    def meet(cls, folder: Path, rank: int, size: int, *, patience_s: float = MEET_S) -> Peers:
        """Find the others in a folder of this host that they all know; every rank must call it.

        Raises:
            PeerLostError: one did not come within `patience_s`; it is named.
        """
        until = time.monotonic() + patience_s
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / f"rank-{rank}"))
            listening.listen(size)
            links = [_call(folder, rank, lower, until) for lower in range(rank)]
            while len(links) < size - 1:
                missing = {*range(size)} - {rank, *(link.rank for link in links)}
                links.append(_answer(listening, rank, min(missing), until))
        return cls(rank, sorted(links, key=lambda link: link.rank))

    @property
    def size(self) -> int:
        """How many ranks there are, this one included."""
        return 1 + len(self._links)

    @property
    def wake_fd(self) -> int:
        """Readable while another rank has said something that was not heard."""
        return self._called.fileno()

    def wait(self) -> None:
        """Wait until another rank says something, or ends."""
        self._called.select()

    def exchange(self, intent: Intent) -> list[Intent]:
        """The intents of all ranks in order; every rank must call it. Cost: a message each way a rank.

        Raises:
            PeerLostError: one has ended instead, or has failed and said how.
        """
        said = Said(intent)
        for link in self._links:
            link.tell(said)
        heard: list[Intent] = []
        for link in self._links:
            message = link.read()
            if not isinstance(message, Said):
                raise self.lost(None)
            heard.append(message.intent)
        heard.insert(self.rank, intent)
        return heard

    def lost(self, cause: Exception | None) -> PeerLostError:
        """What to raise when the ranks cannot go on: names those that ended, else `cause` here.

        The others are told.
        """
        ours = cause is not None and not broke(cause)
        with self._lock:
            blamed = [] if ours else self._to_blame(FOUND_S)
            words = "; ".join(link.fate for link in blamed)
            if not words:
                words = f"rank {self.rank} failed: {type(cause).__name__}: {cause}"
            for link in self._links:
                link.tell(Failed(f"{type(cause).__name__}: {cause}" if ours else words, lost=not ours))
        return PeerLostError(
            f"the {self.size} ranks share their experts and cannot go on: {words}. Start them again."
        )

    def _to_blame(self, patience_s: float) -> list[Link]:
        """The ranks that ended, without those that ended because of others where there are such."""
        until = time.monotonic() + patience_s
        while True:
            for link in self._links:
                link.drain()
            blamed = [link for link in self._links if link.to_blame]
            left = [link.pipe for link in self._links if not link.gone]
            if blamed or not left or not connection.wait(left, max(0.0, until - time.monotonic())):
                return blamed or [link for link in self._links if link.gone]

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words`, from a thread, when a rank has ended and this one did not notice by itself."""
        threading.Thread(target=self._watch, args=(last_words,), name="peers", daemon=True).start()

    def _watch(self, last_words: Callable[[str], None]) -> None:
        ended = select.poll()
        for link in self._links:
            ended.register(link.pipe.fileno(), 0)  # hang-ups alone: messages are read elsewhere
        ended.poll()
        if not self._leaving.wait(GRACE_S):
            last_words(str(self.lost(None)))

    def part(self) -> None:
        """End all connections; once."""
        self._leaving.set()
        self._called.close()
        for link in self._links:
            link.pipe.close()


def _call(folder: Path, rank: int, other: int, until: float) -> Link:
    """Connect to a rank as soon as it listens. Raises: PeerLostError."""
    while True:
        calling = socket.socket(socket.AF_UNIX)
        try:
            calling.connect(str(folder / f"rank-{other}"))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            calling.close()
            if time.monotonic() > until:
                raise _late(rank, other) from error
            time.sleep(LOOK_S)
        else:
            return _greeted(calling, rank)


def _answer(listening: socket.socket, rank: int, other: int, until: float) -> Link:
    """Take the next call. Raises: PeerLostError, naming `other`, when there is none until then."""
    listening.settimeout(max(LOOK_S, until - time.monotonic()))
    try:
        answered, _ = listening.accept()
    except TimeoutError as error:
        raise _late(rank, other) from error
    answered.setblocking(True)  # noqa: FBT003 (positional-only)
    return _greeted(answered, rank)


def _greeted(connected: socket.socket, rank: int) -> Link:
    """Say who is here and hear who is there. Raises: PeerLostError."""
    pipe = connection.Connection(connected.detach())
    try:
        pipe.send_bytes(_encode(Hello(rank, os.getpid())))
        hello = _decode(pipe.recv_bytes())
    except (EOFError, OSError) as error:
        msg = f"rank {rank} was met by a rank that ended at once. See what that logged, and start again."
        raise PeerLostError(msg) from error
    assert isinstance(hello, Hello)  # noqa: S101 (the first message of every rank)
    return Link(hello.rank, hello.pid, pipe)


def _late(rank: int, other: int) -> PeerLostError:
    return PeerLostError(
        f"rank {rank} has waited in vain for rank {other} to start. See what that logged, and start again."
    )
