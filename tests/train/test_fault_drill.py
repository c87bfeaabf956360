"""Ranks of a torchrun job are killed; it ends by itself with the losses of a job that was left alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fault_drill.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, imported as it is run: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("fault_drill", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "fault_drill", module)
        spec.loader.exec_module(module)
        yield module


def left_alone(job: object) -> None:
    """The same command on forked ranks, which need no torchrun and begin at once."""
    ranks = forked.start_ranks(job.words, job.cluster.ranks, job.printed)  # type: ignore[attr-defined]
    for rank in ranks:
        rank.finish(240)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_job_whose_rank_is_killed_in_a_step_has_the_losses_of_an_undisturbed_one(
    script: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    """The restart is torchrun's and goes on from the newest complete checkpoint.

    Kills in a save: of one process in `test_killed.py`, of ranks in the drill below.
    """
    sizes = {"kills": 1, "steps": 10, "every": 3, "seed": 0, "cluster": script.TWO_RANKS}
    found = script.drill(tmp_path, dataset, **sizes, undisturbed=left_alone)
    assert found["losses_equal"]
    assert [kill["during"] for kill in found["kills"]] == ["step"]


@pytest.mark.dist
@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_four_ranks_are_killed_five_times(script: ModuleType, dataset: Path, tmp_path: Path) -> None:
    """As above, with experts and data spread over the ranks."""
    found = script.drill(tmp_path, dataset, kills=5, steps=60, every=5, seed=1)
    assert found["losses_equal"]
    assert len(found["kills"]) == 5


@pytest.mark.multigpu
@pytest.mark.timeout(600)
def test_a_rank_killed_under_nccl_is_restarted_with_the_same_losses(
    script: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    found = script.drill(tmp_path, dataset, kills=2, steps=24, every=4, seed=0, cluster=script.TWO_GPUS)
    assert found["losses_equal"]
