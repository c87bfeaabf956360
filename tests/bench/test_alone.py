"""Which rates one server is offered, and how they are compared: `served_alone.py` and `plan_alone.py`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import disaggregate
import plan_alone
import served_alone

WORKS = {work.name: work for work in served_alone.works_of(small=False)}
LATENCIES = ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "tpot_p90_ms")
MEASURED = ("median_ttft_ms", "p90_ttft_ms", "median_tpot_ms", "p90_tpot_ms")
RECORD = {
    "settings": {"small": False, "seconds": 4.0, "seeds": 1, "max_num_seqs": 512, "fronts": 4},
    "rows": {"runs": []},
}


def walked(capacity: float, *, half_last: bool = False) -> list[float]:
    """Rates in the order in which a server was offered them that meets its targets up to `capacity`."""
    offered = []

    def offer(rate: float) -> list[dict]:
        offered.append(rate)
        return [{"rate": rate, "seed": 0, "attainment": 1.0 if rate <= capacity else 0.6}]

    rows = served_alone.walk((7.0, 14.0), offer, half_last=half_last)
    assert [row["rate"] for row in rows] == sorted(offered)
    return offered


def run(rate: float, share: float, **others: object) -> dict:
    """A served run whose latencies are all 10 ms."""
    kept = {"workload": "balanced", "rate": rate, "seed": 0, "attainment": share, "client_limited": None}
    return kept | dict.fromkeys(MEASURED, 10.0) | others


def row(name: str, told: float, share: float = 1.0, *, late: bool = False) -> dict:
    """A rate whose latencies were all 10 ms."""
    kept = {"workload": name, "fleet": served_alone.FLEET, "client_limited": late, "attainment": [1.0, share]}
    return kept | {latency: [told, 10.0] for latency in LATENCIES}


def test_rates_of_one_server_are_a_tenth_apart_where_its_targets_break():
    assert walked(15.0) == [7.0, 14.0, 15.4]
    assert walked(16.0) == [7.0, 14.0, 15.4, 16.94]
    assert walked(13.0) == [7.0, 14.0, 12.73]
    assert walked(99.0) == [7.0, 14.0, 15.4, 16.94], "no more than four rates"
    assert walked(15.0, half_last=True) == [14.0, 15.4, 7.0]


@pytest.mark.parametrize(
    ("fleet", "like", "gpus"),
    [(served_alone.FLEET, "2 colocated", 1), ("1P1D", "1P1D", 2), ("2 colocated", "2 colocated", 2)],
)
def test_rates_begin_near_what_the_same_or_one_of_two_bore(fleet, like, gpus):
    found = disaggregate.json.loads((plan_alone.RESULTS / "disaggregate.json").read_text())
    for name, work in WORKS.items():
        bore = found["rows"]["summary"][name]["requests_per_second_per_gpu"][like]
        half, start = served_alone.starts(work, fleet, small=False)
        assert start == pytest.approx(gpus * bore, rel=0.1)
        assert half == start / 2


def test_a_rehearsal_begins_where_it_is_told_to():
    small = served_alone.works_of(small=True)[0]
    assert served_alone.starts(small, small=True) == (max(small.rates) / 4, max(small.rates) / 2)


def test_no_run_begins_that_would_end_too_late_and_none_is_repeated(monkeypatch, tmp_path):
    served = []

    def loaded(fleet: str, port: int, work: disaggregate.Workload, rate: float, seed: int, words: object):
        served.append((fleet, port, rate, seed))
        return {"fleet": fleet, "workload": work.name, "rate": rate, "seed": seed, "attainment": 1.0}

    monkeypatch.setattr(served_alone, "loaded", loaded)
    monkeypatch.setattr(served_alone.time, "monotonic", lambda: 150.0)
    found = disaggregate.Found.at(tmp_path / "a.json", {}, "served_alone")
    words = argparse.Namespace(fleet="1P1D", seconds=10.0, seeds=2, until=90.0)
    offers = served_alone.Offers(words, found, 8000, began=100.0)
    assert len(offers(WORKS["decode-heavy"], 20.0)) == 2, "50 s gone, 20 of arrivals, 10 around: 80"
    offers(WORKS["decode-heavy"], 20.0)
    assert served == [("1P1D", 8000, 20.0, 0), ("1P1D", 8000, 20.0, 1)]
    late = replace(offers, began=85.0)
    with pytest.raises(served_alone.OutOfTimeError):
        late(WORKS["decode-heavy"], 30.0)
    assert late(WORKS["decode-heavy"], 20.0), "what is kept takes no time"
    assert late(WORKS["balanced"], 30.0), "half as long"
    record = disaggregate.json.loads((tmp_path / "a.json").read_text())
    assert record["benchmark"] == "served_alone"


def test_every_run_is_foretold_at_its_rate_and_goodput_by_a_walk_of_its_own(monkeypatch):
    fleet = plan_alone.fleet_of(RECORD, "benthic", "h200")
    runs = [run(3.0, 1.0), run(31.0, 0.5)]
    rows = plan_alone.all_rows(RECORD | {"rows": {"runs": runs}}, fleet)
    assert [each["rate"] for each in rows[:2]] == [3.0, 31.0]
    trial = fleet.trial("balanced", 3.0, 0)
    assert rows[0]["ttft_p50_ms"] == [round(1e3 * trial.ttft_p50_s, 1), 10.0]
    assert [each.get("what", each.get("workload")) for each in rows[2:]] == [
        "balanced",
        *LATENCIES,
        "goodput",
    ]
    monkeypatch.setattr(
        plan_alone.Fleet, "trial", lambda _, __, rate, ___: trial._replace(attainment=float(rate < 25.0))
    )
    told = plan_alone.foretold(fleet, "balanced", (14.0, 28.0), 2)
    assert [each["rate"] for each in told] == [14.0] * 2 + [23.14] * 2 + [25.45] * 2 + [28.0] * 2


def test_what_is_simulated_is_what_was_served():
    apart = RECORD | {"settings": RECORD["settings"] | {"fleet": "1P1D"}}
    fleet = plan_alone.fleet_of(apart, "benthic", "h200")
    rows = plan_alone.all_rows(apart | {"rows": {"runs": [run(9.0, 1.0), run(30.0, 0.5)]}}, fleet)
    specs = plan_alone.plan_fleets.specs(fleet.name, fleet.engine, fleet.machine, fleet.sequences)
    assert [spec.role for spec in specs] == ["prefill", "decode"]
    assert [each["of"] for each in rows if "what" in each][:4] == [1] * 4
    assert disaggregate.fleet_words("1P1D") == ["--prefill", "1", "--decode", "1"]
    assert disaggregate.fleet_words(served_alone.FLEET) == []
    fleet = plan_alone.fleet_of(RECORD, "benthic", "h200")
    specs = plan_alone.plan_fleets.specs(fleet.name, fleet.engine, fleet.machine, fleet.sequences)
    assert [spec.role for spec in specs] == ["decode"]
    assert specs[0].batching.max_num_seqs == 512
    assert set(plan_alone.plan_fleets.FLEETS) == {"1P1D", "2 colocated"}, "two GPUs are compared as before"


def test_goodput_is_that_of_the_whole_server_and_a_bound_is_no_error():
    told = [{"rate": 10.0, "seed": 0, "attainment": 1.0}, {"rate": 20.0, "seed": 0, "attainment": 0.8}]
    seen = [run(10.0, 1.0), run(20.0, 0.7)]
    found = plan_alone.goodputs("balanced", told, seen)
    assert found["goodput"] == [15.0, pytest.approx(13.333)]
    assert found["error"] == pytest.approx(0.125)
    assert plan_alone.goodputs("balanced", told, seen[:1])["error"] is None
    assert plan_alone.goodputs("balanced", told[:1], seen)["error"] is None
    late = [seen[0], seen[1] | {"client_limited": "late"}]
    assert plan_alone.goodputs("balanced", told, late)["error"] is None


def test_medians_stand_beside_their_goals():
    rows = [row("a", 11.0), row("b", 10.5), row("c", 8.0), row("d", 99.0, 0.5), row("e", 99.0, late=True)]
    rows += [{"error": -0.02}, {"error": 0.3}, {"error": None}]
    found = {each["what"]: each for each in plan_alone.summary(served_alone.FLEET, rows)}
    assert [found[name]["of"] for name in (*LATENCIES, "goodput")] == [3, 3, 3, 3, 2]
    assert found["ttft_p50_ms"]["median_size"] == pytest.approx(0.1)
    assert [found[name]["met"] for name in (*LATENCIES, "goodput")] == [True, True, False, False, False]
    assert found["goodput"]["largest_size"] == 0.3
    nothing = plan_alone.summary(served_alone.FLEET, [])
    assert [each["met"] for each in nothing] == [None] * 5
    assert "nothing compared" in plan_alone.sentence(nothing[0])
