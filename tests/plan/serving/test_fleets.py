"""The planner's fleets: one prefill and one decode instance, or two that do both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import plan_fleets

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines

FLEETS = {
    fleet: plan_fleets.Fleet(fleet, engines.get("benthic"), machines.get("h100"))
    for fleet in plan_fleets.FLEETS
}


def test_prompts_beside_decodes_break_targets_that_a_prefill_instance_keeps():
    apart, together = (FLEETS[name].trial("prefill-heavy", 11.0, 0, 8.0) for name in plan_fleets.FLEETS)
    assert apart.attainment > 0.9 > together.attainment
    assert apart.tpot_p90_s < together.tpot_p90_s


def test_a_prompt_waits_for_the_host_whatever_its_length():
    short, long = (FLEETS["2 colocated"].trial(name, 2.0, 0, 8.0) for name in ("decode-heavy", "balanced"))
    assert short.ttft_p50_s == pytest.approx(long.ttft_p50_s, rel=0.15)


def test_a_climb_ends_where_targets_break_and_halves_the_gap(monkeypatch):
    monkeypatch.setattr(plan_fleets.Fleet, "attained", lambda _, __, rate: 1.0 if rate < 15.0 else 0.5)
    rates = FLEETS["1P1D"].climb("prefill-heavy")
    assert [rate for rate, _ in rates] == [4.0, 8.0, 14.0, 20.0, 17.0, 15.5]
    assert plan_fleets.goodput(rates) == pytest.approx((14.0 + 0.2 * 1.5) / 2)


def test_goodput_is_read_where_the_share_crosses_its_bound():
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.8)]) == pytest.approx(6.0)
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.95)]) == 8.0
    assert plan_fleets.winner({"a": 8.0, "b": 8.2}) == "neither"
    assert plan_fleets.winner({"a": 8.0, "b": 9.0}) == "b"
    assert plan_fleets.kind_of("NVIDIA H100 80GB HBM3") == "h100"
    runs = [{"rate": 8.0, "attainment": share} for share in (1.0, 0.8)]
    assert plan_fleets.by_rate(runs) == [(8.0, 0.9)]
