"""Measured spans become a timeline of the table that was run, or say why they are none."""

from __future__ import annotations

import json

import pytest
from any_schedule import tables
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError, DataError, ScheduleError
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.sched.pipeline.spans import Span, measured, median_costs, read_spans, write_spans
from benthic.sched.pipeline.table import parse_slot


def spans_of(timeline, *, clock=0.0, step=0):
    return [
        Span(rank, t.slot, clock + t.start, clock + t.end, step)
        for rank, row in enumerate(timeline.slots)
        for t in row
    ]


@given(table=tables(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_simulated_run_written_shuffled_and_read_is_itself(table, data):
    timeline = simulate(table, Costs(forward=1, backward=3, input=1, overlap=lambda f, b: f + b - 0.5))
    lines = data.draw(st.permutations(write_spans(spans_of(timeline)).splitlines(keepends=True)))
    assert measured(table, read_spans("".join(lines))) == timeline


def test_a_line_is_rank_slot_start_end_and_step():
    text = write_spans([Span(2, parse_slot("3F7|4B2"), 0.5, 0.75, 40)])
    assert json.loads(text) == {"rank": 2, "slot": "3F7|4B2", "start": 0.5, "end": 0.75, "step": 40}
    assert text.count("\n") == 1


def test_time_starts_with_the_first_slot_of_the_last_step_or_of_the_one_asked_for():
    table = build("1f1b", 2, 3)
    early, late = (simulate(table, Costs(forward=cost)) for cost in (2.0, 1.0))
    spans = [*spans_of(early, clock=1000.0, step=5), *spans_of(late, clock=2000.0, step=6)]
    assert measured(table, spans) == late
    assert measured(table, spans, step=5) == early


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hello", "line 2 of the spans, 'hello', is none"),
        ('{"rank": 0, "slot": "0F0", "start": 1}', "KeyError"),
        ('{"rank": 0, "slot": "0F0", "start": 2, "end": 1}', "ends at 1.0, before it starts at 2.0"),
        ("[1, 2]", "line 2 of the spans"),
    ],
)
def test_a_line_that_is_no_span_is_named(line, words):
    good = '{"rank": 0, "slot": "0F0", "start": 1, "end": 2}\n'
    with pytest.raises(DataError, match=words):
        read_spans(good + line)


def test_a_slot_that_is_none_is_named():
    with pytest.raises(ConfigError, match="'F0'"):
        read_spans('{"rank": 0, "slot": "F0", "start": 1, "end": 2}')


def test_a_run_of_another_schedule_is_refused_at_the_first_slot_that_differs():
    spans = spans_of(simulate(build("gpipe", 2, 4), Costs()))
    with pytest.raises(ScheduleError, match=r"rank 0 ran 0F2 as slot 2, but table '1f1b' says 0B0"):
        measured(build("1f1b", 2, 4), spans)
    with pytest.raises(ScheduleError, match=r"rank 1 has 7 spans, but table 'gpipe' 8 slots"):
        measured(build("gpipe", 2, 4), spans[:-1])


@given(table=tables(["1f1b", "zb-h1", "zb-v", "interleaved", "dualpipe", "dualpipev"]))
@settings(max_examples=40, deadline=None)
def test_the_medians_of_a_simulated_run_predict_that_run(table):
    costs = Costs(forward=1.0, backward=2.5, input=1.5, weight=1.0, overlap=lambda f, b: 0.75 * (f + b))
    timeline = simulate(table, costs)
    again = simulate(table, median_costs(timeline))
    assert again.makespan == pytest.approx(timeline.makespan)
    assert [again.busy(r) for r in range(table.ranks)] == pytest.approx(
        [timeline.busy(r) for r in range(table.ranks)]
    )


def test_medians_are_taken_stage_by_stage():
    timeline = simulate(build("1f1b", 3, 5), Costs(forward=lambda s: 1.0 + s, backward=lambda s: 3.0 * s))
    again = simulate(timeline.table, median_costs(timeline))
    assert again == timeline
