"""A rank other than 0: it builds its shard, and then runs what rank 0 tells it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from typing import TYPE_CHECKING, Final

import torch

from benthic.parallel.start import broke
from benthic.serve.commands import (
    ClosePages,
    Draft,
    Failed,
    Fetch,
    Here,
    Leave,
    Move,
    OpenPages,
    Readable,
    Remember,
    Score,
    Step,
    decode_command,
    encode,
)
from benthic.serve.drafters import drafter_for
from benthic.serve.drafts import Drafts, Trial
from benthic.serve.fetching import Fetching
from benthic.serve.pages import Pages
from benthic.serve.ranks import build_shard, join, own_options
from benthic.serve.spread_drafts import ToldGuesser, told_drawing
from benthic.serve.weights import drafts_with_mtp

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from torch import Tensor

    from benthic.parallel.team import Team
    from benthic.sched.plans import StepPlan
    from benthic.serve.drafters import Drafter
    from benthic.serve.options import EngineOptions
    from benthic.serve.pages import Mover
    from benthic.serve.runner import Runner, StepResult

logger = logging.getLogger("benthic.serve.engine")

FAILED: Final = 1
"""Exit code of a rank that could not go on."""


def follow(
    path: Path,
    options: EngineOptions,
    port: int,
    log_level: int,
    mover: Mover | None,
    rank: int,
    pipe: Connection,
) -> None:
    """Body of the process of a rank; `mover` is what moves blocks, where the engine takes part in transfers.

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
        runner, team = build_shard(path, own, here, tell).runner, here.team
        modules = drafter_for(own, runner, ToldGuesser(team)) if drafts_with_mtp(own) else None
        fetching = None
        if mover is not None:
            pages = Pages(runner.cache, mover)
            pipe.send_bytes(encode(Readable(pages.region)))
            fetching = Fetching(rank, pages, pipe)
        receive = pipe.recv_bytes if fetching is None else fetching.receive
        Follower(runner, team, modules, fetching).obey(receive)
        runner.release()
        team.part()
    except EOFError:
        os._exit(FAILED)  # rank 0 is gone
    except Exception as error:
        lost = broke(error)
        if not lost:
            logger.exception("rank %d failed", rank)
        with contextlib.suppress(OSError):  # rank 0 is gone too
            pipe.send_bytes(encode(Failed(f"{type(error).__name__}: {error}", lost)))
        os._exit(FAILED)


class Follower:
    """Runs commands in order.

    Args:
        runner: of this rank's shard.
        team: through which tensors come.
        drafter: of this rank, where prediction modules draft.
        fetching: of this rank, where blocks are pulled.
    """

    def __init__(
        self, runner: Runner, team: Team, drafter: Drafter | None = None, fetching: Fetching | None = None
    ) -> None:
        self._runner = runner
        self._team = team
        self._drafter = drafter
        self._fetching = fetching
        self._slots: tuple[int, ...] = ()
        self._latest: tuple[StepPlan, StepResult, Trial | None] | None = None

    @torch.inference_mode()
    def obey(self, receive: Callable[[], bytes]) -> None:
        """Run until a command says to leave. Nothing waits for the device.

        Raises: EOFError when rank 0 is gone.
        """
        while not isinstance(command := decode_command(receive()), Leave):
            if isinstance(command, Step):
                self._run(command)
            elif isinstance(command, Move):
                self._runner.cache.move(command.to_host, command.from_host)
            elif isinstance(command, Score):
                list(self._runner.row_logits(self._step()[1], range(command.start, command.stop)))
            elif isinstance(command, Remember):
                self._runner.remember(self._same(command.slots), self._told(len(command.slots)))
            elif isinstance(command, Draft):
                plan = command.step.plan(self._same(command.step.slots))
                self._modules().draft(plan, (0,) * len(plan.sampled_ids))
            elif isinstance(command, OpenPages | ClosePages | Fetch):
                self._pull(command)
            else:
                plan, result, trial = self._step()
                drawing = told_drawing(command.rows, trial, self._team)
                self._modules().learn(plan, result, drawing, (0,) * len(plan.sampled_ids))

    def _run(self, command: Step) -> None:
        plan, drafts = command.plan(self._same(command.slots)), None
        if command.drafts is not None:
            drafts = Drafts(command.drafts, self._told(len(command.drafts), max(command.drafts)))
        trial = None if drafts is None else Trial.of(drafts, len(plan.sampled_ids))
        self._latest = plan, self._runner.run(plan, drafts), trial

    def _pull(self, command: OpenPages | ClosePages | Fetch) -> None:
        assert self._fetching is not None  # noqa: S101 (rank 0 has the same mover)
        if isinstance(command, Fetch):
            self._fetching.start(command)
        elif isinstance(command, OpenPages):
            self._fetching.open(command)
        else:
            self._fetching.close(command)

    def _same(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """The tuple that the runner knows, if it has not changed."""
        self._slots = self._slots if slots == self._slots else slots
        return self._slots

    def _told(self, *shape: int) -> Tensor:
        return self._team.told(torch.empty(shape, dtype=torch.int64, device=self._team.device))

    def _step(self) -> tuple[StepPlan, StepResult, Trial | None]:
        assert self._latest is not None  # noqa: S101 (rank 0 has run a step before)
        return self._latest

    def _modules(self) -> Drafter:
        assert self._drafter is not None  # noqa: S101 (rank 0 has the same options)
        return self._drafter


def _end_with_parent() -> None:
    """End this process when rank 0 has ended, also in the midst of a collective."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(FAILED)
