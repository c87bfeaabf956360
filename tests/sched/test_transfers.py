"""Two schedulers with a fake device each: one prefills, the other pulls and decodes, and things go wrong."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from fake_device import EOS, FakeDevice, alone, check_empty, check_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError, OverloadedError, ServeError
from benthic.sched.batching import BatchingConfig, Finished, Request, Scheduler, Started
from benthic.sched.replay import RecordingScheduler, replay
from benthic.sched.request import Phase

if TYPE_CHECKING:
    from benthic.sched.leases import Lease
    from benthic.sched.plans import TransferPlan

CONFIG = BatchingConfig(
    num_blocks=12,
    block_size=4,
    max_model_len=40,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    lease_seconds=5.0,
)


class Side:
    """One instance: scheduler, device, and the recording of its calls."""

    def __init__(self, config: BatchingConfig) -> None:
        self.lines: list[str] = []
        self.scheduler = RecordingScheduler(config, self.lines.append)
        self.device = FakeDevice(config, random.Random(0))  # noqa: S311 (not a secret)

    def step(self, now: float) -> tuple[dict[str, tuple[int, ...]], tuple[Finished, ...], tuple]:
        plan = self.scheduler.plan(now)
        check_plan(self.scheduler, plan)
        rows = self.device.run(plan)
        ended = self.scheduler.commit(plan, rows, now)
        return dict(zip(plan.sampled_ids, rows, strict=True)), ended, plan.events

    def copy_from(self, owner: Side, lease: Lease, transfer: TransferPlan) -> None:
        for column, block in enumerate(transfer.blocks, start=transfer.first):
            self.device.pages[block] = list(owner.device.pages[lease.blocks[column]])


@dataclass
class Trip:
    """One request on its way through both sides."""

    request: Request
    arrival: int
    lease: Lease | None = None
    output: list[int] = field(default_factory=list)
    end: str | None = None


@dataclass
class Trouble:
    """What goes wrong, by moment."""

    failing_plans: set[int]
    failing_transfers: set[int]
    silent: set[str]
    aborts: dict[int, str]
    delay: int


@st.composite
def journeys(draw: st.DrawFn) -> tuple[BatchingConfig, BatchingConfig, list[Trip], Trouble]:
    block_size = draw(st.sampled_from([1, 3, 4]))
    config = BatchingConfig(
        num_blocks=-(-32 // block_size) + draw(st.integers(0, 6)),
        block_size=block_size,
        max_model_len=32,
        max_num_seqs=draw(st.integers(1, 4)),
        max_num_batched_tokens=draw(st.integers(4, 20)),
        enable_prefix_caching=draw(st.booleans()),
        eos_token_ids=(EOS,),
        lease_seconds=float(draw(st.sampled_from([3, 8, 30]))),
        lease_share=draw(st.sampled_from([0.3, 1.0])),
        transfer_blocks=draw(st.integers(1, 5)),
        host_blocks=draw(st.sampled_from([0, 2, 20])),
    )
    other = replace(config, num_blocks=config.num_blocks + draw(st.integers(0, 5)))
    trunk = tuple(draw(st.lists(st.integers(1, 3), min_size=16, max_size=16)))
    trips = []
    for i in range(draw(st.integers(1, 6))):
        prompt = trunk[: draw(st.integers(0, 16))] + tuple(draw(st.lists(st.integers(1, 3), max_size=8)))
        request = Request(request_id=str(i), prompt=prompt or (1,), max_tokens=draw(st.integers(2, 6)))
        trips.append(Trip(request, draw(st.integers(0, 15))))
    names = [trip.request.request_id for trip in trips]
    trouble = Trouble(
        failing_plans=draw(st.sets(st.integers(0, 25), max_size=1)),
        failing_transfers=draw(st.sets(st.integers(0, 12), max_size=3)),
        silent=draw(st.sets(st.sampled_from(names), max_size=2)),
        aborts=draw(st.dictionaries(st.integers(0, 30), st.sampled_from(names), max_size=2)),
        delay=draw(st.integers(0, 4)),
    )
    return config, other, trips, trouble


class World:
    """Carries requests from the prefill side to the decode side until all have ended."""

    def __init__(self, owner: Side, reader: Side, trips: list[Trip], trouble: Trouble) -> None:
        self.owner, self.reader, self.trouble = owner, reader, trouble
        self.trips = {trip.request.request_id: trip for trip in trips}
        self.flying: deque[tuple[int, TransferPlan, bool]] = deque()
        self.refused = 0

    def run(self) -> None:
        moment = 0
        while any(trip.end is None for trip in self.trips.values()) or self.flying or self._leased():
            self._arrive(moment)
            self._prefill(float(moment))
            self._transfer(moment)
            self._decode(float(moment))
            victim = self.trouble.aborts.get(moment)
            if victim is not None:
                self._abort(victim, float(moment))
            for lease_id in self.owner.scheduler.leases.due(float(moment)):
                self.owner.scheduler.leases.release(lease_id)
            moment += 1
            assert moment < 2000, "requests do not end"
        check_empty(self.owner.scheduler)
        check_empty(self.reader.scheduler)

    def _leased(self) -> bool:
        return len(self.owner.scheduler.leases) > 0

    def _arrive(self, moment: int) -> None:
        for trip in self.trips.values():
            if trip.arrival == moment and trip.end is None:
                try:
                    self.owner.scheduler.add(replace(trip.request, max_tokens=1, hold=True), float(moment))
                except OverloadedError:
                    self.refused += 1
                    trip.arrival += 1

    def _prefill(self, now: float) -> None:
        rows, ended, _ = self.owner.step(now)
        for event in ended:
            trip = self.trips[event.request_id]
            trip.output += rows[event.request_id]
            trip.lease = self.owner.scheduler.leases.get(event.request_id)
            if event.reason == "stop":
                assert trip.lease is None, "a request that is over needs no reader"
                trip.end = "stop"
                continue
            assert trip.lease is not None
            assert trip.lease.num_tokens == len(trip.request.prompt)
            self._hand_over(trip, now)

    def _hand_over(self, trip: Trip, now: float) -> None:
        prompt = (*trip.request.prompt, *trip.output)
        request = replace(trip.request, prompt=prompt, prompt_len=-1, max_tokens=trip.request.max_tokens - 1)
        self.reader.scheduler.add(
            replace(request, pull=trip.request.request_id not in self.trouble.silent), now
        )
        if not self.reader.scheduler._requests[trip.request.request_id].request.pull:
            return  # its reader computes for itself, and its lease runs out

    def _transfer(self, moment: int) -> None:
        for plan in self.reader.scheduler.pulls.plan():
            trip = self.trips[plan.request_id]
            lease = self.owner.scheduler.leases.get(plan.request_id)
            works = lease is not None and plan.number not in self.trouble.failing_transfers
            if works:
                self.reader.copy_from(self.owner, trip.lease, plan)
            self.flying.append((moment + self.trouble.delay, plan, works))
        while self.flying and self.flying[0][0] <= moment:
            _, plan, works = self.flying.popleft()
            if works:
                self.reader.scheduler.pulls.commit(plan)
            else:
                self.reader.scheduler.pulls.fail(plan)
            if plan.last:
                self.owner.scheduler.leases.release(plan.request_id)

    def _decode(self, now: float) -> None:
        plan = self.reader.scheduler.plan(now)
        check_plan(self.reader.scheduler, plan)
        if int(now) in self.trouble.failing_plans:
            self.reader.device.move(plan)
            rows, ended = {}, self.reader.scheduler.fail(plan, now)
        else:
            drawn = self.reader.device.run(plan)
            ended = self.reader.scheduler.commit(plan, drawn, now)
            rows = dict(zip(plan.sampled_ids, drawn, strict=True))
        for name, row in rows.items():
            self.trips[name].output += row
        for event in ended:
            assert self.trips[event.request_id].end is None, "a request ended twice"
            self.trips[event.request_id].end = event.reason

    def _abort(self, name: str, now: float) -> None:
        trip = self.trips[name]
        found = [side.scheduler.abort(name, now) for side in (self.owner, self.reader)]
        if any(found) or trip.arrival >= now:
            trip.end = "abort"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(journeys())
def test_every_request_ends_with_its_own_tokens_whatever_happens_to_its_transfer(
    journey: tuple[BatchingConfig, BatchingConfig, list[Trip], Trouble],
) -> None:
    config, other, trips, trouble = journey
    owner, reader = Side(config), Side(other)
    World(owner, reader, trips, trouble).run()
    for trip in trips:
        expected, reason = alone(trip.request, config)
        output = tuple(trip.output)
        if trip.end in ("abort", "error"):
            assert output == expected[: len(output)]
        else:
            assert (output, trip.end) == (expected, reason)
    for side in (owner, reader):
        assert replay(side.lines).totals == side.scheduler.totals


def prefilled(owner: Side, prompt: tuple[int, ...], name: str = "a") -> Lease:
    owner.scheduler.add(Request(request_id=name, prompt=prompt, max_tokens=1, hold=True), 0.0)
    while owner.scheduler.leases.get(name) is None:
        owner.step(0.0)
    return owner.scheduler.leases.get(name)


def waiting_pull(reader: Side, prompt: tuple[int, ...], name: str = "a") -> tuple[TransferPlan, ...]:
    reader.scheduler.add(Request(request_id=name, prompt=prompt, max_tokens=3, pull=True), 0.0)
    _, _, events = reader.step(0.0)
    assert [type(event) for event in events] == [Started]
    return reader.scheduler.pulls.plan()


def test_a_leased_block_is_used_until_it_is_released_and_a_second_release_does_nothing() -> None:
    owner = Side(CONFIG)
    lease = prefilled(owner, tuple(range(1, 11)))
    assert len(lease.blocks) == 3
    assert owner.scheduler.num_free_blocks == 9
    assert not owner.scheduler.has_work
    assert owner.scheduler.leases.release("a")
    assert not owner.scheduler.leases.release("a")
    assert owner.scheduler.num_free_blocks == 12


def test_a_lease_is_due_after_its_seconds_unless_it_is_renewed() -> None:
    owner = Side(CONFIG)
    prefilled(owner, (1, 2, 3))
    assert owner.scheduler.leases.due(4.9) == ()
    assert owner.scheduler.leases.renew("a", 4.0)
    assert owner.scheduler.leases.due(8.9) == ()
    assert owner.scheduler.leases.due(9.0) == ("a",)
    assert not owner.scheduler.leases.renew("nobody", 4.0)


def test_held_requests_are_refused_beyond_their_share_with_the_two_numbers() -> None:
    owner = Side(CONFIG)
    prefilled(owner, tuple(range(1, 17)), "a")
    with pytest.raises(OverloadedError, match="needs 3 blocks to be held, but 4 of the 6"):
        owner.scheduler.add(Request(request_id="b", prompt=tuple(range(9)), hold=True), 1.0)
    owner.scheduler.leases.release("a")
    prefilled(owner, tuple(range(20, 29)), "b")


def test_a_pull_takes_only_what_the_prefix_cache_has_not() -> None:
    reader = Side(CONFIG)
    prefilled(reader, tuple(range(1, 10)), "before")
    reader.scheduler.leases.release("before")
    (plan,) = waiting_pull(reader, tuple(range(1, 15)))
    assert (plan.first, len(plan.blocks), plan.last) == (2, 2, True)


def test_a_prompt_that_is_cached_here_is_not_pulled() -> None:
    reader = Side(CONFIG)
    prefilled(reader, tuple(range(1, 10)), "before")
    reader.scheduler.leases.release("before")
    assert waiting_pull(reader, tuple(range(1, 10))) == ()
    assert "a" not in reader.scheduler.pulls


def test_blocks_of_an_aborted_pull_stay_until_its_transfer_is_back() -> None:
    reader = Side(CONFIG)
    (plan,) = waiting_pull(reader, tuple(range(1, 15)))
    assert reader.scheduler.abort("a", 1.0).reason == "abort"
    assert reader.scheduler.num_free_blocks == 8
    assert reader.scheduler.has_work
    reader.scheduler.pulls.commit(plan)
    assert reader.scheduler.num_free_blocks == 12
    check_empty(reader.scheduler)


def test_what_a_failed_transfer_did_not_bring_is_computed() -> None:
    reader = Side(replace(CONFIG, transfer_blocks=1))
    (first,) = waiting_pull(reader, tuple(range(1, 15)))
    (second,) = reader.scheduler.pulls.plan()
    reader.scheduler.pulls.commit(first)
    reader.scheduler.pulls.fail(second)
    plan = reader.scheduler.plan(1.0)
    assert [(chunk.start, chunk.length) for chunk in plan.prefills] == [(4, 10)]


def test_a_request_that_is_preempted_after_its_pull_computes_its_prompt() -> None:
    owner, reader = Side(CONFIG), Side(CONFIG)
    lease = prefilled(owner, tuple(range(1, 14)))
    (plan,) = waiting_pull(reader, tuple(range(1, 15)))
    reader.copy_from(owner, lease, plan)
    reader.scheduler.pulls.commit(plan)
    reader.step(1.0)
    seq = reader.scheduler._requests["a"]
    reader.scheduler._making_room.preempt(seq)
    reader.scheduler.reset_prefix_cache()
    plan = reader.scheduler.plan(2.0)
    assert seq.phase is Phase.DECODING
    assert [(chunk.start, chunk.length) for chunk in plan.prefills] == [(0, 15)]


def test_a_transfer_that_comes_back_twice_is_refused() -> None:
    reader = Side(CONFIG)
    (plan,) = waiting_pull(reader, tuple(range(1, 15)))
    reader.scheduler.pulls.commit(plan)
    with pytest.raises(
        ServeError, match="transfer 0 of 'a' came back, but the oldest of it in flight is none"
    ):
        reader.scheduler.pulls.commit(plan)


def test_counted_requests_are_held_and_pulled_too() -> None:
    config = replace(CONFIG, counted=True)
    owner, reader = Scheduler(config), Scheduler(config)
    owner.add(Request(request_id="a", prompt_len=10, max_tokens=1, hold=True), 0.0)
    owner.commit_counts(owner.plan(0.0), 0.0)
    assert owner.leases.get("a").num_tokens == 10
    reader.add(Request(request_id="a", prompt_len=11, max_tokens=2, pull=True), 0.0)
    assert reader.plan(0.0).num_tokens == 0
    for plan in reader.pulls.plan():
        reader.pulls.commit(plan)
    assert reader.plan(0.0).num_tokens == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lease_seconds": 0.0}, "nobody can read in 0 s"),
        ({"lease_share": 0.0}, r"not a share in \(0, 1\]"),
        ({"transfer_blocks": 0}, "at least 1 is needed"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **setting)
