"""`benthic convert`: types, shards, companions, refusals, and how little memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benthic.cli import main
from benthic.cli.convert import parse_size
from benthic.errors import CheckpointError, ConfigError, NotACheckpointError
from benthic.model.checkpoint import load_pretrained, save_pretrained
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.spec import presets
from benthic.spec.totals import checkpoint_tensors

RUN = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
NANO = presets.get("nano")


def nano() -> DeepSeek:
    model = DeepSeek(NANO)
    initialise(model, 0)
    return model


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    save_pretrained(nano(), folder, dtype=torch.float32, config_extra={"seq_aux": True})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_bytes(b"not a weight")
    return folder


def convert(*arguments):
    return RUN.invoke(main.app, ["convert", *map(str, arguments)])


def states(*folders):
    return [load_pretrained(folder).state_dict() for folder in folders]


@pytest.mark.parametrize(("dtype", "fp8"), [("bf16", False), ("fp8", True)])
def test_converted_weights_equal_those_exported_directly(source, tmp_path, dtype, fp8):
    result = convert(source, tmp_path / "out", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"in 1 file, {dtype}" in result.output
    save_pretrained(nano(), tmp_path / "direct", fp8=fp8)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert ours.keys() == direct.keys()
    for name, tensor in direct.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_there_and_back_loses_only_what_the_narrow_type_cannot_hold(source, tmp_path):
    assert convert(source, tmp_path / "fp8", "--dtype", "fp8").exit_code == 0
    assert convert(tmp_path / "fp8", tmp_path / "fp32", "--dtype", "fp32").exit_code == 0
    assert convert(tmp_path / "fp32", tmp_path / "again", "--dtype", "fp8").exit_code == 0
    config = json.loads((tmp_path / "fp32" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    narrow = load_pretrained(tmp_path / "fp8", dtype=torch.float32).state_dict()
    wide, again = states(tmp_path / "fp32", tmp_path / "again")
    for name, tensor in narrow.items():
        assert torch.equal(wide[name], tensor), name
        # Requantising a quantised block moves its values by at most a rounding of the scale.
        torch.testing.assert_close(again[name].float(), tensor, rtol=2**-7, atol=1e-7)


def test_fp8_tensors_are_copied_bit_by_bit(source, tmp_path):
    convert(source, tmp_path / "one", "--dtype", "fp8")
    convert(tmp_path / "one", tmp_path / "two", "--dtype", "fp8", "--max-shard-size", "60kB")
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = {}
    for file in (tmp_path / "two").glob("*.safetensors"):
        two |= load_file(file)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)), name


def test_tokenizer_and_config_fields_travel_along_and_pickles_do_not(source, tmp_path):
    convert(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {**before, "torch_dtype": "bfloat16"}
    assert after["seq_aux"] is True


def test_mtp_layers_can_be_left_out(source, tmp_path):
    assert convert(source, tmp_path / "out", "--no-mtp", "--dtype", "fp32").exit_code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) == {t.name for t in checkpoint_tensors(replace(NANO, num_nextn_predict_layers=0))}
    assert load_pretrained(tmp_path / "out").config.num_nextn_predict_layers == 0


def test_absent_copies_of_the_embedding_and_head_are_written_from_the_originals(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    copies = [t.name for t in checkpoint_tensors(NANO) if t.duplicate]
    save_file({name: t for name, t in tensors.items() if name not in copies}, source / "model.safetensors")
    convert(source, tmp_path / "out", "--dtype", "fp32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in copies:
        assert torch.equal(stored[name], tensors[name])


def test_wrong_folders_are_refused(source, tmp_path):
    assert isinstance(convert(tmp_path / "no", tmp_path / "out").exception, NotACheckpointError)
    assert "both source and target" in str(convert(source, source).exception)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    refused = convert(source, tmp_path / "taken").exception
    assert isinstance(refused, CheckpointError)
    assert "already holds a checkpoint" in str(refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("2.5G", 25 * 10**8), ("1000", 1000), ("100KB", 10**5)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 apples", "GB", "1e9"])
def test_absurd_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="not a positive size"):
        parse_size(text)


def test_a_folder_of_a_training_run_is_answered_with_what_can_be_converted(tmp_path):
    run = tmp_path / "run"
    for name in ("step-5", "step-10", "step-20.tmp"):
        (run / "checkpoint" / name).mkdir(parents=True)
        (run / "checkpoint" / name / "manifest.json").write_text("{}")
    said = f"`benthic convert {run / 'checkpoint' / 'step-10'} FOLDER` makes one of the run's newest step."
    assert said in str(convert(run, tmp_path / "out").exception)
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    assert f"The run's model is in {run / 'hf'}." in str(convert(run, tmp_path / "out").exception)


def test_memory_stays_far_below_the_size_of_the_checkpoint(tmp_path):
    """A 200 MB float32 checkpoint of many small tensors, converted in a process of its own."""
    config = replace(
        NANO, hidden_size=256, moe_intermediate_size=256, n_routed_experts=64, num_hidden_layers=4
    )
    model = DeepSeek(config)
    initialise(model, 0)
    save_pretrained(model, tmp_path / "source", dtype=torch.float32)
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    code = f"""
import resource, torch
from pathlib import Path
from benthic.model.convert import convert
from benthic.model.export import Format

torch.set_num_threads(1)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak = before = anonymous()
def watch(step):
    global peak
    peak = max(peak, anonymous())

source, out = Path({str(tmp_path / "source")!r}), Path({str(tmp_path / "out")!r})
convert(source, out, Format(torch.bfloat16, fp8=True), progress=watch)
print(peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert size > 150e6
    assert int(done.stdout) < size / 4
