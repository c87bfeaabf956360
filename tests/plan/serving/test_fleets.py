"""The planner's fleets: one prefill and one decode instance, or two that do both."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import plan_fleets

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines

FLEETS = {
    fleet: plan_fleets.Fleet(fleet, engines.get("benthic"), machines.get("h100"), seconds=8.0)
    for fleet in plan_fleets.FLEETS
}


def test_apart_prompts_break_their_target_and_together_decodes_break_theirs():
    apart, together = (FLEETS[name].trial("prefill-heavy", 26.0, 0) for name in plan_fleets.FLEETS)
    assert apart.tpot_p90_s < 0.03 < together.tpot_p90_s
    assert apart.ttft_p90_s > 1.0 > together.ttft_p90_s


def test_a_prompt_in_a_graph_does_not_wait_for_the_host_as_one_without_does():
    graphs = FLEETS["2 colocated"]
    written = replace(graphs, engine=replace(graphs.engine, graph_rows=0))
    names = ("decode-heavy", "balanced")
    short, long = (graphs.trial(name, 1.0, 0).ttft_p50_s for name in names)
    assert short < 0.85 * long
    assert short < 0.5 * written.trial("decode-heavy", 1.0, 0).ttft_p50_s
    short, long = (written.trial(name, 1.0, 0).ttft_p50_s for name in names)
    assert short == pytest.approx(long, rel=0.15), "the host's time is the same for both"


def test_a_climb_ends_where_targets_break_and_halves_the_gap(monkeypatch):
    monkeypatch.setattr(plan_fleets.Fleet, "attained", lambda _, __, rate: 1.0 if rate < 15.0 else 0.5)
    rates = FLEETS["1P1D"].climb("prefill-heavy", 100.0)
    assert [rate for rate, _ in rates] == [10.0, 20.0, 15.0, 12.5]
    assert plan_fleets.goodput(rates) == pytest.approx((12.5 + 0.2 * 2.5) / 2)


def test_a_climb_goes_past_the_most_that_was_offered(monkeypatch):
    monkeypatch.setattr(plan_fleets.Fleet, "attained", lambda _, __, rate: 1.0 if rate < 35.0 else 0.5)
    assert [rate for rate, _ in FLEETS["1P1D"].climb("prefill-heavy", 25.0)] == [10.0, 20.0, 30.0]
    assert [rate for rate, _ in FLEETS["1P1D"].climb("prefill-heavy", 30.0)] == [10.0, 20.0, 30.0]
    assert [rate for rate, _ in FLEETS["1P1D"].climb("prefill-heavy", 31.0)] == [
        10.0,
        20.0,
        30.0,
        40.0,
        35.0,
        32.5,
    ]


def test_apart_wins_where_tokens_must_be_quick_and_loses_where_they_need_not():
    apart, together = (replace(fleet, seconds=4.0).by_tpot("prefill-heavy") for fleet in FLEETS.values())
    for found in (apart, together):
        assert list(found.values()) == sorted(found.values())
    assert apart[10.0] > together[10.0]
    assert apart[40.0] < together[40.0]


def test_a_late_client_says_nothing_of_latencies():
    kept = {
        "fleet": "1P1D",
        "attainment": [1.0, 1.0],
        "client_limited": False,
        **{name: [2.0, 1.0] for name in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "tpot_p90_ms")},
    }
    late = kept | {"client_limited": True, "ttft_p50_ms": [9.0, 1.0]}
    assert [row["rates"] for row in plan_fleets.errors("1P1D", [kept, late])] == [1] * 4
    assert {row["median_error"] for row in plan_fleets.errors("1P1D", [kept, late])} == {1.0}
    assert [row["median_error"] for row in plan_fleets.errors("1P1D", [late])] == [None] * 4


def test_goodput_is_read_where_the_share_crosses_its_bound():
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.8)]) == pytest.approx(6.0)
    assert plan_fleets.goodput([(8.0, 1.0), (16.0, 0.95)]) == 8.0
    assert plan_fleets.winner({"a": 8.0, "b": 8.2}) == "neither"
    assert plan_fleets.winner({"a": 8.0, "b": 9.0}) == "b"
    assert plan_fleets.kind_of("NVIDIA H100 80GB HBM3") == "h100"
    runs = [{"rate": 8.0, "attainment": share} for share in (1.0, 0.8)]
    assert plan_fleets.by_rate(runs) == [(8.0, 0.9)]
