"""The planner beside measured fleets: one prefill and one decode instance, or two that do both, on H100s."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import plan_fleets

RUNS = json.loads((plan_fleets.RESULTS / "disaggregate.json").read_text())["rows"]["runs"]
OWN = plan_fleets.THEN


def measured(fleet: str, workload: str, rate: float):
    return next(
        run for run in RUNS if (run["fleet"], run["workload"], run["rate"]) == (fleet, workload, rate)
    )


def test_prompts_beside_decodes_break_targets_that_a_prefill_instance_keeps():
    apart = plan_fleets.simulated("1P1D", "prefill-heavy", 14.0, OWN)
    together = plan_fleets.simulated("2 colocated", "prefill-heavy", 14.0, OWN)
    assert apart.attainment > 0.9 > together.attainment
    assert (
        measured("1P1D", "prefill-heavy", 14.0)["attainment"]
        > measured("2 colocated", "prefill-heavy", 14.0)["attainment"]
    )


@pytest.mark.parametrize("fleet", list(plan_fleets.FLEETS))
@pytest.mark.parametrize("rate", [16.0, 32.0])
def test_gaps_of_decode_heavy_fleets_are_foretold_within_ten_percent(fleet, rate):
    found = plan_fleets.simulated(fleet, "decode-heavy", rate, OWN)
    run = measured(fleet, "decode-heavy", rate)
    assert 1e3 * found.tpot_p50_s == pytest.approx(run["median_tpot_ms"], rel=0.1)
    assert found.attainment > 0.9
    assert run["attainment"] > 0.9


def test_goodput_is_read_where_the_share_crosses_its_bound():
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.8)]) == pytest.approx(6.0)
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.95)]) == 8.0
    assert plan_fleets.winner({"a": 8.0, "b": 8.2}) == "neither"
    assert plan_fleets.winner({"a": 8.0, "b": 9.0}) == "b"
