"""What runs of many ranks measure beside losses: timelines, slow ranks, traces; and that losses stay."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING

import pytest
from small_runs import write_documents
from spawn import spawn
from typer.testing import CliRunner
from whole_runs import LAYOUT, run_of

from benthic.cli.main import app
from benthic.parallel.recorder import offset
from benthic.spec.layout import Layout
from benthic.train.config import LogConfig
from benthic.train.profile import Steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.dist

LOG = LogConfig(every=1, timeline_every=3, tensorboard=False, pictures=False)
SLOW_S = 0.05


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured_and_bare(rank: int, folder: str, data: str) -> None:
    """One run that measures everything, whose rank 1 is slow in attention, and one that measures nothing."""
    run = run_of(rank, f"{folder}/measured", data, log=LOG)
    if rank == 1:
        for stage in run.trainer.executor._stages.values():
            slow_down(stage)
    finish(run, Steps(2, 3))
    if rank == 0:
        told = [note for note in run.watcher.notes if "longer for attention" in note]  # type: ignore[attr-defined]
        assert [note[:13] for note in told] == ["rank 1 takes "], run.watcher.notes  # type: ignore[attr-defined]
    finish(run_of(rank, f"{folder}/bare", data), None)
    assert offset(run.trainer.mesh.pipeline, time.perf_counter, run.trainer.device) == 0.0


def finish(run: object, profile: Steps | None) -> None:
    """Without export, whose tokenizer the data lacks."""
    off = dataclasses.replace(run.config, checkpoint=dataclasses.replace(run.config.checkpoint, export=False))  # type: ignore[attr-defined]
    run.config = off  # type: ignore[attr-defined]
    assert run.go(profile=profile)  # type: ignore[attr-defined]


def slow_down(stage: object) -> None:
    """Attention sleeps, beneath what times it."""
    for block in stage.model.blocks:  # type: ignore[attr-defined]

        def late(*args: object, attention: Callable[..., object] = block.attention) -> object:
            time.sleep(SLOW_S)
            return attention(*args)

        block.attention = late


def test_measuring_finds_the_slow_rank_and_draws_the_timeline_without_changing_losses(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    spawn(measured_and_bare, LAYOUT.ranks, str(tmp_path), str(data))
    run = tmp_path / "measured"
    assert losses(run) == losses(tmp_path / "bare")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["slowest"]["rank"] for line in lines[1:]] == [1] * 5
    assert all(line["slowest"]["over_median"] > 1.2 for line in lines[1:])
    assert "slowest" not in lines[0]
    assert sorted(path.name for path in (run / "profile").iterdir()) == [f"rank-{r}.json" for r in range(4)]
    spans = [json.loads(line) for line in (run / "spans.jsonl").read_text().splitlines()]
    assert {(span["step"], span["rank"]) for span in spans} == {(3, 0), (3, 1), (6, 0), (6, 1)}
    sizes = ["--ranks", "2", "--microbatches", "2", "--measured", str(run / "spans.jsonl")]
    drawn = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["draw", "schedule", "1f1b", *sizes])
    assert drawn.exit_code == 0, drawn.output
    assert "1f1b, measured" in drawn.output


def a_receiver_waits_before_its_slot_begins(rank: int, folder: str, data: str) -> None:
    run = run_of(rank, folder, data, log=dataclasses.replace(LOG, every=0), layout=Layout(pp_degree=2))
    if rank == 0:
        slow_down(run.trainer.executor._stages[0])
    finish(run, None)


def test_time_spent_waiting_for_another_rank_is_no_part_of_a_slot(tmp_path: Path) -> None:
    """Stage 0 takes 50 ms a layer in attention; the forwards of stage 1, which wait for it, do not."""
    data = write_documents(tmp_path / "data")
    spawn(a_receiver_waits_before_its_slot_begins, 2, str(tmp_path), str(data))
    spans = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    first = next(span for span in spans if (span["slot"], span["step"]) == ("0F0", 6))
    second = next(span for span in spans if (span["slot"], span["step"]) == ("1F0", 6))
    assert first["end"] - first["start"] >= SLOW_S
    assert second["start"] >= first["end"]
