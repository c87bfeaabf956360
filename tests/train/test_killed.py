"""A run killed without warning and resumed is the run that was left alone."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS = 200
EVERY = 20
LIMIT_S = 240


def start(run: Path, dataset: Path, steps: int = STEPS) -> forked.Command:
    command = ["train", "nano_test", "--run", str(run), "--data", str(dataset), "--resume"]
    rows = ["train.seq_len=32", "train.global_batch_size=2", "model.num_hidden_layers=2"]
    settings = [*rows, f"train.steps={steps}", f"checkpoint.every={EVERY}", "evaluate.max_tokens=200"]
    options = [word for setting in settings for word in ("--set", setting)]
    return forked.start([*command, *options], run.with_suffix(".log"))


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_until(running: forked.Command, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while running.running and not ready():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)


def kill_when(running: forked.Command, ready: Callable[[], bool]) -> None:
    wait_until(running, ready)
    running.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_killed_three_times_has_the_losses_of_the_undisturbed_run(dataset: Path, tmp_path: Path) -> None:
    """A layer of each kind, 200 steps; killed at a random step, during a save, at a random step."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(straight, dataset).finish(LIMIT_S)
    rng = random.Random(20)  # noqa: S311 (moments to kill at, not a secret)
    first, third = rng.randint(5, 60), rng.randint(130, 190)
    kill_when(start(broken, dataset), lambda: steps_done(broken) >= first)
    saving = broken / "checkpoint"
    kill_when(start(broken, dataset), lambda: steps_done(broken) >= 80 and any(saving.glob("*.tmp")))
    kill_when(start(broken, dataset), lambda: steps_done(broken) >= third)
    output = start(broken, dataset).finish(LIMIT_S)
    assert "resumed from step" in output
    one, two = lines(straight), lines(broken)
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for key in ("loss", "mtp_loss", "balance", "grad_norm", "lr", "tokens", "max_vio"):
        assert [line[key] for line in one] == [line[key] for line in two], key
    for name in ("evaluations.jsonl", "loads.jsonl"):
        assert (straight / name).read_text() == (broken / name).read_text()
    checksums = [(run / f"checkpoint/step-{STEPS}/manifest.json").read_text() for run in (straight, broken)]
    assert checksums[0] == checksums[1]


def test_sigterm_saves_after_the_step_and_resuming_goes_on_from_it(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = 60
    running = start(run, dataset, steps)
    wait_until(running, lambda: steps_done(run) >= 3)
    running.terminate()
    output = running.finish(LIMIT_S)
    done = steps_done(run)
    assert 3 <= done < steps
    assert f"stopped after step {done}; pass --resume to go on" in output
    assert (run / f"checkpoint/step-{done}").is_dir()
    again = start(run, dataset, steps).finish(LIMIT_S)
    assert f"resumed from step {done}" in again
    assert [line["step"] for line in lines(run)] == list(range(1, steps + 1))
