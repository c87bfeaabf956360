"""Evicted blocks wait in host memory and come back instead of being computed."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from fake_device import FakeDevice, alone, check_empty, check_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.sched.batching import BatchingConfig, Request, Scheduler, Started, StepPlan
from benthic.sched.host_tier import HostTier
from benthic.sched.plans import BlockCopy, TableWrite
from benthic.sched.replay import RecordingScheduler, replay

CONFIG = BatchingConfig(
    num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=4, max_num_batched_tokens=16, host_blocks=8
)
FIRST, SECOND, THIRD = (tuple(range(start, start + 13)) for start in (100, 200, 300))


class World:
    """One scheduler and its fake device; `serve` runs a request to its end."""

    def __init__(self, config: BatchingConfig) -> None:
        self.lines: list[str] = []
        self.scheduler: Scheduler = RecordingScheduler(config, self.lines.append)
        self.device = FakeDevice(config, random.Random(0))  # noqa: S311 (not a secret)
        self.plans: list[StepPlan] = []
        self.outputs: dict[str, list[int]] = {}
        self.now = 0.0

    def add(self, name: str, prompt: tuple[int, ...], **settings: object) -> None:
        request = Request(request_id=name, prompt=prompt, **({"max_tokens": 2} | settings))
        self.scheduler.add(request, self.now)
        self.outputs[name] = []

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        check_plan(self.scheduler, plan)
        rows = self.device.run(plan)
        for name, row in zip(plan.sampled_ids, rows, strict=True):
            self.outputs[name] += row
        self.scheduler.commit(plan, rows, self.now)
        self.plans.append(plan)
        self.now += 1.0
        return plan

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def serve(self, name: str, prompt: tuple[int, ...], **settings: object) -> list[StepPlan]:
        before = len(self.plans)
        self.add(name, prompt, **settings)
        self.finish()
        return self.plans[before:]


def started(plans: list[StepPlan], name: str) -> list[Started]:
    events = [event for plan in plans for event in plan.events]
    return [event for event in events if isinstance(event, Started) and event.request_id == name]


def test_what_was_evicted_comes_back_on_a_prefix_hit_and_is_not_computed() -> None:
    world = World(CONFIG)
    world.serve("a", FIRST)
    world.serve("b", SECOND)
    plans = world.serve("again", FIRST)
    assert started(plans, "again")[0].cached_tokens == 12
    assert [(chunk.start, chunk.length) for plan in plans for chunk in plan.prefills] == [(12, 1)]
    assert len(plans[0].from_host) == 3
    assert world.outputs["again"] == world.outputs["a"]
    assert world.scheduler.totals.host_blocks_in == 3
    assert world.scheduler.totals.prefix_hits == 12
    check_empty(world.scheduler)


def test_without_host_blocks_the_same_prompt_is_computed_again() -> None:
    world = World(replace(CONFIG, host_blocks=0))
    for name, prompt in (("a", FIRST), ("b", SECOND), ("again", FIRST)):
        plans = world.serve(name, prompt)
    assert sum(chunk.length for plan in plans for chunk in plan.prefills) == 13
    assert not any(plan.to_host or plan.from_host for plan in world.plans)
    assert world.scheduler.num_host_blocks == 0


def test_blocks_leave_and_come_back_in_one_plan() -> None:
    world = World(CONFIG)
    for name, prompt in (("a", FIRST), ("b", SECOND)):
        world.serve(name, prompt)
    (first, *_) = world.serve("again", FIRST)
    assert first.to_host, "what the second prompt left behind goes out"
    assert {copy.device for copy in first.to_host} & {copy.device for copy in first.from_host}
    assert world.serve("more", SECOND)[0].from_host
    assert world.outputs["more"] == world.outputs["b"]


def test_what_came_back_and_is_evicted_again_moves_nothing() -> None:
    world = World(CONFIG)
    for name, prompt in (("a", FIRST), ("b", SECOND), ("c", FIRST), ("d", SECOND)):
        world.serve(name, prompt)
    out = world.scheduler.totals.host_blocks_out
    for name, prompt in (("e", FIRST), ("f", SECOND)):
        world.serve(name, prompt)
    assert world.scheduler.totals.host_blocks_out == out
    assert world.outputs["f"] == world.outputs["b"]


def test_the_block_not_moved_for_longest_makes_room_on_the_host() -> None:
    world = World(replace(CONFIG, host_blocks=3))
    for name, prompt in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        world.serve(name, prompt)
    assert world.scheduler.num_host_blocks == 3
    plans = world.serve("gone", FIRST)
    assert started(plans, "gone")[0].cached_tokens == 0, "the second prompt's blocks took its place"
    assert world.outputs["gone"] == world.outputs["a"]


def test_a_block_that_a_plan_brings_back_is_not_given_away_by_it() -> None:
    tier = HostTier(2)
    tier.begin_plan()
    tier.keep(b"a", 5)
    tier.keep(b"b", 6)
    assert tier.to_host == (BlockCopy(5, 0), BlockCopy(6, 1))
    tier.begin_plan()
    tier.reserve([b"a"])
    tier.keep(b"c", 7)
    assert b"a" in tier
    assert b"b" not in tier
    tier.reserve([b"c"])
    tier.keep(b"d", 8)
    assert b"d" not in tier, "both blocks are read by this plan"
    tier.bring_back(b"a", 3)
    assert (tier.to_host, tier.from_host) == ((BlockCopy(7, 1),), (BlockCopy(3, 0),))
    tier.begin_plan()
    tier.keep(b"d", 8)
    assert b"d" in tier
    assert tier.clear() == 2


def test_a_host_block_that_is_taken_twice_in_a_plan_is_written_once() -> None:
    tier = HostTier(1)
    tier.begin_plan()
    tier.keep(b"a", 5)
    tier.keep(b"b", 6)
    assert tier.to_host == (BlockCopy(6, 0),)
    assert b"a" not in tier


def test_a_preempted_request_gets_its_blocks_back_instead_of_computing_them() -> None:
    recomputed, outputs = [], []
    config = replace(CONFIG, num_blocks=6, max_model_len=24, host_blocks=0, watermark=0.0)
    for host_blocks in (0, 20):
        world = World(replace(config, host_blocks=host_blocks))
        world.add("old", FIRST[:8], max_tokens=16)
        world.add("young", SECOND[:8], max_tokens=12)
        world.finish()
        assert world.scheduler.totals.preemptions
        recomputed.append(world.scheduler.totals.recomputed)
        outputs.append(world.outputs)
        assert len(started(world.plans, "young")) > 1
    assert outputs[0] == outputs[1]
    assert recomputed[1] < recomputed[0]


def test_resetting_the_prefix_cache_forgets_what_the_host_holds() -> None:
    world = World(CONFIG)
    world.serve("a", FIRST)
    world.serve("b", SECOND)
    held = world.scheduler.num_host_blocks
    assert held == 3
    assert world.scheduler.reset_prefix_cache() == held + 3
    assert world.scheduler.num_host_blocks == 0
    assert started(world.serve("again", FIRST), "again")[0].cached_tokens == 0
    assert replay(world.lines).totals == world.scheduler.totals


def test_another_salt_or_a_request_that_reuses_nothing_gets_nothing_back() -> None:
    world = World(CONFIG)
    world.serve("a", FIRST)
    world.serve("b", SECOND)
    for settings_ in ({"salt": "x"}, {"reuse_prefix": False}):
        name = str(settings_)
        assert started(world.serve(name, FIRST, **settings_), name)[0].cached_tokens == 0


def test_a_pull_that_evicts_makes_its_copies_in_an_idle_plan() -> None:
    world = World(CONFIG)
    world.serve("a", FIRST)
    world.add("pulled", SECOND, pull=True)
    plan = world.step()
    assert plan.number == -1
    assert len(plan.to_host) == 3
    (transfer,) = world.scheduler.pulls.plan()
    for block in transfer.blocks:
        world.device.pages[block] = [None] * 4  # whatever arrives later
    world.scheduler.pulls.fail(transfer)
    world.finish()
    assert world.serve("again", FIRST)[0].from_host
    assert world.outputs["again"] == world.outputs["a"]


def test_copies_are_part_of_a_recording_and_a_recording_without_them_still_replays() -> None:
    world = World(CONFIG)
    for name, prompt in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        world.serve(name, prompt)
    assert replay(world.lines).totals == world.scheduler.totals
    plain = World(replace(CONFIG, host_blocks=0))
    for name, prompt in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        plain.serve(name, prompt)
    header = json.loads(plain.lines[0])
    del header["config"]["host_blocks"]
    assert replay([json.dumps(header), *plain.lines[1:]]).plans == len(plain.plans)


def test_a_plan_without_copies_reads_as_it_did_before_there_were_any() -> None:
    """Recordings hold a digest of this."""
    plan = StepPlan(
        number=0,
        num_tokens=1,
        decode_ids=("a",),
        decode_slots=(0,),
        decode_positions=(3,),
        decode_drafts=(0,),
        prefills=(),
        tables=(TableWrite(0, 0, (1,)),),
        events=(),
    )
    assert repr(plan) == (
        "StepPlan(number=0, num_tokens=1, decode_ids=('a',), decode_slots=(0,), decode_positions=(3,), "
        "decode_drafts=(0,), prefills=(), tables=(TableWrite(slot=0, first=0, blocks=(1,)),), events=())"
    )


def test_a_negative_number_of_host_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="host_blocks = -1"):
        replace(CONFIG, host_blocks=-1)


PROMPTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 13)), min_size=1, max_size=14
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PROMPTS, st.sampled_from([1, 2, 6, 30]))
def test_prompts_served_one_after_another_compute_no_more_with_a_host_tier(
    asked: list[tuple[int, int, int]], host_blocks: int
) -> None:
    computed = []
    for blocks in (0, host_blocks):
        world = World(replace(CONFIG, host_blocks=blocks))
        for i, (trunk, token, length) in enumerate(asked):
            prompt = (*range(100 * trunk, 100 * trunk + min(length, 12)), token)
            world.serve(str(i), prompt)
            expected, _ = alone(Request(request_id="x", prompt=prompt, max_tokens=2), world.scheduler.config)
            assert tuple(world.outputs[str(i)]) == expected
        check_empty(world.scheduler)
        computed.append(sum(chunk.length for plan in world.plans for chunk in plan.prefills))
    assert computed[1] <= computed[0]
