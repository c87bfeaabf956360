"""Which rates two fleets are offered, and which of them is said to win: `benchmarks/disaggregate.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "disaggregate.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, imported as it is run: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("disaggregate", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "disaggregate", module)
        spec.loader.exec_module(module)
        yield module


def rows(capacity: float, rate: float, fleet: str = "1P1D", spread: float = 0.0) -> list[dict]:
    """Two seeds of a server that meets its targets up to `capacity`, then for ever fewer requests."""
    return [
        {
            "fleet": fleet,
            "workload": "w",
            "rate": rate,
            "seed": seed,
            "attainment": max(0.0, min(1.0, 1.0 - (rate - capacity - spread * seed) / capacity)),
        }
        for seed in (0, 1)
    ]


def test_rates_climb_until_one_fails_and_the_gap_is_halved_twice(script: ModuleType) -> None:
    offered = []

    def offer(rate: float) -> list[dict]:
        offered.append(rate)
        return rows(11.0, rate)

    found = script.climb((4.0, 8.0, 16.0, 32.0), offer)
    assert offered == [4.0, 8.0, 16.0, 12.0, 14.0]
    assert [row["rate"] for row in found] == [4.0] * 2 + [8.0] * 2 + [12.0] * 2 + [14.0] * 2 + [16.0] * 2


def test_a_call_that_was_cut_short_goes_on_from_its_file(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setenv("BENTHIC_COMMIT", "a" * 40)
    cut = script.Found.at(file, {"seconds": 12.0})
    for run in rows(5.0, 4.0):
        cut.add(run)
    kept = script.Found.at(file, {"seconds": 12.0})
    assert kept.runs == rows(5.0, 4.0)
    assert kept.run("1P1D", "w", 4.0, 1) == rows(5.0, 4.0)[1]
    assert kept.run("1P1D", "w", 8.0, 1) is kept.run("2 colocated", "w", 4.0, 1) is None
    kept.finish("1P1D", "w")
    assert "requests/s per GPU" not in file.read_text()  # one fleet decides nothing
    kept = script.Found.at(file, {"seconds": 12.0})
    for run in rows(9.0, 4.0, "2 colocated") + rows(9.0, 16.0, "2 colocated"):
        kept.add(run)
    assert "requests/s per GPU" not in file.read_text()  # nor does a part of the other
    kept.finish("2 colocated", "w")
    assert "requests/s per GPU" in file.read_text()
    with pytest.raises(ValueError, match=r"seconds 12.0, now 20.0: use another --out"):
        script.Found.at(file, {"seconds": 20.0})
    monkeypatch.setenv("BENTHIC_COMMIT", "b" * 40)
    with pytest.raises(ValueError, match=r"aaaa.*bbbb.*--out"):
        script.Found.at(file, {"seconds": 12.0})


def test_the_side_wins_whose_worst_seed_beats_the_best_of_the_other(script: ModuleType) -> None:
    def measured(fleet: str, capacity: float, spread: float) -> list[dict]:
        return script.climb((4.0, 8.0, 16.0, 32.0), lambda rate: rows(capacity, rate, fleet, spread))

    clear = script.summarised("w", measured("1P1D", 20.0, 1.0) + measured("2 colocated", 10.0, 1.0))
    assert clear["winner"] == "1P1D"
    assert 1.8 < clear["ratio"] < 2.2
    assert clear["verdict"].startswith("w: 1P1D wins: 1P1D ")
    close = script.summarised("w", measured("1P1D", 10.2, 1.0) + measured("2 colocated", 10.0, 1.0))
    assert close["winner"] is None
    assert "neither wins" in close["verdict"]


def test_a_run_is_counted_under_other_targets_too(script: ModuleType) -> None:
    run = {
        "rate": 4.0,
        "ttfts": [0.2, 0.2, 0.7, None],
        "e2els": [0.2 + 0.011 * 10, 0.2 + 0.024 * 10, 0.8, None],
        "output_lens": [11, 11, 11, 0],
        "itls": [[0.1], [], [], []],
    }
    found = script.counted(run, 600.0)
    assert found.keys() == {"rate", "attained_at"}, "times of requests are left out"
    assert found["attained_at"] == {
        "10.0": 0.0, "12.5": 0.25, "15.0": 0.25, "20.0": 0.25, "25.0": 0.5, "30.0": 0.5, "40.0": 0.5
    }  # fmt: skip


def test_goodput_is_summed_up_under_every_target(script: ModuleType) -> None:
    def measured(fleet: str, tight: float, loose: float) -> list[dict]:
        shares = {str(tpot): {10.0: tight, 30.0: loose}.get(tpot, loose) for tpot in script.TPOTS}
        return [
            each | {"attained_at": shares if each["rate"] > 4.0 else dict.fromkeys(shares, 1.0)}
            for rate in (4.0, 8.0)
            for each in rows(9.0, rate, fleet)
        ]

    found = script.summarised("w", measured("1P1D", 0.95, 0.95) + measured("2 colocated", 0.8, 1.0))
    assert found["by_tpot_ms"]["10.0"] == {"1P1D": 4.0, "2 colocated": pytest.approx((4 + 0.5 * 4) / 2)}
    assert found["by_tpot_ms"]["30.0"] == {"1P1D": 4.0, "2 colocated": 4.0}


def test_a_side_that_met_its_targets_at_every_rate_has_a_lower_bound_and_no_ratio(script: ModuleType) -> None:
    def measured(fleet: str, capacity: float) -> list[dict]:
        return script.climb((4.0, 8.0), lambda rate: rows(capacity, rate, fleet))

    found = script.summarised("w", measured("1P1D", 5.0) + measured("2 colocated", 90.0))
    assert found["lower_bounds"] == ["2 colocated"]
    assert found["ratio"] is None
    assert found["winner"] == "2 colocated"
    assert "2 colocated >= 4.00" in found["verdict"]
