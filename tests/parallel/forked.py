"""`benthic` commands in processes forked from the server that `spawn` has import torch once.

A fresh interpreter takes seconds to import what it needs; these begin at once, share nothing with the test
and can be killed like any other.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spawn import die_with_parent, forking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A command that runs; what it prints goes to `log`."""

    process: BaseProcess
    log: Path

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Its exit status. Raises: TimeoutError."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            msg = f"it still runs after {seconds} s"
            raise TimeoutError(msg)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, "it ended before it could be killed"

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def finish(self, seconds: float) -> str:
        """Wait for its good end; what it printed."""
        self.process.join(seconds)
        code, printed = self.process.exitcode, self.log.read_text()
        if code != 0:
            self.process.kill()
            self.process.join()
        assert code == 0, f"{code} after at most {seconds} s:\n{printed}"
        return printed


def benthic() -> int | None:
    """The command line on `sys.argv`."""
    from benthic.cli.main import main

    return main()


def start(
    words: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    program: Callable[[], int | None] = benthic,
    has_children: bool = False,
) -> Command:
    """`benthic WORDS`, or another `program` with them, with `environment` added to that of the tests."""
    arguments = (program, list(words), str(log), dict(environment or {}))
    process = forking().Process(target=_run, args=arguments, daemon=not has_children)
    process.start()
    return Command(process, log)


def start_ranks(words: Sequence[str], ranks: int, log: Path) -> list[Command]:
    """`benthic WORDS` on every rank of a group, told so as torchrun tells them; each has a log."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        start(words, log.with_suffix(f".{rank}"), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def _free_port() -> int:
    """Below those that systems hand out, so that no connection takes it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue


def _run(program: Callable[[], int | None], words: list[str], log: str, environment: dict[str, str]) -> None:
    die_with_parent()
    gc.freeze()
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.environ.update(environment)  # noqa: TID251 (that of a process of its own)
    sys.argv = ["benthic", *words]
    sys.exit(program())
