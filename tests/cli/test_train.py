"""`benthic data`, `train` and `evaluate` from the outside."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from benthic.cli.dry_run import Outlook
from benthic.cli.main import app, main
from benthic.cli.settings import apply
from benthic.plan.cost import machine as machines
from benthic.plan.training.candidate import Candidate
from benthic.plan.training.step import step
from benthic.train import recipes
from benthic.train.fields import flatten

if TYPE_CHECKING:
    from pathlib import Path

NANO = (
    "train.steps=4",
    "train.warmup_steps=2",
    "train.seq_len=32",
    "checkpoint.every=2",
    "log.every=2",
    "evaluate.max_tokens=300",
)


def call(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def succeed(*words: str | Path) -> str:
    result = call(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refusal(*words: str | Path) -> str:
    """What a wrong command is answered with: an error meant for people, or a usage error."""
    result = call(*words)
    assert result.exit_code != 0
    return f"{result.output}{result.exception}"


def settings(*words: str) -> list[str]:
    return [word for setting in (*NANO, *words) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        lines = (f"line {n} of text {number}: sand, silt and snow {n * number}\n" for n in range(2 + number))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    learnt = succeed("data", "tokenizer", text, "--out", folder / "tok", "--vocab-size", "270")
    assert "270 tokens from 30 documents" in learnt
    built = succeed(
        "data", "build", text, "--tokenizer", folder / "tok", "--out", folder / "data", "--held-out", "0.2"
    )
    assert "held_out" in built
    return folder / "data"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    extra = ("checkpoint.export=true", "log.pictures=true", "log.tensorboard=true", "log.sample_tokens=4")
    output = succeed("train", "nano_test", "--run", folder, "--data", data, *settings(*extra))
    assert "mfu of" in output
    assert "step:     4  loss:" in output
    assert "held out:   4  loss:" in output
    return folder


def test_run_folder_holds_everything_a_run_promises(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert {
        "resolved.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "loads.jsonl",
        "loss.svg",
        "loss.png",
        "experts.svg",
        "experts.png",
        "sample.txt",
        "checkpoint/step-2/manifest.json",
        "checkpoint/step-4/__0_0.distcp",
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
    } <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["config"]["precision"]["weights"] == "float32"
    assert {"field", "value", "reason"} == set(resolved["why"][0])


def test_every_step_is_a_line_of_metrics(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512]
    assert all(line["tps"] > 0 and line["mfu"] > 0 and len(line["mtp_loss"]) == 1 for line in lines)


def test_tensorboard_reads_the_losses_back(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert "held_out/bits_per_byte" in events.Tags()["scalars"]


def test_exported_model_evaluates_like_the_run(run: Path, data: Path) -> None:
    recorded = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    words = ("evaluate", run / "hf", "--data", data, "--seq-len", "32", "--max-tokens", "300", "--json")
    found = json.loads(succeed(*words))
    assert found["loss"] == pytest.approx(recorded["loss"], rel=2e-3)  # the export is bfloat16
    assert (found["tokens"], found["bytes"]) == (recorded["tokens"], recorded["bytes"])
    assert "bits_per_byte" in succeed(*words[:-1])


def test_step_of_a_run_converts_to_what_the_run_exports(run: Path, tmp_path: Path) -> None:
    output = succeed("convert", run / "checkpoint" / "step-4", tmp_path / "hf")
    assert "in 1 file, bf16" in output
    names = {path.name for path in (run / "hf").iterdir()}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (run / "hf" / name).read_bytes(), name
    assert "already holds a checkpoint" in refusal("convert", run / "checkpoint" / "step-4", tmp_path / "hf")


def test_finished_run_goes_on_with_more_steps_and_without_naming_a_recipe(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "hf" / "model.safetensors").read_bytes()
    again = succeed("train", "--run", copy, "--resume", "--set", "log.tensorboard=false")
    assert "train.steps = 4 are done: set more to train on" in again
    more = ("--set", "train.steps=6", "--set", "log.tensorboard=false")
    output = succeed("train", "--run", copy, "--resume", *more)
    assert (copy / "hf" / "model.safetensors").read_bytes() != before
    assert "tokenizer.json" in {path.name for path in (copy / "hf").iterdir()}
    assert not list(copy.glob("hf.*"))
    assert "resumed from step 4 (512 tokens)\n" in output
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    back = succeed("train", "--run", copy, "--resume-step", "4", *more)
    assert "resumed from step 4" in back


def test_timeline_of_a_run_is_drawn_and_draw_schedule_reads_its_spans(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = settings(
        "log.timeline_every=2", "checkpoint.every=0", "log.pictures=false", "train.global_batch_size=4"
    )
    output = succeed("train", "nano_test", "--run", folder, "--data", data, *words)
    assert f"timeline: {folder / 'pictures' / 'timeline.svg'}" in output
    assert "1f1b, measured" in (folder / "pictures" / "timeline.svg").read_text()
    spans = [json.loads(line) for line in (folder / "spans.jsonl").read_text().splitlines()]
    assert [(span["step"], span["slot"]) for span in spans] == [
        (step, slot) for step in (2, 4) for slot in ("0F0", "0B0", "0F1", "0B1")
    ]
    sizes = ("--ranks", "1", "--microbatches", "2")
    drawn = succeed("draw", "schedule", "1f1b", *sizes, "--measured", folder / "spans.jsonl")
    assert "1f1b, measured" in drawn


def test_profile_writes_a_trace_of_the_steps_that_were_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = settings("checkpoint.every=0", "log.pictures=false")
    output = succeed("train", "nano_test", "--run", folder, "--data", data, "--profile", "2:3", *words)
    assert f"profile: {folder / 'profile' / 'rank-0.json'}" in output
    trace = json.loads((folder / "profile" / "rank-0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = sum("Optimizer" in name or name == "aten::embedding" for name in names)
    assert steps >= 2
    message = refusal("train", "nano_test", "--run", folder, "--data", data, "--profile", "5:3", *words)
    assert "--profile 5:3 names no steps" in message
    message = refusal("train", "nano_test", "--run", folder, "--data", data, "--profile", "9:12", *words)
    assert "--profile 9:12 begins at step 9, but train.steps=4" in message


def test_wandb_that_is_not_installed_is_said_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = settings("log.wandb=sea", "log.pictures=false")
    message = refusal("train", "nano_test", "--run", tmp_path / "run", "--data", data, *words)
    assert "log.wandb=sea needs the wandb package" in message


def test_wandb_gets_the_numbers_of_every_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    logged: list[tuple[int, dict[str, float]]] = []
    run = types.SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: None)
    asked: dict[str, object] = {}
    fake = types.SimpleNamespace(init=lambda **words: asked.update(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    words = settings("log.wandb=sea", "log.pictures=false", "checkpoint.every=0")
    succeed("train", "nano_test", "--run", tmp_path / "first", "--data", data, *words)
    assert (asked["project"], asked["id"], asked["resume"]) == ("sea", "first", "allow")
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    losses = [scalars["train/loss"] for _, scalars in logged if "train/loss" in scalars]
    assert losses == [line["loss"] for line in lines]


def test_dry_run_of_the_largest_recipe_needs_neither_data_nor_a_folder() -> None:
    output = succeed("train", "deepseek_v3_2048_h800", "--dry-run")
    assert "682,636,487,424 parameters on 2048 ranks = pp 16 x dp 128 x cp 1 x tp 1" in output
    assert "a step: 4096 rows of 4,096 = 16,777,216 tokens at first" in output
    assert "0: 0-3, embed; 15: 60, embed, head, mtp" in output
    assert "dualpipe, 16 ranks, 32 microbatches" in output
    assert "bubble 12.7% of the time" in output


def test_dry_run_cuts_nothing_at_80_columns() -> None:
    words = ["train", "deepseek_v3_2048_h800", "--dry-run"]
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, words).output
    assert "1920-2047 4.934 B    9.19 GiB 1.11 GiB 18.4 GiB  1.11 GiB 30.9 GiB    60.7 GiB" in output
    assert "1920-2047 0: 0-3, embed; 15: 60, embed, head, mtp" in output


def test_dry_run_says_how_fast_as_the_planner_does() -> None:
    output = succeed("train", "v2_lite_8xh100", "--dry-run", "--hardware", "h100")
    outlook = Outlook.of(recipes.get("v2_lite_8xh100"), None)
    priced = step(Candidate.of(outlook.config, outlook.rows), machines.get("h100"))
    assert f"{priced.tokens_per_second:,.0f} tokens/s" in output
    assert "without Muon's products" in succeed(
        "train", "moonlight_16b_8xh100", "--dry-run", "--hardware", "h100"
    )


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_setting_is_listed_as_it_would_be_set(recipe: str) -> None:
    lines = succeed("train", recipe, "--list-settings").splitlines()
    config = recipes.get(recipe)
    assert len(lines) == len(flatten(config))
    assert apply(config, lines) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("v2_lite_8xh100", "--dry-run", "--ranks", "12"), "= 8 ranks, but 12 were started"),
        (("v2_lite_8xh100", "--ranks", "8"), "--ranks and --hardware are of --dry-run"),
        (("v2_lite_8xh100", "--hardware", "h100"), "--ranks and --hardware are of --dry-run"),
        (("v2_lite_8xh100",), "no folder was named. Pass --run DIR"),
    ],
)
def test_dry_run_and_ranks_that_contradict_are_refused(words: tuple[str, ...], expected: str) -> None:
    assert expected in refusal("train", *words)


def test_run_folder_in_use_is_not_overwritten(run: Path, data: Path) -> None:
    message = refusal("train", "nano_test", "--run", run, "--data", data, *settings())
    assert "already holds step 4. Pass --resume to go on" in message


@pytest.mark.parametrize("text", ['{"config": {', "[]", "{}", '{"config": {"trian": 1}}'])
def test_damaged_config_of_a_run_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.json").write_text(text)
    message = refusal("train", "--run", tmp_path, "--resume")
    assert f"{tmp_path / 'resolved.json'} cannot be read: " in message
    assert "Name the recipe and its --set settings beside --resume" in message


def test_python_stdlib_is_a_corpus(tmp_path: Path) -> None:
    words = ("data", "tokenizer", "--python-stdlib", "--include", "json", "--vocab-size", "400")
    assert re.match(r"400 tokens from \d documents", succeed(*words, "--out", tmp_path))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "nano-tests", "--run", "x", "--data", "x"), "Did you mean 'nano_test'?"),
        (("train", "--run", "nowhere", "--data", "x"), "no recipe was named. Known: tiny_cpu"),
        (("train", "--run", "nowhere", "--resume"), "nowhere has no resolved.json"),
        (("train", "nano_test", "--run", "x"), "no data was named. Pass --data DIR"),
        (("train", "nano_test", "--run", "x", "--data", "nowhere"), "nowhere is no dataset"),
        (("train", "nano_test", "--runs", "x"), "No such option"),
        (("train", "nano-tests"), "Did you mean 'nano_test'?"),
        (("train", "finetune", "--run", "x", "--data", "x"), "Pass --init-from DIR"),
        (("train", "nano_test", "--model", "nonesuch", "--dry-run"), "unknown model 'nonesuch'"),
        (("train", "nano_test", "--model", "nano", "--init-from", "x", "--dry-run"), "each name a model"),
        (("train", "nano_test", "--dry-run", "--set", "layout.pp_degree=0"), "layout.pp_degree=0 is not"),
        (("train", "nano_test", "--dry-run", "--set", "log.every=-1"), "log.every=-1 is below 0"),
        (("train", "nano_test", "--dry-run", "--set", "loss.mtp_weight=-1"), "-1.0 in '-1' is below 0"),
        (("train", "nano_test", "--dry-run", "--set", "train.timeout_s=0"), "timeout_s=0.0 is not above"),
        (
            ("train", "nano_test", "--run", "x", "--data", "x", "--set", "train.lrr=1"),
            "Did you mean 'train.lr'?",
        ),
        (
            ("train", "nano_test", "--run", "x", "--data", "x", "--set", "train.lr=fast"),
            "'fast' is not a finite number",
        ),
        (("data", "build", "nowhere", "--tokenizer", "x", "--out", "y"), "has no tokenizer.json"),
        (("data", "tokenizer", "nowhere", "--out", "y"), "nowhere does not exist"),
        (("data", "tokenizer", "--out", "y"), "0 sources were named"),
        (("data", "check", "nowhere"), "nowhere is no dataset"),
        (("evaluate", "nowhere", "--data", "nowhere"), "nowhere is no dataset"),
    ],
)
def test_wrong_words_are_answered_with_a_remedy(
    words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(*words)
    assert list(tmp_path.iterdir()) == []


def test_error_ends_the_command_with_a_message_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benthic", "train", "nano_test", "--run", "x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: no data was named.")


def test_file_that_cannot_be_written_is_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benthic", "draw", "schedule", "1f1b", "--svg", "nowhere/a.svg"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere/a.svg: No such file or directory.")


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "x", "--data", "x", "--device", "tpu"),
        ("evaluate", "x", "--data", "x", "--max-tokens", "-1"),
        ("calibrate", "--device", "tpu"),
        ("data", "build", "x", "--tokenizer", "x", "--out", "x", "--shard-tokens", "0"),
    ],
)
def test_values_that_an_option_does_not_have_are_usage_errors(words: tuple[str, ...]) -> None:
    assert "Invalid value for" in refusal(*words)


def test_tokenizer_that_exists_is_not_overwritten(data: Path, text: Path) -> None:
    words = ("data", "tokenizer", text, "--out", data / "tokenizer", "--vocab-size", "270")
    assert "holds a tokenizer already. Choose another --out" in refusal(*words)


def test_threads_below_one_are_refused(data: Path, tmp_path: Path) -> None:
    words = ("train", "nano_test", "--run", tmp_path / "run", "--data", data)
    assert "train.threads=0 is below 1" in refusal(*words, *settings("train.threads=0"))


def test_any_preset_can_be_trained_by_any_recipe() -> None:
    output = succeed("train", "nano_test", "--model", "deepseek-v2-lite", "--dry-run")
    assert "deepseek-v2-lite: 15,706,484,224 parameters" in output


def test_data_of_a_larger_tokenizer_is_refused_with_both_numbers(data: Path, tmp_path: Path) -> None:
    words = ("train", "nano_test", "--run", tmp_path / "run", "--data", data)
    message = refusal(*words, *settings("model.vocab_size=268", "train.global_batch_size=3"))
    assert "2 settings cannot be used" in message
    assert "has 270 tokens, but model.vocab_size=268" in message
    assert "train.global_batch_size=3 is no multiple of train.local_batch_size=2" in message
    assert not (tmp_path / "run").exists()


def test_changed_shard_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shard = copy / "train-00000.bin"
    shard.write_bytes(b"\x07" + shard.read_bytes()[1:])
    message = refusal("train", "nano_test", "--run", tmp_path / "run", "--data", copy, *settings())
    assert "train-00000.bin has SHA-256" in message


def test_document_longer_than_the_context_is_split_and_trains(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("deep water " * 3000, encoding="utf-8")
    tok, out = tmp_path / "tok", tmp_path / "data"
    succeed("data", "tokenizer", tmp_path / "long.txt", "--out", tok, "--vocab-size", "265")
    succeed("data", "build", tmp_path / "long.txt", "--tokenizer", tok, "--out", out, "--held-out", "0")
    output = succeed(
        "train", "nano_test", "--run", tmp_path / "run", "--data", out, *settings("train.steps=2")
    )
    assert "step:     2" in output
    assert "held out" not in output


def test_exported_model_is_fine_tuned_on_conversations(run: Path, tmp_path: Path) -> None:
    rows = (
        [{"role": "user", "content": f"sand {n}"}, {"role": "assistant", "content": "silt " * n}]
        for n in range(1, 20)
    )
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    options = ("--tokenizer", run / "hf", "--held-out", "0.3", "--max-tokens", "64")
    built = succeed("data", "chat", chats, *options, "--out", tmp_path / "data")
    assert "conversations left out: no reply ends within 64 tokens" in built
    steps = ("train.steps=3", "train.warmup_steps=1", "train.seq_len=64", "train.global_batch_size=2")
    words = [word for setting in (*steps, "device=cpu", "train.threads=1") for word in ("--set", setting)]
    where = ("--init-from", run / "hf", "--data", tmp_path / "data", "--run", tmp_path / "tuned")
    output = succeed("train", "finetune", *where, *words)
    assert f"weights from {run / 'hf'}" in output
    assert "data.packing = whole" in output
    assert (tmp_path / "tuned" / "hf" / "config.json").is_file()
    resolved = json.loads((tmp_path / "tuned" / "resolved.json").read_text())["config"]
    assert resolved["model"]["hidden_size"] == 32
    chats.write_text('{"messages": []}\n', encoding="utf-8")
    assert f"{chats}:1 holds" in refusal("data", "chat", chats, *options, "--out", tmp_path / "none")


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [10.0]), (None, [])])
def test_only_the_first_rank_of_a_host_says_at_once_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, waits: list[float]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("benthic.cli.train.time.sleep", waited.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert "no folder was named" in refusal("train", "nano_test")
    assert waited == waits


def test_evaluate_of_a_run_names_its_model(run: Path, data: Path) -> None:
    assert f"The run's model is in {run / 'hf'}." in refusal("evaluate", run, "--data", data)
