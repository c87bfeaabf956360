"""What holds for every schedule, at any size and any costs."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

from any_schedule import tables
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.sched.pipeline.check import channel_problems, check
from benthic.sched.pipeline.dependencies import needs
from benthic.sched.pipeline.lower import Compute, Recv, Send, lower
from benthic.sched.pipeline.simulate import Costs, peak_activations, simulate

COST = st.integers(1, 40).map(lambda n: Fraction(n, 8))
COSTS = st.builds(
    lambda forward, part, weight, spared, transfer, slope: Costs(
        forward=lambda stage: forward * slope[stage % len(slope)],
        backward=lambda stage: (part + weight) * slope[stage % len(slope)],
        input=lambda stage: part * slope[stage % len(slope)],
        weight=lambda stage: weight * slope[stage % len(slope)],
        overlap=lambda f, b: f + b - spared * min(f, b),
        transfer=transfer,
    ),
    forward=COST,
    part=COST,
    weight=COST,
    spared=st.fractions(0, 1),
    transfer=st.just(Fraction(0)) | COST,
    slope=st.lists(st.integers(1, 5), min_size=1, max_size=5),
)


@given(table=tables())
@settings(max_examples=150, deadline=None)
def test_every_built_table_is_a_schedule(table):
    check(table)


@given(table=tables())
@settings(max_examples=100, deadline=None)
def test_every_action_is_there_once_and_where_its_stage_lives(table):
    counts = Counter(action for _, action in table.actions())
    assert set(counts.values()) == {1}
    assert sum(a.kind == "F" for a in counts) == table.stages * table.microbatches
    assert sum(a.kind in "BI" for a in counts) == table.stages * table.microbatches
    assert {a[1:] for a in counts if a.kind == "I"} == {a[1:] for a in counts if a.kind == "W"}
    assert all(table.rank_of(a.stage, a.microbatch) == rank for rank, a in table.actions())


@given(table=tables(), costs=COSTS)
@settings(max_examples=100, deadline=None)
def test_slots_follow_each_other_and_what_they_need(table, costs):
    timeline = simulate(table, costs)
    assert [[t.slot for t in row] for row in timeline.slots] == [list(row) for row in table.slots]
    end = {a: (t.end, rank) for rank, row in enumerate(timeline.slots) for t in row for a in t.slot.actions}
    for rank, row in enumerate(timeline.slots):
        assert all(before.end <= after.start for before, after in pairwise(row))
        for timed in row:
            for need in (n for a in timed.slot.actions for n in needs(a, table.stages, end)):
                ended, where = end[need]
                assert timed.start >= ended + (0 if where == rank else costs.transfer)


@given(table=tables(), costs=COSTS)
@settings(max_examples=100, deadline=None)
def test_no_step_is_shorter_than_its_busiest_rank_or_its_longest_microbatch(table, costs):
    timeline = simulate(table, costs)
    assert timeline.makespan >= max(timeline.busy(rank) for rank in range(table.ranks))
    alone = sum(costs.of(a) for _, a in table.actions() if a.microbatch == 0 and a.kind == "F")
    assert timeline.makespan > alone
    assert all(0 <= timeline.stall(rank) <= timeline.bubble(rank) for rank in range(table.ranks))


@given(table=tables())
@settings(max_examples=100, deadline=None)
def test_every_activation_is_given_back_and_no_rank_holds_more_than_it_meets(table):
    met = [sum(a.kind == "F" for slot in row for a in slot.actions) for row in table.slots]
    given_back = [sum(a.kind in "BW" for slot in row for a in slot.actions) for row in table.slots]
    assert met == given_back
    assert all(1 <= peak <= count for peak, count in zip(peak_activations(table), met, strict=True))


@given(table=tables())
@settings(max_examples=100, deadline=None)
def test_lowered_programs_run_to_their_end_over_ordered_channels(table):
    programs = lower(table)
    assert not list(channel_problems(programs))
    assert [[op.slot for op in p if isinstance(op, Compute)] for p in programs] == [
        list(row) for row in table.slots
    ]
    sent = Counter(op.payload for p in programs for op in p if isinstance(op, Send))
    received = Counter(op.payload for p in programs for op in p if isinstance(op, Recv))
    crossings = sum(
        table.rank_of(stage, m) != table.rank_of(stage + 1, m)
        for stage in range(table.stages - 1)
        for m in range(table.microbatches)
    )
    assert sent == received
    assert sent.total() == 2 * crossings
    assert set(sent.values()) <= {1}
