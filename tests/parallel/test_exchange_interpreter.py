"""The NVLink exchange without a GPU: kernels interpreted, peers' memory being files that all map."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.interp,
    pytest.mark.dist,
    pytest.mark.timeout(550),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def test_interpreted_exchange_between_processes_equals_the_all_to_all_one():
    checks = Path(__file__).with_name("exchange_checks.py")
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    where = os.pathsep.join([*sys.path, str(checks.parents[1] / "kernels")])
    settings |= {"PYTHONPATH": where, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "members_once", "-W", "ignore"]
    done = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in settings.items()), sys.executable, "-m", "pytest", checks, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
