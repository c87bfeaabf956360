"""Tables print as the papers write them, are complete, and corrupted ones are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
from any_schedule import tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError, ScheduleError, UnknownFieldError
from benthic.sched.pipeline.check import channel_problems, check
from benthic.sched.pipeline.lower import Compute, Recv, Send, lower
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, peak_activations, simulate
from benthic.sched.pipeline.table import Action, Slot, Table, parse_slot


def text(rows: str, *, routes: tuple[tuple[int, ...], ...], route_of: tuple[int, ...]) -> Table:
    slots = tuple(tuple(map(parse_slot, row.split())) for row in rows.strip().splitlines())
    return Table(name="by hand", slots=slots, routes=routes, route_of=route_of)


def test_1f1b_of_three_ranks_is_the_textbook_table():
    assert str(build("1f1b", 3, 4)).splitlines() == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_gpipe_runs_all_forwards_first():
    assert str(build("gpipe", 2, 3)).splitlines() == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_slots_are_read_as_they_are_written():
    assert parse_slot("3F17|4B2") == Slot(Action("F", 3, 17), Action("B", 4, 2))
    assert str(parse_slot("12W0")) == "12W0"
    for bad in ("F7", "3X7", "", "1F1|1B2|1B3", "1F-1"):
        with pytest.raises(ConfigError):
            parse_slot(bad)


@given(table=tables(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_table_with_one_slot_dropped_doubled_or_moved_is_caught(table, data):
    rank = data.draw(st.integers(0, table.ranks - 1))
    row = list(table.slots[rank])
    at = data.draw(st.integers(0, len(row) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "move"]))
    rows = [list(r) for r in table.slots]
    slot = rows[rank].pop(at)
    if how == "double":
        rows[rank][at:at] = [slot, slot]
    elif how == "move":
        rows[(rank + 1) % table.ranks].append(slot)
    if how == "move" and table.ranks == 1:
        return
    with pytest.raises(ScheduleError):
        check(replace(table, slots=tuple(map(tuple, rows))))


@given(table=tables(["gpipe", "1f1b"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_backward_before_its_forward_deadlocks_and_is_caught(table, data):
    rank = data.draw(st.integers(0, table.ranks - 1))
    batch = data.draw(st.integers(0, table.microbatches - 1))
    row = list(table.slots[rank])
    f, b = row.index(Slot(Action("F", rank, batch))), row.index(Slot(Action("B", rank, batch)))
    row[f], row[b] = row[b], row[f]
    broken = replace(table, slots=tuple(tuple(row) if r == rank else s for r, s in enumerate(table.slots)))
    with pytest.raises(ScheduleError, match=f"rank {rank} waits at {rank}B{batch} for"):
        check(broken)
    with pytest.raises(ScheduleError, match="deadlocks"):
        simulate(broken, Costs())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0F0 0B0\n0F0", ["0F0 is on rank 1, but its stage is on rank 0"]),
        ("0F0 0B0\n5F0", ["5F0 on rank 1 is outside 2 stages"]),
        ("0F0|0B0\n1F0 1B0", ["overlaps"]),
        ("0F0 0B0\n1F0|1W0 1I0", ["1F0|1W0 on rank 1 overlaps, but only an F with a B or I"]),
        ("0B0|0F0\n1F0 1B0", ["0B0|0F0 on rank 0 overlaps"]),
        ("0F0 0B0\n1F0 1I0", ["0 B, 1 I, 0 W"]),
        ("0F0 0B0\n1F0 1B0 1W0", ["1 B, 0 I, 1 W"]),
        ("0F0 0B0\n1F0 1W0 1I0", ["rank 1 waits at 1W0 for 1I0", "rank 0 waits at 0B0 for 1I0"]),
    ],
)
def test_each_kind_of_corruption_is_named(rows, words):
    with pytest.raises(ScheduleError) as caught:
        check(text(rows, routes=((0, 1),), route_of=(0,)))
    for word in words:
        assert word in str(caught.value)


def test_many_problems_are_cut_to_ten():
    table = replace(build("1f1b", 4, 8), slots=((), (), (), ()))
    with pytest.raises(ScheduleError, match="and 54 more"):
        check(table)


def test_split_backwards_overlaps_and_two_stages_on_a_rank_are_schedules():
    folded = text("0F0 3F0 3I0 3W0 0B0\n1F0 2F0 2I0 1B0 2W0", routes=((0, 1, 1, 0),), route_of=(0,))
    check(folded)
    overlapped = text("0F0 0F1 0B0 0B1\n1F0 1F1|1B0 1B1", routes=((0, 1),), route_of=(0, 0))
    check(overlapped)
    check(text("0F0 0F1 0B0 0B1\n1F0 1F1|1I0 1W0 1B1", routes=((0, 1),), route_of=(0, 0)))
    timeline = simulate(overlapped, Costs(forward=1, backward=2, overlap=max))
    assert [(str(t.slot), t.start, t.end) for t in timeline.slots[1]] == [
        ("1F0", 1, 2),
        ("1F1|1B0", 2, 4),
        ("1B1", 4, 6),
    ]
    assert peak_activations(overlapped) == (2, 2)


def test_one_stage_may_live_on_two_ranks_when_microbatches_enter_from_both_ends():
    both = text("0F0 1F1 1B1 0B0\n0F1 1F0 1B0 0B1", routes=((0, 1), (1, 0)), route_of=(0, 1))
    check(both)
    assert both.rank_of(0, 0) == both.rank_of(1, 1) == 0
    timeline = simulate(both, Costs(forward=1, backward=2))
    assert timeline.makespan == 6
    assert timeline.bubble(0) == timeline.bubble(1) == 0


def test_lowered_programs_send_each_result_once_and_receive_it_before_its_use():
    table = build("1f1b", 4, 6)
    programs = lower(table)
    sends = [op.payload for program in programs for op in program if isinstance(op, Send)]
    receives = [op.payload for program in programs for op in program if isinstance(op, Recv)]
    assert len(sends) == len(set(sends)) == 2 * 3 * 6
    assert sorted(sends) == sorted(receives)
    for rank, program in enumerate(programs):
        known = set()
        for op in program:
            if isinstance(op, Recv):
                known.add(op.payload)
            elif isinstance(op, Compute) and op.slot.first.kind == "F" and rank:
                assert Action("F", rank - 1, op.slot.first.microbatch) in known
    begin = ["receive 0F0 from rank 0", "1F0", "receive 0F1 from rank 0", "send 1F0 to rank 2"]
    assert [str(op) for op in programs[1][:4]] == begin


@given(table=tables(at_least=2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_swapped_receives_are_caught_by_the_channel_check(table, data):
    programs = [list(p) for p in lower(table)]
    rank = data.draw(st.integers(1, table.ranks - 1))
    from_above = [i for i, op in enumerate(programs[rank]) if isinstance(op, Recv) and op.source == rank - 1]
    assume(len(from_above) > 1)
    a, b = data.draw(st.lists(st.sampled_from(from_above), min_size=2, max_size=2, unique=True))
    programs[rank][a], programs[rank][b] = programs[rank][b], programs[rank][a]
    problems = list(channel_problems(tuple(map(tuple, programs))))
    assert any(f"rank {rank - 1} sends rank {rank}" in p for p in problems)
    assert any("waits for ever" in p for p in problems)


def test_two_ranks_that_both_send_first_wait_for_each_other():
    up, down = Action("F", 0, 0), Action("B", 1, 0)
    programs = ((Send(up, 1), Recv(down, 1)), (Send(down, 0), Recv(up, 0)))
    assert len(list(channel_problems(programs))) == 2


def test_an_unknown_schedule_and_impossible_numbers_are_refused():
    with pytest.raises(UnknownFieldError, match="'1f1b'"):
        build("1f1", 4, 8)
    with pytest.raises(ConfigError, match="ranks = 0"):
        build("1f1b", 0, 8)
    with pytest.raises(ConfigError, match="microbatches = -1"):
        build("gpipe", 4, -1)
