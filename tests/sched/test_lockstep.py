"""What follows from the intents of all ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benthic.sched.lockstep import MODEL, Intent, conclude

INTENTS = st.lists(
    st.builds(
        lambda rows, size, queries, module, working: Intent(
            rows=rows,
            size=max(size, rows) if size else 0,
            queries=queries,
            working=working or bool(rows),
            module=module,
            first=rows // 2 if module == MODEL else 0,
            large=rows > 4,
        ),
        st.integers(0, 9),
        st.integers(0, 16),
        st.integers(1, 3),
        st.integers(MODEL, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(INTENTS)
def test_a_recorded_pass_is_replayed_only_when_all_that_have_rows_have_one(intents) -> None:
    turn = conclude(intents)
    running = [intent for intent in intents if intent.rows and intent.module == turn.module]
    if turn.size:
        assert all(intent.size for intent in running)
        assert turn.size == max(intent.size for intent in intents if intent.joins(turn))
    elif running:
        assert not all(intent.size for intent in running)
        assert all(intent.joins(turn) for intent in running)


@given(INTENTS)
def test_every_rank_runs_something_or_none_does(intents) -> None:
    turn = conclude(intents)
    assert bool(turn.rows) == any(intent.rows for intent in intents)
    if turn.rows:
        assert turn.module == max(intent.module for intent in intents if intent.rows)
        assert any(intent.joins(turn) for intent in intents)
        assert turn.rows == tuple(i.rows if i.joins(turn) else 1 for i in intents)
        assert turn.working


@given(INTENTS)
def test_all_run_in_halves_when_all_can_and_one_has_many_rows(intents) -> None:
    turn = conclude(intents)
    running = [intent for intent in intents if intent.rows and intent.joins(turn)]
    pays = turn.module == MODEL and any(intent.rows > 4 for intent in running)
    assert bool(turn.halves) == (pays and not turn.size and all(intent.rows > 1 for intent in running))
    for first, second, intent in zip(*turn.halves, intents, strict=True) if turn.halves else ():
        assert (first, second) == (
            (intent.first, intent.rows - intent.first) if intent.joins(turn) else (1, 1)
        )


@given(INTENTS)
def test_nobody_waits_for_more_turns_than_there_are_numbers_of_queries(intents) -> None:
    """Those that ran come again at once with the same rows: the worst that they can do to the others."""
    intents = [intent._replace(module=MODEL) for intent in intents]
    waiting = {rank for rank, intent in enumerate(intents) if intent.rows}
    for _ in range(4):
        turn = conclude(intents)
        waiting -= {rank for rank, intent in enumerate(intents) if intent.joins(turn)}
        intents = [each._replace(waited=0 if each.joins(turn) else each.waited + 1) for each in intents]
    assert not waiting, "three numbers of queries take three turns"


def test_turns_go_on_while_any_rank_works_and_are_over_when_all_leave() -> None:
    idle, busy, leaving = Intent(), Intent(working=True), Intent(leaving=True)
    assert conclude([idle, busy]).working
    assert not conclude([idle, idle]).working
    assert not conclude([leaving, idle]).over
    assert conclude([leaving, leaving]).over
