"""Ranks of a torchrun job are killed; it ends by itself with the losses of a job that was left alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fault_drill.py"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_whose_ranks_are_killed_in_a_step_and_in_a_save_has_the_losses_of_an_undisturbed_one(
    dataset: Path, tmp_path: Path
) -> None:
    """Every restart is torchrun's, goes on from the newest complete checkpoint and sweeps unfinished ones."""
    spec = importlib.util.spec_from_file_location("fault_drill", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    drill = importlib.util.module_from_spec(spec)
    sys.modules["fault_drill"] = drill
    spec.loader.exec_module(drill)
    found = drill.drill(tmp_path, dataset, kills=2, steps=24, every=4, seed=0)
    assert found["losses_equal"]
    assert [kill["during"] for kill in found["kills"]] == ["step", "save"]
