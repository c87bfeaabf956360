"""Ends a process that hangs, after it has written down where.

A rank that waits for one that never comes would wait until the collective's timeout and then say only that.
A thread beside the training loop sees that a step takes too long, writes a report that a person can read
(what the rank is in the middle of, the stacks of all its threads, torch's record of collectives) and ends
the process, so that the launcher can start all ranks again. Cost of a step: two assignments.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Final, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STUCK: Final = 75
"""Exit code of a process that was stuck (EX_TEMPFAIL: starting again may help)."""
_LOOKS: Final = 20


@dataclass
class Watchdog:
    """Watches what is begun and ended.

    limit_s: how long it may take; 0 watches nothing.
    report: file to write before the end.
    describe: what the process is in the middle of, a line; called by another thread.
    end: ends the process.
    """

    limit_s: float
    report: Path
    describe: Callable[[], str]
    clock: Callable[[], float] = monotonic
    end: Callable[[int], None] = os._exit
    _watched: tuple[str, float] | None = field(default=None)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = field(default=None)

    def __enter__(self) -> Self:
        """Watch from now on."""
        if self.limit_s > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, what: str) -> None:
        """Something starts that must not take longer than `limit_s`; whatever was before has ended."""
        self._watched = what, self.clock()

    def rest(self) -> None:
        """Nothing is going on that is watched."""
        self._watched = None

    @property
    def interval_s(self) -> float:
        """How often the thread looks."""
        return min(1.0, self.limit_s / _LOOKS)

    def _watch(self) -> None:
        while not self._over.wait(self.interval_s):
            watched = self._watched
            if watched is not None and self.clock() - watched[1] > self.limit_s:
                self._bark(*watched)
                return

    def _bark(self, what: str, since: float) -> None:
        """Write the report, leave the other ranks time to write theirs, and end the process."""
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self._lines(what, since))
            file.write("\nstacks of all threads:\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.write(f"\ncollectives (torch's flight recorder):\n{flight_record()}\n")
            file.flush()
            os.fsync(file.fileno())
        first = next(self._lines(what, since))
        sys.stderr.write(f"error: {first} Where this rank stands: {self.report}.\n")
        sys.stderr.flush()
        if not self._over.wait(2 * self.interval_s + 1.0):
            self.end(STUCK)

    def _lines(self, what: str, since: float) -> Iterator[str]:
        yield f"{what} has taken {self.clock() - since:.1f} s; train.stuck_s={self.limit_s}."
        yield self.describe()
        yield "Compare the reports of all ranks: one that waits says for what; the one to blame does not."


def flight_record() -> str:
    """The collectives that torch remembers, as JSON; why there are none where it remembers none.

    Private to torch, which documents only that it is dumped on a timeout of NCCL.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # noqa: SLF001 (no public name)
    if dump is None:
        return f"torch {torch.__version__} has no recorder that can be asked"
    found: str | bytes = dump(includeCollectives=True)
    return found.decode(errors="replace") if isinstance(found, bytes) else found
