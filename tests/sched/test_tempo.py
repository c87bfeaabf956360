"""A plan waits for requests as long as the device has something to do, and no longer."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.sched.plans import Prefill, StepPlan
from benthic.sched.tempo import ENOUGH, LATEST, Kind, Tempo

MARGIN_S, HOST_S = 0.002, 0.001


def plan(decodes: int = 4, *chunks: int) -> StepPlan:
    ids = tuple(str(i) for i in range(decodes))
    prefills = tuple(
        Prefill(f"p{i}", 50 + i, 0, length, None, samples=True) for i, length in enumerate(chunks)
    )
    slots, drafts = tuple(range(decodes)), (0,) * decodes
    return StepPlan(
        number=0,
        num_tokens=decodes + sum(chunks),
        decode_ids=ids,
        decode_slots=slots,
        decode_positions=slots,
        decode_drafts=drafts,
        prefills=prefills,
        tables=(),
        events=(),
    )


class Device:
    """Two steps in flight as in the engine; how long the device paused and the host listened before each."""

    def __init__(self) -> None:
        self.tempo = Tempo(MARGIN_S)
        self.now = self.free = 0.0
        self.ends: deque[float] = deque()
        self.paused: list[float] = []
        self.listened: list[float] = []

    def step(self, seconds: float, kind: StepPlan) -> None:
        due = max(self.now, self.tempo.due())
        self.listened.append(due - self.now)
        self.now = due + HOST_S
        self.tempo.launched(kind, due, self.now)
        self.paused.append(max(0.0, self.now - self.free))
        self.free = max(self.now, self.free) + seconds
        self.ends.append(self.free)
        if len(self.ends) == 2:
            self.tempo.waits(self.now)
            self.now = max(self.now, self.ends.popleft())
            self.tempo.landed(self.now)


def test_a_plan_is_due_when_the_host_can_just_make_it() -> None:
    device = Device()
    for _ in range(20):
        device.step(0.02, plan())
    assert device.listened[: ENOUGH + 1] == [0.0] * (ENOUGH + 1)
    assert device.listened[-10:] == pytest.approx([0.02 - HOST_S - MARGIN_S] * 10)
    assert device.paused[1:] == pytest.approx([0.0] * 19)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 0.95 * MARGIN_S)), min_size=30, max_size=80),
    st.tuples(*[st.floats(0.004, 0.05)] * 3),
)
def test_steps_uneven_by_less_than_the_margin_never_let_the_device_pause(steps, least) -> None:
    kinds, device = (plan(4), plan(40), plan(40, 1000)), Device()
    for kind, more in steps:
        device.step(least[kind] + more, kinds[kind])
    assert max(device.paused[1:]) < 1e-9


@settings(max_examples=100, deadline=None)
@given(st.floats(0.006, 0.05), st.floats(0.003, 0.04))
def test_steps_that_become_shorter_at_once_cost_one_pause(long, less) -> None:
    short = max(0.003, long - less)
    device = Device()
    for seconds in [long] * 20 + [short] * 20:
        device.step(seconds, plan())
    pauses = [pause for pause in device.paused[1:] if pause > 1e-9]
    assert len(pauses) <= 1
    assert sum(pauses) <= long - short
    assert device.listened[-1] == pytest.approx(max(0.0, short - HOST_S - MARGIN_S))


def test_steps_that_become_longer_are_waited_for_once_the_shorter_ones_are_forgotten() -> None:
    device = Device()
    for seconds in [0.01] * 20 + [0.03] * (LATEST + 2):
        device.step(seconds, plan())
    assert device.listened[-1] == pytest.approx(0.03 - HOST_S - MARGIN_S)


def test_a_kind_never_seen_is_not_waited_for() -> None:
    device = Device()
    for _ in range(10):
        device.step(0.02, plan(4))
    device.step(0.02, plan(4, 900))
    device.step(0.02, plan(4))
    assert device.listened[-1] == 0.0


def test_a_host_that_is_slower_than_the_device_plans_at_once() -> None:
    device = Device()
    for _ in range(20):
        device.step(0.5 * HOST_S, plan())
    assert not any(device.listened)


def test_kinds_round_sizes_up() -> None:
    assert Kind.of(plan(1)) == Kind.of(plan(8)) == Kind(1, 0)
    assert Kind.of(plan(9, 100, 28)) == Kind(2, 1)
    assert Kind.of(plan(0, 129)) == Kind(0, 2)


@pytest.mark.parametrize("margin_s", [0.0, -0.001, math.inf, math.nan])
def test_a_margin_that_is_none_is_refused(margin_s: float) -> None:
    with pytest.raises(ConfigError, match=f"margin_s = {margin_s}"):
        Tempo(margin_s)
