"""A prompt's blocks move while it is being computed: two schedulers, fake devices, and things go wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from fake_device import alone, check_empty
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_transfers import CONFIG, Side, Trip, Trouble, journeys

from benthic.errors import AdmissionError, OverloadedError, ServeError
from benthic.sched.batching import BatchingConfig, Request, Scheduler
from benthic.sched.replay import replay

if TYPE_CHECKING:
    from benthic.sched.plans import TransferPlan

PROMPT = tuple(range(1, 31))
SMALL = replace(CONFIG, max_num_batched_tokens=8)


def early(name: str) -> str:
    return f"{name}/early"


@dataclass
class EarlyTrouble:
    """Who is told nothing, how rarely others are, who is dropped when, and what else the owner computes."""

    deaf: set[str]
    rarely: int
    dropped: dict[int, str]
    at_home: list[Trip]


@st.composite
def early_troubles(draw: st.DrawFn) -> EarlyTrouble:
    names = st.sampled_from([str(i) for i in range(6)])
    at_home = []
    for i in range(draw(st.integers(0, 3))):
        prompt = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=12)))
        priority = draw(st.sampled_from([-1, 0]))
        request = Request(request_id=f"home {i}", prompt=prompt, max_tokens=16, priority=priority)
        at_home.append(Trip(request, draw(st.integers(0, 10))))
    deaf, dropped = draw(st.sets(names, max_size=1)), draw(st.dictionaries(st.integers(0, 20), names))
    return EarlyTrouble(deaf, draw(st.integers(1, 3)), dropped, at_home)


@dataclass
class EarlyWorld:
    """Carries requests over; `desk` has the blocks that may be read, by the name of the lease or loan."""

    owner: Side
    reader: Side
    trips: dict[str, Trip]
    trouble: Trouble
    early: EarlyTrouble
    desk: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)
    flying: deque[tuple[int, TransferPlan, tuple[int, ...]]] = field(default_factory=deque)

    def run(self) -> None:
        moment = 0
        while any(trip.end is None for trip in self.trips.values()) or self._busy():
            self._arrive(moment)
            self._compute(float(moment))
            self._tell(moment)
            self._transfer(moment)
            self._decode(float(moment))
            self._abort(moment)
            for lease_id in self.owner.scheduler.leases.due(float(moment)):
                self._release(lease_id)
            moment += 1
            assert moment < 2000, "requests do not end"
        for side in (self.owner, self.reader):
            check_empty(side.scheduler)
            assert not side.scheduler.pulls.early.running
            assert not side.scheduler.leases.lent

    def _busy(self) -> bool:
        sides = (self.owner.scheduler, self.reader.scheduler)
        return bool(self.flying or any(each.has_work or len(each.leases) for each in sides))

    def _arrive(self, moment: int) -> None:
        for trip in self.trips.values():
            if trip.arrival == moment and trip.end is None:
                held = not trip.request.request_id.startswith("home")
                request = replace(trip.request, max_tokens=1, hold=True) if held else trip.request
                try:
                    self.owner.scheduler.add(request, float(moment))
                except OverloadedError:
                    trip.arrival += 1

    def _observe(self) -> None:
        """Before a plan of the owner runs: what it may write to is read no more."""
        leases = self.owner.scheduler.leases
        for name in list(self.desk):
            held = name.removesuffix("/early")
            if held not in leases.lent and leases.get(held) is None:
                del self.desk[name]

    def _compute(self, now: float) -> None:
        plan = self.owner.scheduler.plan(now)
        self._observe()
        rows = self.owner.device.run(plan)
        ended = self.owner.scheduler.commit(plan, rows, now)
        for name, row in zip(plan.sampled_ids, rows, strict=True):
            self.trips[name].output += row
        for event in ended:
            trip = self.trips[event.request_id]
            lease = self.owner.scheduler.leases.get(event.request_id)
            if lease is None:
                assert event.reason == "stop" or event.request_id.startswith("home")
                trip.end = event.reason
                self._drop(event.request_id)
            else:
                self.desk[event.request_id] = lease.blocks
                trip.lease = lease
                self._hand_over(trip, now)

    def _tell(self, moment: int) -> None:
        """Say what is ready; nothing that is not."""
        pulls = self.reader.scheduler.pulls.early
        for name, lease in self.owner.scheduler.leases.lent.items():
            if name in self.early.deaf or moment % self.early.rarely:
                continue
            assert lease.num_tokens < len(self.trips[name].request.prompt)
            self.desk[early(name)] = lease.blocks
            if name in self.ready:
                pulls.grow(early(name), lease.num_tokens)
            else:
                request = Request(request_id=early(name), prompt=self.trips[name].request.prompt)
                pulls.begin(request, lease.num_tokens, float(moment))
            self.ready[name] = lease.num_tokens
        victim = self.early.dropped.get(moment)
        if victim is not None:
            self._drop(victim)

    def _drop(self, name: str) -> None:
        self.reader.scheduler.pulls.early.drop(early(name))

    def _hand_over(self, trip: Trip, now: float) -> None:
        name = trip.request.request_id
        self._drop(name)
        prompt = (*trip.request.prompt, *trip.output)
        request = replace(trip.request, prompt=prompt, prompt_len=-1, max_tokens=trip.request.max_tokens - 1)
        self.reader.scheduler.add(replace(request, pull=name not in self.trouble.silent), now)

    def _transfer(self, moment: int) -> None:
        """Copies are made at once and come back later; only then it is asked whether they counted."""
        for plan in self.reader.scheduler.pulls.plan():
            name = plan.request_id.removesuffix("/early")
            blocks = self.desk.get(plan.request_id, ())
            if name != plan.request_id:
                end = (plan.first + len(plan.blocks)) * self.owner.scheduler.config.block_size
                assert end <= self.ready[name], "a column is read that is not ready"
            for column, block in enumerate(plan.blocks if blocks else (), start=plan.first):
                self.reader.device.pages[block] = list(self.owner.device.pages[blocks[column]])
            self.flying.append((moment + self.trouble.delay, plan, blocks))
        while self.flying and self.flying[0][0] <= moment:
            _, plan, blocks = self.flying.popleft()
            held = bool(blocks) and self.desk.get(plan.request_id) == blocks
            if held and plan.number not in self.trouble.failing_transfers:
                self.reader.scheduler.pulls.commit(plan)
            else:
                self.reader.scheduler.pulls.fail(plan)
            if plan.last:
                self._release(plan.request_id)

    def _release(self, name: str) -> None:
        self.owner.scheduler.leases.release(name)
        self.desk.pop(name, None)
        self.desk.pop(early(name), None)

    def _decode(self, now: float) -> None:
        rows, ended, _ = self.reader.step(now)
        for name, row in rows.items():
            self.trips[name].output += row
        for event in ended:
            assert self.trips[event.request_id].end is None, "a request ended twice"
            self.trips[event.request_id].end = event.reason

    def _abort(self, moment: int) -> None:
        name = self.trouble.aborts.get(moment)
        if name is None:
            return
        found = [side.scheduler.abort(name, float(moment)) for side in (self.owner, self.reader)]
        if any(found) or self.trips[name].arrival >= moment:
            self.trips[name].end = "abort"
        self._drop(name)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(journeys(), early_troubles())
def test_every_request_ends_with_its_own_tokens_whatever_happens_to_its_early_pull(
    journey: tuple[BatchingConfig, BatchingConfig, list[Trip], Trouble], early_trouble: EarlyTrouble
) -> None:
    config, other, trips, trouble = journey
    owner, reader = Side(config), Side(other)
    everyone = {trip.request.request_id: trip for trip in (*trips, *early_trouble.at_home)}
    EarlyWorld(owner, reader, everyone, trouble, early_trouble).run()
    for trip in everyone.values():
        expected, reason = alone(trip.request, config)
        output = tuple(trip.output)
        if trip.end == "abort":
            assert output == expected[: len(output)]
        else:
            assert (output, trip.end) == (expected, reason)
    for side in (owner, reader):
        assert replay(side.lines).totals == side.scheduler.totals
    if not config.enable_prefix_caching:
        assert reader.scheduler.totals.early_blocks == 0


def chunked(owner: Side, steps: int, prompt: tuple[int, ...] = PROMPT) -> None:
    """Let the owner compute some chunks of a held prompt."""
    owner.scheduler.add(Request(request_id="a", prompt=prompt, max_tokens=1, hold=True), 0.0)
    for _ in range(steps):
        owner.step(0.0)


def begun(reader: Side, num_tokens: int, name: str = "a/early") -> tuple[TransferPlan, ...]:
    """An early pull of which so much is ready, and its first transfers."""
    reader.scheduler.pulls.early.begin(Request(request_id=name, prompt=PROMPT), num_tokens, 0.0)
    assert reader.step(0.0)[:2] == ({}, ())
    return reader.scheduler.pulls.plan()


def columns(plans: tuple[TransferPlan, ...]) -> list[tuple[int, int]]:
    return [(plan.first, plan.first + len(plan.blocks)) for plan in plans]


def test_what_is_computed_of_a_held_prompt_is_lent_chunk_by_chunk_and_leased_at_its_end() -> None:
    owner, ready = Side(SMALL), []
    chunked(owner, 0)
    while owner.scheduler.leases.get("a") is None:
        owner.step(0.0)
        ready += [lease.num_tokens for lease in owner.scheduler.leases.lent.values()]
    assert ready == [8, 16, 24]
    assert owner.scheduler.leases.get("a").num_tokens == 30
    assert owner.scheduler.leases.lent == {}
    owner.scheduler.leases.release("a")
    check_empty(owner.scheduler)


def test_a_prompt_of_one_chunk_and_one_that_nobody_holds_are_not_lent() -> None:
    owner = Side(SMALL)
    chunked(owner, 1, PROMPT[:8])
    assert owner.scheduler.leases.lent == {}
    owner.scheduler.add(Request(request_id="b", prompt=PROMPT, max_tokens=1), 0.0)
    owner.step(0.0)
    assert owner.scheduler.leases.lent == {}


def test_a_prompt_that_is_preempted_or_aborted_is_lent_no_more() -> None:
    owner = Side(SMALL)
    chunked(owner, 2)
    assert set(owner.scheduler.leases.lent) == {"a"}
    owner.scheduler._making_room.preempt(owner.scheduler._requests["a"])
    assert owner.scheduler.leases.lent == {}
    owner.scheduler.reset_prefix_cache()
    owner.step(0.0)
    assert owner.scheduler.leases.lent == {}, "its blocks are others now"
    owner.scheduler.abort("a", 0.0)
    chunked(owner, 1)
    owner.scheduler.abort("a", 0.0)
    assert owner.scheduler.leases.lent == {}


def test_what_came_early_is_found_by_its_request_which_pulls_the_rest() -> None:
    reader = Side(CONFIG)
    (first,) = begun(reader, 17)
    assert (first.first, len(first.blocks), first.last) == (0, 4, False)
    reader.scheduler.pulls.commit(first)
    assert reader.scheduler.num_free_blocks == 12, "between transfers it holds nothing"
    reader.scheduler.pulls.early.grow("a/early", 25)
    reader.step(0.0)
    (second,) = reader.scheduler.pulls.plan()
    assert columns((second,)) == [(4, 6)]
    reader.scheduler.pulls.commit(second)
    reader.scheduler.pulls.early.drop("a/early")
    reader.scheduler.add(Request(request_id="a", prompt=(*PROMPT, 7), max_tokens=2, pull=True), 1.0)
    reader.step(1.0)
    assert columns(reader.scheduler.pulls.plan()) == [(6, 8)]
    assert reader.scheduler.totals.early_blocks == 6


def test_columns_that_are_cached_here_are_passed_over() -> None:
    reader = Side(CONFIG)
    reader.scheduler.add(Request(request_id="before", prompt=PROMPT[:13], max_tokens=1), 0.0)
    reader.step(0.0)
    assert columns(begun(reader, 24)) == [(3, 6)]


def test_two_early_pulls_with_one_beginning_bring_it_once() -> None:
    reader = Side(CONFIG)
    (first,) = begun(reader, 16)
    assert begun(reader, 24, "b/early") == ()
    reader.scheduler.pulls.commit(first)
    assert reader.scheduler.has_work
    reader.step(0.0)
    assert columns(reader.scheduler.pulls.plan()) == [(4, 6)]
    assert not reader.scheduler.pulls.early.has_work


def test_its_request_waits_for_what_is_on_its_way_and_for_nothing_else() -> None:
    reader = Side(CONFIG)
    (first,) = begun(reader, 16)
    reader.scheduler.pulls.early.drop("a/early")
    reader.scheduler.add(Request(request_id="a", prompt=(*PROMPT, 7), max_tokens=2, pull=True), 1.0)
    assert reader.step(1.0) == ({}, (), ())
    reader.scheduler.pulls.fail(first)
    reader.step(1.0)
    assert columns(reader.scheduler.pulls.plan()) == [(0, 8)]


def test_early_pulls_leave_the_watermark_free_and_wait_for_nobody() -> None:
    reader = Side(replace(CONFIG, watermark=0.75))
    assert columns(begun(reader, 30)) == [(0, 3)]
    reader.step(0.0)
    assert not reader.scheduler.pulls.early.has_work, "no room is no reason to plan"


def test_early_pulls_use_so_many_blocks_at_a_time_and_those_that_are_awaited_go_first() -> None:
    reader = Side(replace(CONFIG, transfer_blocks=3))
    reader.scheduler.add(Request(request_id="b", prompt=tuple(range(40, 54)), max_tokens=2, pull=True), 0.0)
    plans = begun(reader, 30)
    assert [plan.request_id for plan in plans] == ["b"]
    plans += reader.scheduler.pulls.plan()
    assert [plan.request_id for plan in plans] == ["b", "b", "a/early"]
    assert columns(plans[1:]) == [(3, 4), (0, 2)]
    reader.step(0.0)
    assert columns(reader.scheduler.pulls.plan()) == [(2, 3)]
    reader.step(0.0)
    assert reader.scheduler.pulls.plan() == ()


def test_after_a_transfer_that_failed_nothing_of_an_early_pull_counts() -> None:
    reader = Side(CONFIG)
    (first,) = begun(reader, 16)
    reader.scheduler.pulls.early.grow("a/early", 24)
    reader.step(0.0)
    (second,) = reader.scheduler.pulls.plan()
    with pytest.raises(ServeError, match="the oldest of it in flight is transfer 0"):
        reader.scheduler.pulls.commit(second)
    reader.scheduler.pulls.fail(first)
    reader.scheduler.pulls.early.grow("a/early", 30)
    assert reader.scheduler.num_free_blocks == 10, "blocks stay until their transfer is back"
    reader.scheduler.pulls.commit(second)
    assert reader.scheduler.totals.early_blocks == 0
    check_empty(reader.scheduler)


def test_an_early_pull_begins_once() -> None:
    reader = Side(CONFIG)
    begun(reader, 16)
    with pytest.raises(AdmissionError, match="has begun"):
        begun(reader, 24)


def test_counted_prompts_are_pulled_early_by_the_keys_of_their_blocks() -> None:
    reader = Scheduler(replace(CONFIG, counted=True))
    keys = tuple(range(7))
    request = Request(request_id="a/early", prompt_len=30, block_keys=keys)
    reader.pulls.early.begin(request, 16, 0.0)
    reader.plan(0.0)
    (first,) = reader.pulls.plan()
    reader.pulls.commit(first)
    reader.pulls.early.drop("a/early")
    reader.add(Request(request_id="a", prompt_len=31, block_keys=keys, max_tokens=2, pull=True), 1.0)
    reader.plan(1.0)
    assert columns(reader.pulls.plan()) == [(4, 8)]
