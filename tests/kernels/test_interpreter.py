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
NAMED = {
    "attention, values and gradients": "test_attention",
    "experts and permutation": "(grouped or permute or copies or rout or rows_are or gate) and not fp8",
}
# What is left is a group too, so that every check belongs to one; each of them costs seconds to start.
REST = f"not ({' or '.join(f'({words})' for words in NAMED.values())})"
CHECKED = {name: f"kernel_checks and ({words})" for name, words in NAMED.items()}
GROUPS = CHECKED | {
    "FP8, rows, paged decode, the optimizer; each op alone": (
        f"(kernel_checks and {REST}) or (what_runs and triton and alone)"
    )
}

LIMIT_S = 500

pytestmark = [
    pytest.mark.interp,
    pytest.mark.timeout(LIMIT_S + 50),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def interpret(words):
    """Run tests with kernels interpreted: Triton reads the switch when imported, so in a new process."""
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    where = os.pathsep.join([*sys.path, str(CHECKS.parent)])
    settings |= {"PYTHONPATH": where, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "no:cacheprovider", "-p", "members_once"]
    options = ["-q", "-o", "addopts=", *plugins, "-W", "ignore", "-k", words]
    command = [sys.executable, "-m", "pytest", CHECKS, WHAT_RUNS, *options]
    done = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in settings.items()), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_equal_their_definitions(group):
    interpret(GROUPS[group])


def test_triton_kernels_are_refused_on_a_plain_cpu():
    x, weight = torch.ones(4, 16), torch.ones(16)
    with pytest.raises(BackendError, match="run on cuda, not cpu"):
        ops.rms_norm(x, weight, 1e-6, impl="triton")
