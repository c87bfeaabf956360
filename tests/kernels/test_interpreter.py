"""Every Triton kernel runs in Triton's CPU interpreter and equals its definition (see `kernel_checks.py`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benthic.errors import BackendError
from benthic.kernels import ops

CHECKS = Path(__file__).with_name("kernel_checks.py")
WHAT_RUNS = Path(__file__).with_name("test_what_runs.py")
GROUPS = {
    "row-wise kernels": "norm or swiglu or rope",
    "attention, values and gradients": "test_attention",
    "paged decode and cache": "mla or latent",
    "experts and permutation": "(grouped or permute or copies or rout or rows or gate) and not fp8",
    "FP8 tiles and products": "fp8",
    "E5M6 tiles": "e5m6",
    "losses and gradient sums": "cross_entropy or accumulate or added_weight",
    "the optimizer": "adamw",
}

pytestmark = [
    pytest.mark.interp,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def interpret(*arguments):
    """Run Python with kernels interpreted: Triton reads the switch when imported, so in a new process."""
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_equal_their_definitions(group):
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "-k", GROUPS[group]]
    done = interpret("-m", "pytest", str(CHECKS), *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_check_belongs_to_a_group():
    everything = " or ".join(f"({words})" for words in GROUPS.values())
    done = interpret(
        "-m", "pytest", str(CHECKS), "--collect-only", "-q", "-o", "addopts=", "-k", f"not ({everything})"
    )
    assert "no tests collected" in done.stdout, done.stdout


def test_interpreted_kernels_run_themselves_alone_or_say_why_not():
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "-k", "triton and alone"]
    done = interpret("-m", "pytest", str(WHAT_RUNS), *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_bfloat16_products_are_refused_in_the_interpreter():
    program = """
import torch
from benthic.errors import BackendError
from benthic.kernels import ops
x, w = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(1, 16, 16, dtype=torch.bfloat16)
try:
    ops.grouped_linear(x, w, torch.tensor([4], dtype=torch.int32), impl="triton")
except BackendError as error:
    print(error)
"""
    done = interpret("-c", program)
    assert "interpreter multiplies bfloat16 matrices wrongly" in done.stdout, done.stderr


def test_triton_kernels_are_refused_on_a_plain_cpu():
    x, weight = torch.ones(4, 16), torch.ones(16)
    with pytest.raises(BackendError, match="run on cuda, not cpu"):
        ops.rms_norm(x, weight, 1e-6, impl="triton")
