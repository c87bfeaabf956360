"""Whole runs of the small model on four gloo ranks: 2 pipeline x 2 data ranks, experts over the two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from small_runs import small_run

from benthic.parallel.start import Launch
from benthic.spec.layout import Layout
from benthic.train import run as runs
from benthic.train.hardware import HardwareFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.train.config import LogConfig
    from benthic.train.run import Run
    from benthic.train.speed import Speed
    from benthic.train.trainer import StepResult

LAYOUT = Layout(pp_degree=2, dp_degree=2, ep_degree=2)
FACTS = HardwareFacts(
    device="cpu",
    name="test",
    total_memory=2**34,
    threads=1,
    peak_flops={"float32": 1e11},
    peak_source="made up",
)


class Silent:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, result: StepResult, speed: Speed) -> None:
        pass


def run_of(
    rank: int,
    folder: str,
    data: str,
    *,
    stuck_s: float = 0.0,
    stop: Callable[[], bool] = bool,
    log: LogConfig | None = None,
    layout: Layout = LAYOUT,
) -> Run:
    """Six steps of four rows with a checkpoint after every other, on this rank; resumes what is there."""
    small = small_run(layers=2, rows=1, steps=6)
    config = dataclasses.replace(
        small,
        layout=layout,
        train=dataclasses.replace(small.train, stuck_s=stuck_s, warmup_steps=0),
        checkpoint=dataclasses.replace(small.checkpoint, every=2),
        log=log or small.log,
    )
    return runs.prepare(
        Path(folder),
        config,
        Path(data),
        FACTS,
        Silent(),
        resume=runs.Resume(wanted=True),
        should_stop=stop,
        launch=Launch(rank=rank, ranks=layout.ranks),
    )
