"""How many turns of the decode side's loop lie between a prompt computed elsewhere and its next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from small_engine import request
from small_fleet import Pair, colocated, pair, replace_params

from benthic.sched import pulls

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from benthic.serve.engine import Engine

PROMPT = list(range(20, 51))


class Behind:
    """A copy that a device begins when the newest step launched before it has ended; it takes some looks."""

    def __init__(self, engine: Engine, copy: Callable[[], object], looks: int = 3) -> None:
        self._landed = engine.parts.scheduler._flights
        self._copy: Callable[[], object] | None = copy
        self._step = engine._launched[-1].plan.number if engine._launched else -1
        self._looks = looks

    def ended(self) -> bool:
        self._looks -= self._landed.landed >= self._step
        if self._looks < 0:
            self.wait()
        return self._copy is None

    def wait(self) -> None:
        if self._copy is not None:
            self._copy()
        self._copy = None


def behind_steps(both: Pair) -> None:
    """From the next owner on, the reader copies as a device does."""
    reader, engine = both.reader._reader, both.reader.engine
    enter = reader._enter

    def entered(owner, welcome) -> None:
        enter(owner, welcome)
        start = owner.source.start
        owner.source.start = lambda theirs, ours: Behind(engine, lambda: start(theirs, ours))

    reader._enter = entered


def turns(both: Pair) -> int:
    """Calls of `step` from the arrival of a request, whose blocks are pulled, to its first token there."""
    first_meeting = request("first", range(60, 80), max_tokens=3)
    both.decode(first_meeting, both.prefill(first_meeting))
    asked, other = request("a", PROMPT, max_tokens=6), request("b", range(60, 70), max_tokens=40)
    both.reader.add(other)
    for _ in range(4):
        both.reader.step()
    first = both.prefill(asked)
    both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
    tokens, taken, found = {"a": list(first.tokens), "b": []}, 0, 0
    while both.reader.has_work:
        deltas = both.reader.step()
        taken += 1
        found = found or taken * any(delta.request_id == "a" for delta in deltas)
        for delta in deltas:
            tokens[delta.request_id] += delta.tokens
    assert tokens["a"] == colocated([asked])["a"]
    return found


def test_a_pull_starts_behind_the_step_in_flight_and_is_in_the_plan_after_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulls, "AWAIT_S", 5.0)  # a desk on a busy machine answers late
    with pair(reader={"async_scheduling": True}) as both:
        behind_steps(both)
        # one turn starts the pull, the next one plans the request, and its step lands in the one behind that
        assert turns(both) == 3


def test_a_pull_that_takes_longer_than_the_next_plan_waits_is_in_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulls, "AWAIT_S", 0.0)
    with pair(reader={"async_scheduling": True}) as both:
        behind_steps(both)
        assert turns(both) > 3
