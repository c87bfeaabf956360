"""Simulated bubbles and peaks equal the closed forms, and exports hold every action."""

from __future__ import annotations

import csv
import io
import json
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.sched.pipeline.export import as_csv, perfetto
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, peak_activations, simulate
from benthic.sched.pipeline.table import Action

COST = st.integers(0, 50).map(lambda n: Fraction(n, 7))


@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    ranks=st.integers(1, 9),
    microbatches=st.integers(1, 14),
    forward=COST,
    backward=COST,
)
@settings(max_examples=120, deadline=None)
def test_every_rank_idles_for_p_minus_one_forwards_and_backwards(
    name, ranks, microbatches, forward, backward
):
    timeline = simulate(build(name, ranks, microbatches), Costs(forward=forward, backward=backward))
    bubble = (ranks - 1) * (forward + backward)
    assert timeline.makespan == microbatches * (forward + backward) + bubble
    assert all(timeline.bubble(rank) == bubble for rank in range(ranks))
    if forward + backward:
        assert timeline.bubble_ratio == Fraction(ranks - 1, microbatches)
        assert timeline.bubble_fraction == Fraction(ranks - 1, microbatches + ranks - 1)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_eight_ranks_and_twenty_microbatches_give_the_published_bubbles(name):
    timeline = simulate(build(name, 8, 20), Costs(forward=1, backward=2))
    assert timeline.bubble(0) == 21
    assert timeline.bubble_ratio == 0.35
    assert round(timeline.bubble_fraction, 4) == 0.2593


@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_1f1b_holds_p_minus_r_activations_and_gpipe_all(ranks, microbatches):
    expected = tuple(min(ranks - r, microbatches) for r in range(ranks))
    assert peak_activations(build("1f1b", ranks, microbatches)) == expected
    assert peak_activations(build("gpipe", ranks, microbatches)) == (microbatches,) * ranks


@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    ranks=st.integers(1, 7),
    microbatches=st.integers(1, 9),
    stage_costs=st.lists(st.integers(1, 9), min_size=7, max_size=7),
    transfer=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_no_slot_starts_before_what_it_needs_and_no_rank_does_two_things(
    name, ranks, microbatches, stage_costs, transfer
):
    costs = Costs(forward=stage_costs.__getitem__, backward=lambda s: 2 * stage_costs[s], transfer=transfer)
    timeline = simulate(build(name, ranks, microbatches), costs)
    end = {t.slot.first: t.end for slots in timeline.slots for t in slots}
    for slots in timeline.slots:
        assert all(a.end <= b.start for a, b in pairwise(slots))
        for t in slots:
            kind, stage, batch = t.slot.first
            if kind == "F" and stage:
                assert t.start >= end[Action("F", stage - 1, batch)] + transfer
            if kind == "B":
                assert t.start >= end[Action("F", stage, batch)]
                if stage < ranks - 1:
                    assert t.start >= end[Action("B", stage + 1, batch)] + transfer
    slowest = max(stage_costs[:ranks])
    assert timeline.makespan >= 3 * slowest * microbatches


def test_split_costs_default_to_halves_of_the_backward():
    costs = Costs(forward=1, backward=3, input=1)
    assert costs.of(Action("I", 0, 0)) == 1
    assert costs.of(Action("W", 0, 0)) == 2
    assert Costs(backward=4).of(Action("I", 0, 0)) == 2
    assert Costs(backward=4, weight=1).of(Action("W", 0, 0)) == 1


def test_negative_costs_are_refused():
    with pytest.raises(ConfigError, match="0F0 costs -1"):
        simulate(build("1f1b", 2, 2), Costs(forward=-1))


def test_the_perfetto_trace_holds_every_slot_on_its_ranks_thread():
    timeline = simulate(build("1f1b", 3, 4), Costs(forward=1, backward=2))
    trace = json.loads(perfetto(timeline))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == 3 * 4 * 2
    first = next(e for e in slices if e["name"] == "2B0")
    assert (first["tid"], first["ts"], first["dur"]) == (2, 3000, 2000)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names == {"rank 0", "rank 1", "rank 2"}


def test_the_csv_holds_every_action_with_its_times():
    timeline = simulate(build("gpipe", 2, 3), Costs(forward=1, backward=2))
    rows = list(csv.DictReader(io.StringIO(as_csv(timeline))))
    assert len(rows) == 2 * 3 * 2
    assert rows[0] == {
        "rank": "0",
        "slot": "0",
        "kind": "F",
        "stage": "0",
        "microbatch": "0",
        "start": "0",
        "end": "1",
    }
    assert max(float(row["end"]) for row in rows) == timeline.makespan
