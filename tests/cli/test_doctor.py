"""`benthic doctor` names what every op runs, and works without torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from benthic.cli.doctor import doctor
from benthic.errors import UnknownFieldError

app = typer.Typer()
app.command()(doctor)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_doctor_names_an_implementation_and_a_reason_for_every_op():
    pytest.importorskip("torch")
    from benthic.kernels import ops

    result = run("--device", "cpu")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ops.IMPLEMENTATIONS)
    assert "native" in result.stdout or "grouped_mm" in result.stdout  # with or without a C compiler
    assert "Ops on cpu in float32" in result.stdout


def test_doctor_names_training_where_it_runs_something_else_than_inference():
    pytest.importorskip("torch")
    from benthic.kernels.native import build_refusal

    result = run("--device", "cpu")
    lines = dict(re.findall(r"^│ (\w+(?: \([\w ]+\))?) +│ (\w+)", result.stdout, flags=re.MULTILINE))
    inference = "torch" if build_refusal() else "native"
    assert (lines["rms_norm"], lines["rms_norm (training)"]) == (inference, "torch_autograd")
    assert (lines["permute"], lines.get("permute (training)", "torch")) == (inference, "torch")
    assert lines.get("grouped_linear (weights in columns)", "grouped_mm") in ("native", "grouped_mm")
    assert "grouped_linear (training)" not in lines
    assert "training too, where no line of its own says otherwise" in result.stdout
    refused = run("--device", "cpu", "--verbose").stdout
    assert "computes no gradients, but autograd records" in refused


def test_doctor_can_explain_a_gpu_from_a_machine_without_one():
    pytest.importorskip("triton")
    result = run("--device", "cuda", "--verbose")
    assert "cudnn" in result.stdout
    assert "all sequences" in result.stdout or "sequences all have one length" in result.stdout


def test_doctor_asks_for_a_known_device_and_dtype():
    pytest.importorskip("torch")
    assert isinstance(run("--device", "cude").exception, UnknownFieldError)
    assert "Did you mean 'bfloat16'" in str(run("--dtype", "bfloat").exception)


def test_doctor_runs_without_torch():
    program = """
import sys, importlib.util
sys.modules["torch"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import typer
from benthic.cli.doctor import doctor
typer.run(doctor)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in done.stdout
