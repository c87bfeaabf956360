"""Ranks of a run that fail, hang or are asked to stop, on gloo: all end, and say why."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from small_runs import write_documents
from spawn import RankError, spawn
from whole_runs import LAYOUT, run_of

from benthic.errors import PeerLostError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.parallel.chunk import Phase
    from benthic.train.run import Run

pytestmark = pytest.mark.dist


def spoil(run: Run, step: int, what: Callable[[], None]) -> None:
    """Do `what` in a block of microbatch 1 of this rank's last stage in one step."""
    stage = run.trainer.executor._stages[max(run.trainer.executor._stages)]
    phases = stage.phases

    def spoiled(microbatch: int) -> list[Phase]:
        found = phases(microbatch)
        if microbatch == 1 and run.trainer.steps_done + 1 == step:
            steps = list(found[0].steps)
            at = next(i for i, step in enumerate(steps) if step.name.startswith("layers"))
            inner = steps[at].run

            def bad(state: object) -> object:
                what()
                return inner(state)

            steps[at] = dataclasses.replace(steps[at], run=bad)
            found[0] = dataclasses.replace(found[0], steps=tuple(steps))
        return found

    stage.phases = spoiled  # type: ignore[method-assign]


def one_rank_fails(rank: int, folder: str, data: str) -> None:
    """Rank 3 is the second pipeline rank's second data rank; 2 shares its experts, 1 feeds it."""
    run = run_of(rank, folder, data)

    def fail() -> None:
        message = "a bad chip"
        raise ValueError(message)

    if rank == 3:
        spoil(run, 3, fail)
    with pytest.raises(PipelineError) as caught:
        run.go()
    said = str(caught.value)
    (Path(folder) / f"said-{rank}").write_text(said)
    assert isinstance(caught.value, PeerLostError) == (rank != 3), said
    # as a process that ends would
    os._exit(0)


def test_a_rank_that_fails_ends_all_and_every_one_names_it_with_slot_and_table(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    spawn(one_rank_fails, LAYOUT.ranks, str(tmp_path), str(data))
    blamed = "rank 3 of 4, step 3: pipeline rank 1 failed in slot 1F1 of table '1f1b'"
    for rank in range(LAYOUT.ranks):
        said = (tmp_path / f"said-{rank}").read_text()
        assert blamed in said, said
        assert "ValueError: a bad chip" in said
    assert (tmp_path / "said-0").read_text().startswith("rank 0 of 4, step 3: lost another rank.")
    assert (tmp_path / "checkpoint" / "step-2").is_dir()


def one_rank_hangs(rank: int, folder: str, data: str) -> None:
    run = run_of(rank, folder, data, stuck_s=4.0)
    if rank == 3:
        spoil(run, 3, lambda: time.sleep(600))
    run.go()


def test_a_rank_that_hangs_is_found_and_every_report_says_what_it_waits_for(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    with pytest.raises(RankError, match="exit code 75"):
        spawn(one_rank_hangs, LAYOUT.ranks, str(tmp_path), str(data))
    reports = [(tmp_path / "logs" / f"stuck-rank-{rank}.txt").read_text() for rank in range(LAYOUT.ranks)]
    assert all(report.startswith("step 3 has taken") for report in reports)
    assert "rank 3 (pp 1, dp 1, cp 0, tp 0, ep 1): pipeline rank 1: 1F1 (operation" in reports[3]
    assert "in phase layers.1.attention" in reports[3]
    assert "time.sleep" in reports[3] or "one_rank_hangs" in reports[3]
    assert "waits for 1B" in reports[1]
    assert "from pipeline rank 1" in reports[1]
    assert "exchange" in reports[2]  # the stack: rank 2 waits for rank 3's rows


def all_are_asked_to_stop(rank: int, folder: str, data: str) -> None:
    from benthic.cli.train import _stopping

    with _stopping() as asked:
        run = run_of(rank, folder, data, stop=asked)
        spoil(run, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run.go() is False
        assert run.trainer.steps_done == 3
        assert run.watcher.notes[-1] == "stopped after step 3; pass --resume to go on"  # type: ignore[attr-defined]
    again = run_of(rank, folder, data)
    assert again.trainer.steps_done == 3


def test_sigterm_on_all_ranks_stops_them_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    spawn(all_are_asked_to_stop, LAYOUT.ranks, str(tmp_path), str(data))
    assert (tmp_path / "checkpoint" / "step-3" / "manifest.json").is_file()
