"""The other ranks of an engine, seen from rank 0: processes that are started, told, watched and let go."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from typing import TYPE_CHECKING, Final

from benthic.errors import PeerLostError
from benthic.serve.commands import Answer, Failed, Here, Leave, Readable, decode_answer, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from benthic.serve.commands import Command
    from benthic.serve.transfer.handshake import Region

    Body = Callable[[int, Connection], None]

FOUND_S: Final = 10.0
"""How long to look for the rank that is to blame when another one has lost it."""

GRACE_S: Final = 5.0
"""How long rank 0 may take to notice by itself that a rank has ended; with NCCL it may not notice at all."""

PRELOADED: Final = "benthic.serve.follow"
"""What the server imports from which ranks are forked: torch once, not once a rank, and nothing of CUDA."""

LEAVE_S: Final = 5.0
"""How long ranks may take to leave before they are killed."""


def prepare() -> None:
    """Start the server from which ranks are forked: it then imports torch while this process does.

    It inherits which signals are ignored, and so do the ranks.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


def start_rank(body: Body, rank: int, pipe: Connection) -> BaseProcess:
    """Start the process of a rank, which has its end of the pipe then."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=body, args=(rank, pipe), name=f"benthic-rank-{rank}")
    process.start()
    pipe.close()
    return process


@dataclass
class Link:
    """One rank's process and the pipe to it; `failure` is what it said before its end."""

    rank: int
    process: BaseProcess
    pipe: Connection
    failure: Failed | None = None

    def read(self) -> Answer | None:
        """What it has said and nobody has read; None when that is nothing, or it is gone."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(0):
                answer = decode_answer(self.pipe.recv_bytes())
                if isinstance(answer, Failed):
                    self.failure = answer
                return answer
        return None

    def fate(self) -> str | None:
        """How it ended; None while it runs."""
        name = f"rank {self.rank} (pid {self.process.pid})"
        if self.failure is not None:
            return f"{name} failed: {self.failure.words}"
        code = self.process.exitcode
        if code is None:
            return None
        return f"{name} was killed by signal {-code}" if code < 0 else f"{name} exited with code {code}"


class Followers:
    """Ranks 1 to `size - 1`.

    Args:
        body: what a process runs, called with its rank and its end of the pipe; it must pickle.
        size: all ranks, 0 included.
    """

    def __init__(self, body: Body, size: int) -> None:
        self.size = size
        self._leaving = threading.Event()
        self._lost = False
        self._reading = threading.Lock()
        self._links: list[Link] = []
        prepare()
        for rank in range(1, size):
            here, there = multiprocessing.Pipe()
            self._links.append(Link(rank, start_rank(body, rank, there), here))

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Process ids, by rank from 1 on."""
        return tuple(link.process.pid for link in self._links)

    def meet(self, stage: str) -> None:
        """Wait until every rank has come as far as `stage`.

        Raises:
            PeerLostError: one has ended instead.
        """
        if any(answer != Here(stage) for answer in self._answers()):
            raise self.lost(None)

    def regions(self) -> list[Region]:
        """Where the ranks' pages are, which each says once, when it has built its engine.

        Raises:
            PeerLostError: one has ended instead.
        """
        answers = self._answers()
        found = [answer.region for answer in answers if isinstance(answer, Readable)]
        if len(found) < len(answers):
            raise self.lost(None)
        return found

    def _answers(self) -> list[Answer]:
        """Wait for the next answer of every rank. Raises: PeerLostError when one ends or fails instead."""
        found: dict[int, Answer] = {}
        while missing := [link for link in self._links if link.rank not in found]:
            connection.wait([link.pipe for link in missing])
            found |= self._read(missing)
        return [found[link.rank] for link in self._links]

    def heard(self, *, wait: bool) -> list[tuple[int, Answer]]:
        """What ranks have said, at most one answer each, with their numbers; with `wait`, one at least.

        Raises:
            PeerLostError: one has ended or failed.
        """
        if wait:
            connection.wait([link.pipe for link in self._links])
        return list(self._read(self._links).items())

    def _read(self, links: list[Link]) -> dict[int, Answer]:
        """The next answer of each of these that has said something. Raises: PeerLostError."""
        with self._reading:
            said = {link.rank: link.read() for link in links if link.pipe.poll(0)}
        answers: dict[int, Answer] = {rank: answer for rank, answer in said.items() if answer is not None}
        if len(answers) < len(said) or any(isinstance(answer, Failed) for answer in answers.values()):
            raise self.lost(None)
        return answers

    def tell(self, command: Command) -> None:
        """Let every rank run something.

        Raises:
            PeerLostError: one is gone.
        """
        frame = encode(command)
        for link in self._links:
            try:
                link.pipe.send_bytes(frame)
            except OSError as error:
                raise self.lost(error) from error

    def lost(self, cause: Exception | None) -> PeerLostError:
        """What to raise when the ranks cannot go on: names those that ended, else `cause` on rank 0."""
        from benthic.parallel.start import broke  # noqa: PLC0415 (this module must not wait for torch)

        self._lost = True
        blamed = self._to_blame(FOUND_S if cause is None or broke(cause) else 0.0)
        words = "; ".join(str(link.fate()) for link in blamed)
        if not words:
            words = f"rank 0 failed: {type(cause).__name__}: {cause}"
        return PeerLostError(
            f"the {self.size} ranks of this engine compute every step together and cannot go on: {words}. "
            "Start it again."
        )

    def _to_blame(self, patience_s: float) -> list[Link]:
        """The ranks that ended, without those that ended because of others where there are such."""
        until = time.monotonic() + patience_s
        while True:
            # before looking who has ended: one that ends between the two looks is waited for, and found
            running = [link.process.sentinel for link in self._links if link.process.exitcode is None]
            with self._reading:
                for link in self._links:
                    link.read()
            ended = [link for link in self._links if link.fate() is not None]
            blamed = [link for link in ended if link.failure is None or not link.failure.lost]
            if blamed or not running or not connection.wait(running, max(0.0, until - time.monotonic())):
                return blamed or ended

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words`, from a thread, when a rank has ended and rank 0 did not notice by itself."""
        threading.Thread(target=self._watch, args=(last_words,), name="ranks", daemon=True).start()

    def _watch(self, last_words: Callable[[str], None]) -> None:
        connection.wait([link.process.sentinel for link in self._links])
        if not self._leaving.wait(GRACE_S):
            last_words(str(self.lost(None)))

    def dismiss(self) -> bool:
        """Tell the ranks to leave; returns whether all are there to do so."""
        frame = encode(Leave())
        for link in self._links:
            with contextlib.suppress(OSError):
                link.pipe.send_bytes(frame)
        self._leaving.set()
        return not self._lost

    def end(self) -> None:
        """Wait for ranks that leave, and kill those that do not: at once after a loss."""
        self._leaving.set()
        for link in self._links:
            link.process.join(0.0 if self._lost else LEAVE_S)
            link.process.kill()
            link.process.join()
            link.pipe.close()
