"""A rank other than 0: it builds its shard, and then runs what rank 0 tells it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from typing import TYPE_CHECKING, Final

import torch

from benthic.parallel.start import broke
from benthic.serve.commands import Failed, Here, Leave, Score, Step, decode_command, encode
from benthic.serve.drafts import Drafts
from benthic.serve.ranks import build_shard, join, own_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from benthic.parallel.team import Team
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import Runner, StepResult

logger = logging.getLogger("benthic.serve.engine")

FAILED: Final = 1
"""Exit code of a rank that could not go on."""


def follow(
    path: Path, options: EngineOptions, port: int, log_level: int, rank: int, pipe: Connection
) -> None:
    """Body of the process of a rank.

    Signals are left to rank 0, as it leaves them to the HTTP process; the end of rank 0 ends this process. A
    failure is told and ends it at once: what is left of a broken group may hang when it is taken down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format=f"%(levelname)s %(asctime)s rank {rank}: %(message)s")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()

    def tell(stage: str) -> None:
        pipe.send_bytes(encode(Here(stage)))

    try:
        own = own_options(options, rank)
        tell("started")
        here = join(own, port, rank)
        obey(build_shard(path, own, here, tell).runner, here.team, pipe.recv_bytes)
        here.team.part()
    except EOFError:
        os._exit(FAILED)  # rank 0 is gone
    except Exception as error:
        lost = broke(error)
        if not lost:
            logger.exception("rank %d failed", rank)
        pipe.send_bytes(encode(Failed(f"{type(error).__name__}: {error}", lost)))
        os._exit(FAILED)


def obey(runner: Runner, team: Team, receive: Callable[[], bytes]) -> None:
    """Run commands in order until one says to leave. Nothing waits for the device.

    Raises: EOFError when rank 0 is gone.
    """
    slots: tuple[int, ...] = ()
    result: StepResult | None = None
    while not isinstance(command := decode_command(receive()), Leave):
        if isinstance(command, Score):
            assert result is not None  # noqa: S101 (rank 0 scores rows of a step)
            list(runner.row_logits(result, range(command.start, command.stop)))
            continue
        slots = slots if command.slots == slots else command.slots
        if isinstance(command, Step):
            result = runner.run(command.plan(slots), _drafts(command, team))
        else:
            runner.remember(slots, team.told(torch.empty(len(slots), dtype=torch.int64, device=team.device)))


def _drafts(command: Step, team: Team) -> Drafts | None:
    """The tokens that rank 0 verifies in this step."""
    if command.drafts is None:
        return None
    shape = (len(command.drafts), max(command.drafts))
    return Drafts(command.drafts, team.told(torch.empty(shape, dtype=torch.int64, device=team.device)))


def _end_with_parent() -> None:
    """End this process when rank 0 has ended, also in the midst of a collective."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(FAILED)
