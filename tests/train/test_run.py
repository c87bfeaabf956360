"""A run in its folder: what it leaves behind when it ends well and when it does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from benthic.cli.settings import apply
from benthic.errors import BackendError, CheckpointError, ConfigError, NumericsError
from benthic.train import checkpoint
from benthic.train.data.build import BuildOptions, build
from benthic.train.hardware import detect
from benthic.train.run import Resume, Run, prepare
from benthic.train.speed import Meter, console_line
from benthic.train.trainer import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.data.documents import Corpus
    from benthic.train.data.tokenizer import Tokenizer
    from benthic.train.hardware import HardwareFacts
    from benthic.train.speed import Speed


class Listener:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, result: StepResult, speed: Speed) -> None:
        self.steps.append(result.step)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def made(
    dataset: Path, facts: HardwareFacts, nano: RunConfig, tmp_path: Path
) -> Callable[..., tuple[Run, Listener]]:
    config = apply(
        nano, ["train.steps=12", "checkpoint.every=4", "evaluate.every=4", "evaluate.max_tokens=200"]
    )

    def make(*settings: str, resume: bool = False, step: int | None = None) -> tuple[Run, Listener]:
        listener = Listener()
        run = prepare(
            tmp_path / "run",
            apply(config, settings),
            dataset,
            facts,
            listener,
            resume=Resume(wanted=resume, step=step),
            should_stop=lambda: False,
        )
        return run, listener

    return make


def recorded(run: Run, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (run.folder / name).read_text().splitlines()]


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_finished_run_keeps_the_latest_checkpoints_and_all_records(
    made: Callable[..., tuple[Run, Listener]], async_save: str
) -> None:
    run, listener = made(f"checkpoint.async_save={async_save}")
    assert run.go()
    assert listener.steps == recorded(run, "metrics.jsonl") == list(range(1, 13))
    assert recorded(run, "evaluations.jsonl") == [4, 8, 12]
    assert recorded(run, "loads.jsonl") == [10, 12]
    assert run.store.steps() == [8, 12]


def test_finished_run_that_is_resumed_repeats_nothing(made: Callable[..., tuple[Run, Listener]]) -> None:
    made()[0].go()
    run, listener = made(resume=True)
    assert run.go()
    assert listener.steps == []
    assert recorded(run, "evaluations.jsonl") == [4, 8, 12]


def test_run_that_goes_back_forgets_what_came_after(made: Callable[..., tuple[Run, Listener]]) -> None:
    first, _ = made()
    first.go()
    before = (first.folder / "metrics.jsonl").read_text().splitlines()
    run, _ = made(resume=True, step=8)
    assert run.store.steps() == [8]
    assert recorded(run, "metrics.jsonl") == list(range(1, 9))
    run.go()
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == [json.loads(line)["loss"] for line in before]


def test_unfinished_last_line_is_dropped_on_resuming(made: Callable[..., tuple[Run, Listener]]) -> None:
    run, _ = made()
    run.go()
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    made(resume=True)
    assert recorded(run, "metrics.jsonl") == list(range(1, 13))


def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    made: Callable[..., tuple[Run, Listener]],
) -> None:
    run, _ = made()
    for _ in range(6):
        run._step()
    with torch.no_grad():
        run.trainer.model.state_dict()["norm.weight"].fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"step 7: loss is nan; .* parameter norm.weight"):
        run.go()
    assert run.store.steps() == [4]
    again, listener = made(resume=True)
    again.go()
    assert listener.steps == list(range(5, 13))
    assert recorded(again, "metrics.jsonl") == list(range(1, 13))


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_full_disk_ends_the_run_and_resuming_goes_on_from_the_checkpoint_before(
    made: Callable[..., tuple[Run, Listener]], monkeypatch: pytest.MonkeyPatch, async_save: str
) -> None:
    run, _ = made(f"checkpoint.async_save={async_save}")
    for _ in range(4):
        run._step()
    run.store.wait()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"step 8 needs \d+ bytes, but .* has 0 free. Step 4 is intact"):
        run.go()
    monkeypatch.undo()
    again, _ = made(resume=True)
    assert again.trainer.steps_done == 4
    assert again.go()


def test_used_folder_and_unknown_step_are_refused(made: Callable[..., tuple[Run, Listener]]) -> None:
    made()[0].go()
    with pytest.raises(ConfigError, match=r"already holds step 12"):
        made()
    with pytest.raises(CheckpointError, match=r"has no step 5; it has 8, 12"):
        made(resume=True, step=5)


def test_resuming_nothing_says_so_and_starts(made: Callable[..., tuple[Run, Listener]]) -> None:
    run, listener = made(resume=True)
    assert any("no checkpoint in" in note and "starting at step 0" in note for note in listener.notes)
    assert run.trainer.steps_done == 0


def test_data_that_holds_nothing_out_is_noted_at_the_start(
    corpus: Corpus, words: Tokenizer, facts: HardwareFacts, nano: RunConfig, tmp_path: Path
) -> None:
    build(corpus, words, tmp_path / "all", BuildOptions(held_out=0.0))
    listener = Listener()
    prepare(
        tmp_path / "run",
        nano,
        tmp_path / "all",
        facts,
        listener,
        resume=Resume(wanted=False),
        should_stop=lambda: False,
    )
    assert any("nothing is evaluated. Build it with --held-out" in note for note in listener.notes)


def test_console_line_names_the_quantities_in_order(nano: RunConfig, facts: HardwareFacts) -> None:
    config = apply(nano, ["precision.matmul=float32"])
    result = StepResult(7, 2.5, (), 1.0, 0.5, 1e-3, 1000, 500, {})
    meter = Meter(config, facts)
    speed = meter.add(result, 0.25)
    assert speed.tokens_per_second == 2000.0
    assert speed.mfu == pytest.approx(speed.flops_per_second / 1e11)
    line = console_line(result, meter.since_last())
    names = [word for word in line.split() if word.endswith(":")]
    assert names == ["step:", "loss:", "grad_norm:", "memory:", "tps:", "tflops:", "mfu:"]
    assert "causal" in meter.describe()
    assert "made up" in meter.describe()


def test_missing_gpu_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="torch sees 0 CUDA GPUs"):
        detect("cuda")
