"""The life of a request, decision by decision."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_device import FakeDevice, alone, check_empty, check_plan

from benthic.errors import AdmissionError, ConfigError, ServeError
from benthic.sched.batching import BatchingConfig, Finished, Preempted, Request, Scheduler, Started, StepPlan


def scheduler(**changes: Any) -> Scheduler:
    settings = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "watermark": 0.0,
    }
    return Scheduler(BatchingConfig(**{**settings, **changes}))


def ask(name: str, length: int = 4, **changes: Any) -> Request:
    """A request whose prompt differs from every other name's."""
    first = 1000 * (sum(map(ord, name)) + 1)
    return Request(request_id=name, prompt=tuple(range(first, first + length)), **changes)


def step(sched: Scheduler, now: float = 0.0, token: int = 7) -> tuple[StepPlan, tuple[Finished, ...]]:
    plan = sched.plan(now)
    check_plan(sched, plan)
    return plan, sched.commit(plan, [(token,)] * len(plan.sampled_ids), now)


def finish(sched: Scheduler, limit: int = 1000) -> list[Finished]:
    ends: list[Finished] = []
    for _ in range(limit):
        if not sched.has_work:
            check_empty(sched)
            return ends
        ends += step(sched)[1]
    pytest.fail(f"requests still run after {limit} steps")


def lengths(plan: StepPlan) -> dict[str, int]:
    return {chunk.request_id: chunk.length for chunk in plan.prefills}


# ---- the life of a request


def test_a_prompt_is_prefilled_then_decoded_one_token_a_step() -> None:
    sched = scheduler()
    sched.add(ask("a", 5, max_tokens=3), 1.0)
    first, _ = step(sched, 2.0)
    assert first.events == (Started("a", 0, 0, resumed=False),)
    assert [(c.start, c.length, c.samples) for c in first.prefills] == [(0, 5, True)]
    assert first.tables == ((0, 0, (0, 1)),)
    second, ends = step(sched, 3.0)
    assert (second.decode_ids, second.decode_slots, second.decode_positions) == (("a",), (0,), (5,))
    assert second.tables == ()
    assert ends == ()
    _, (end,) = step(sched, 4.0)
    assert (end.reason, end.num_generated, end.kept, end.stop_token) == ("length", 3, 1, None)
    assert (end.arrived, end.started, end.first_token, end.finished) == (1.0, 2.0, 2.0, 4.0)
    check_empty(sched)


def test_a_decode_that_crosses_a_block_border_writes_one_block_to_the_table() -> None:
    sched = scheduler()
    sched.add(ask("a", 4, max_tokens=8), 0.0)
    writes = [step(sched)[0].tables for _ in range(7)]
    assert [len(write) for write in writes] == [1, 1, 0, 0, 0, 1, 0]
    assert [write[0].first for write in writes if write] == [0, 1, 2]


def test_an_idle_plan_has_no_number_and_committing_it_does_nothing() -> None:
    sched = scheduler()
    plan = sched.plan(0.0)
    assert (plan.number, plan.num_tokens, plan.sampled_ids) == (-1, 0, ())
    assert sched.commit(plan, [], 0.0) == ()
    sched.add(ask("a"), 0.0)
    assert sched.plan(0.0).number == 0


def test_a_stop_token_ends_a_request_and_is_reported() -> None:
    sched = scheduler(eos_token_ids=(2,))
    sched.add(ask("eos"), 0.0)
    sched.add(ask("own", stop_token_ids=(9,), ignore_eos=True), 0.0)
    plan = sched.plan(0.0)
    (end,) = sched.commit(plan, [(2,), (2,)], 0.0)
    assert (end.request_id, end.reason, end.stop_token) == ("eos", "stop", 2)
    plan = sched.plan(0.0)
    (end,) = sched.commit(plan, [(9,)], 0.0)
    assert (end.request_id, end.stop_token, end.num_generated) == ("own", 9, 2)


def test_min_tokens_lets_a_stop_token_pass_until_so_many_others_came() -> None:
    sched = scheduler(eos_token_ids=(2,))
    sched.add(ask("a", min_tokens=2, max_tokens=8), 0.0)
    assert step(sched, token=2)[1] == ()
    assert step(sched, token=2)[1] == ()
    (end,) = step(sched, token=2)[1]
    assert (end.reason, end.num_generated) == ("stop", 3)


def test_max_tokens_zero_computes_the_prompt_and_draws_nothing() -> None:
    sched = scheduler()
    sched.add(ask("a", 20, max_tokens=0), 0.0)
    first, ends = step(sched)
    assert (lengths(first), first.sampled_ids, ends) == ({"a": 16}, (), ())
    second, (end,) = step(sched)
    assert (lengths(second), second.sampled_ids) == ({"a": 4}, ())
    assert (end.reason, end.num_generated, end.first_token) == ("length", 0, None)
    check_empty(sched)


def test_a_sequence_stops_at_max_model_len() -> None:
    sched = scheduler(max_model_len=10, num_blocks=3)
    sched.add(ask("a", 7, max_tokens=100), 0.0)
    (end,) = finish(sched)
    assert (end.reason, end.num_generated) == ("length", 3)


# ---- what is refused


def test_a_prompt_as_long_as_max_model_len_has_no_room_for_a_token() -> None:
    sched = scheduler()
    with pytest.raises(AdmissionError, match=r"64 tokens and 1 to generate make 65, but max_model_len = 64"):
        sched.add(ask("a", 64, max_tokens=1), 0.0)
    sched.add(ask("a", 64, max_tokens=0), 0.0)
    assert finish(sched)[0].reason == "length"


def test_a_request_that_could_outgrow_the_cache_is_refused_with_both_numbers() -> None:
    sched = scheduler(num_blocks=4)
    sched.add(ask("fits", 8, max_tokens=9), 0.0)
    with pytest.raises(AdmissionError, match=r"may need 5 blocks of 4, but num_blocks = 4"):
        sched.add(ask("too long", 8, max_tokens=10), 0.0)
    assert finish(sched)[0].num_generated == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "the prompt has 0 tokens"),
        ({"prompt": (1, 2), "prompt_len": 3}, r"prompt_len = 3, but its prompt has 2"),
        ({"prompt": (1,), "max_tokens": -1}, "max_tokens = -1"),
        ({"prompt": (1,), "max_tokens": 2, "min_tokens": 3}, "min_tokens = 3, max_tokens = 2"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdmissionError, match=message):
        Request(request_id="a", **changes)


def test_an_id_in_flight_is_refused_and_free_again_afterwards() -> None:
    sched = scheduler()
    sched.add(ask("a", max_tokens=1), 0.0)
    with pytest.raises(AdmissionError, match=r"in flight since 0\.0"):
        sched.add(ask("a"), 1.0)
    finish(sched)
    sched.add(ask("a"), 2.0)
    assert sched.num_waiting == 1


def test_counted_and_real_requests_do_not_mix() -> None:
    with pytest.raises(AdmissionError, match="counted=False"):
        scheduler().add(Request(request_id="a", prompt_len=3), 0.0)
    with pytest.raises(AdmissionError, match="counted=True"):
        scheduler(counted=True).add(ask("a"), 0.0)
    with pytest.raises(AdmissionError, match="2 block keys of 4 tokens"):
        scheduler(counted=True).add(Request(request_id="a", prompt_len=7, block_keys=(1, 2)), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 0},
        {"block_size": 0},
        {"max_num_batched_tokens": 3},
        {"num_speculative_tokens": -1},
        {"watermark": 1.0},
        {"priority_seconds": float("nan")},
    ],
)
def test_a_configuration_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        scheduler(**changes)


def test_plans_come_back_once_and_in_order_with_the_rows_they_asked_for() -> None:
    sched = scheduler()
    sched.add(ask("a"), 0.0)
    first = sched.plan(0.0)
    second = sched.plan(0.0)
    with pytest.raises(ServeError, match="plan 1 came back, but the oldest in flight is plan 0"):
        sched.commit(second, [(7,)], 0.0)
    with pytest.raises(ServeError, match="1 requests, but 2 rows"):
        sched.commit(first, [(7,), (7,)], 0.0)
    with pytest.raises(ServeError, match="2 accepted tokens, but plan 0 reserved 1 to 1"):
        sched.commit(first, [(7, 8)], 0.0)
    with pytest.raises(ServeError, match="counted=False"):
        sched.commit_counts(first, 0.0)
    assert sched.commit(first, [(7,)], 0.0) == ()
    with pytest.raises(ServeError, match="plan 0 came back, but the oldest in flight is plan 1"):
        sched.commit(first, [(7,)], 0.0)


# ---- sharing the budget


def test_decodes_come_before_prefills_and_a_long_prompt_is_cut_into_chunks() -> None:
    sched = scheduler()
    sched.add(ask("short", 4, max_tokens=9), 0.0)
    step(sched)
    sched.add(ask("long", 40), 1.0)
    plan, _ = step(sched)
    assert plan.decode_ids == ("short",)
    assert lengths(plan) == {"long": 15}
    assert [c.samples for c in plan.prefills] == [False]


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    sched = scheduler()
    sched.add(ask("long", 60), 0.0)
    sched.add(ask("short", 5), 1.0)
    plan, _ = step(sched)
    assert lengths(plan) == {"long": 11, "short": 5}
    assert plan.sampled_ids == ("short",)


def test_the_oldest_prompt_keeps_half_the_budget_however_many_short_ones_come() -> None:
    sched = scheduler(max_model_len=128, max_num_seqs=8)
    sched.add(ask("long", 120), 0.0)
    for i in range(60):
        sched.add(ask(f"s{i}", 8, max_tokens=1), 1.0 + i)
    steps = 0
    while sched.tokens("long")[120:] == ():
        plan, _ = step(sched)
        steps += 1
        assert lengths(plan)["long"] >= 8
    assert steps == 15


def test_a_budget_of_one_token_still_finishes_everything() -> None:
    sched = scheduler(max_num_seqs=1, max_num_batched_tokens=1, block_size=1)
    for name in "abc":
        sched.add(ask(name, 3, max_tokens=3), 0.0)
    assert [end.request_id for end in finish(sched)] == ["a", "b", "c"]
    assert sched.totals.steps == 3 * (3 + 2)


def test_one_block_serves_one_request_after_another() -> None:
    sched = scheduler(num_blocks=1, block_size=8)
    for name in "abc":
        sched.add(ask(name, 5, max_tokens=4), 0.0)
    assert [end.request_id for end in finish(sched)] == ["a", "b", "c"]
    assert sched.totals.preemptions == 0


# ---- order


def test_requests_start_in_order_of_arrival_within_a_priority() -> None:
    sched = scheduler(max_num_seqs=1)
    for name, priority in (("late", 1), ("a", 0), ("b", 0), ("urgent", -1)):
        sched.add(ask(name, max_tokens=1, priority=priority), 0.0)
    assert [end.request_id for end in finish(sched)] == ["urgent", "a", "b", "late"]


def test_a_low_priority_waits_longer_but_not_for_ever() -> None:
    sched = scheduler(max_num_seqs=1, priority_seconds=10.0)
    sched.add(ask("low", max_tokens=2, priority=1), 0.0)
    now, ends = 0.0, []
    for i in range(100):
        sched.add(ask(f"high{i}", max_tokens=2), now)
        for _ in range(2):
            ends += step(sched, now)[1]
            now += 1.0
        if any(end.request_id == "low" for end in ends):
            break
    assert 9.0 <= ends[-1].finished <= 14.0


def test_nobody_overtakes_a_big_request_that_waits_for_blocks() -> None:
    sched = scheduler(num_blocks=10, max_num_seqs=4, enable_prefix_caching=False)
    for i in range(3):
        sched.add(ask(f"s{i}", 4, max_tokens=5), 0.0)
    step(sched)
    sched.add(ask("big", 36, max_tokens=2), 1.0)
    started: dict[str, int] = {}
    for i in range(40):
        sched.add(ask(f"t{i}", 4, max_tokens=5), 2.0 + i)
        plan, _ = step(sched, 2.0 + i)
        started |= {event.request_id: i for event in plan.events if isinstance(event, Started)}
    others = [i for name, i in started.items() if name.startswith("t")]
    assert "big" in started
    assert min(others) > started["big"]


def test_the_watermark_stays_free_for_running_requests_but_never_stops_a_lone_one() -> None:
    sched = scheduler(num_blocks=4, watermark=0.5)
    sched.add(ask("a", 4, max_tokens=13), 0.0)
    sched.add(ask("b", 8, max_tokens=1), 0.0)
    plan, _ = step(sched)
    assert lengths(plan) == {"a": 4}
    sched.abort("a", 0.0)
    plan, _ = step(sched)
    assert lengths(plan) == {"b": 8}


# ---- preemption


def _crowded(**changes: Any) -> Scheduler:
    """Two requests of equal length in 8 blocks: they need 10 before they end."""
    sched = scheduler(num_blocks=8, max_num_batched_tokens=32, **changes)
    sched.add(ask("old", 12, max_tokens=9), 0.0)
    sched.add(ask("young", 12, max_tokens=9), 1.0)
    return sched


def _run_until_preempted(sched: Scheduler) -> Preempted:
    for _ in range(50):
        for event in step(sched)[0].events:
            if isinstance(event, Preempted):
                return event
    pytest.fail("nobody was preempted")


def test_the_latest_request_gives_way_and_resumes_with_the_same_tokens() -> None:
    sched = _crowded()
    assert _run_until_preempted(sched) == Preempted("young", 1)
    before = sched.tokens("young")
    assert (sched.num_running, sched.num_waiting) == (1, 1)
    ends = {end.request_id: end for end in finish(sched)}
    assert ends["young"].preemptions == 1
    assert ends["old"].preemptions == 0
    assert ends["young"].num_generated == 9
    assert len(before) > 12
    assert sched.totals.preemptions == 1


def test_a_resumed_request_finds_its_own_blocks_in_the_prefix_cache() -> None:
    sched = _crowded()
    _run_until_preempted(sched)
    while True:
        plan, _ = step(sched)
        resumed = [event for event in plan.events if isinstance(event, Started)]
        if resumed:
            break
    assert resumed[0].resumed
    assert resumed[0].cached_tokens >= 8
    assert lengths(plan)["young"] < 12
    assert sched.totals.recomputed < 12


def test_a_lower_priority_gives_way_before_a_later_arrival() -> None:
    sched = scheduler(num_blocks=8, max_num_batched_tokens=32)
    sched.add(ask("unimportant", 12, max_tokens=9, priority=1), 0.0)
    sched.add(ask("later", 12, max_tokens=9), 1.0)
    assert _run_until_preempted(sched).request_id == "unimportant"


def test_an_abort_after_a_preemption_leaves_nothing_behind() -> None:
    sched = _crowded()
    _run_until_preempted(sched)
    end = sched.abort("young", 0.0)
    assert end is not None
    assert (end.slot, end.reason, end.preemptions) == (-1, "abort", 1)
    finish(sched)


def test_a_preempted_request_whose_last_token_was_in_flight_still_ends() -> None:
    sched = _crowded(eos_token_ids=(2,))
    while True:
        plan = sched.plan(0.0)
        ahead = sched.plan(0.0)
        if any(isinstance(event, Preempted) for event in ahead.events):
            break
        for each in (plan, ahead):
            sched.commit(each, [(7,)] * len(each.sampled_ids), 0.0)
    rows = [(2,) if name == "young" else (7,) for name in plan.sampled_ids]
    (end,) = sched.commit(plan, rows, 0.0)
    assert (end.request_id, end.reason, end.slot) == ("young", "stop", -1)
    sched.commit(ahead, [(7,)] * len(ahead.sampled_ids), 0.0)
    finish(sched)


def test_a_preempted_request_does_not_resume_before_its_tokens_in_flight_are_known() -> None:
    config = BatchingConfig(
        num_blocks=5, block_size=2, max_model_len=10, max_num_seqs=2, max_num_batched_tokens=16, watermark=0.0
    )
    sched, device = Scheduler(config), FakeDevice(config, random.Random(0))  # noqa: S311 (not a secret)
    requests = [ask("old", 3, max_tokens=6), ask("young", 3, max_tokens=6)]
    for request in requests:
        sched.add(request, 0.0)
    outputs: dict[str, tuple[int, ...]] = {}
    flights = []
    while sched.has_work:
        plan = sched.plan(0.0)
        flights.append((plan, device.run(plan)))
        if len(flights) == 4 or not plan.num_tokens:
            plan, rows = flights.pop(0)
            for name, row in zip(plan.sampled_ids, rows, strict=True):
                outputs[name] = outputs.get(name, ()) + row
            sched.commit(plan, rows, 0.0)
    assert sched.totals.preemptions >= 1
    for request in requests:
        expected, _ = alone(request, config)
        assert outputs[request.request_id][: len(expected)] == expected


# ---- abort and failure


def test_an_abort_between_plan_and_commit_frees_the_blocks_with_the_commit() -> None:
    sched = scheduler()
    sched.add(ask("a"), 0.0)
    plan = sched.plan(0.0)
    end = sched.abort("a", 0.0)
    assert end is not None
    assert (end.reason, end.slot, end.num_generated) == ("abort", 0, 0)
    assert sched.num_free_blocks == 63
    assert sched.has_work
    assert sched.commit(plan, [(7,)], 0.0) == ()
    check_empty(sched)


def test_an_abort_in_the_queue_and_of_an_unknown_request() -> None:
    sched = scheduler()
    sched.add(ask("a"), 0.0)
    end = sched.abort("a", 3.0)
    assert end is not None
    assert (end.slot, end.started, end.finished) == (-1, None, 3.0)
    assert sched.abort("a", 3.0) is None
    check_empty(sched)


def test_a_failed_plan_ends_its_requests_and_only_those() -> None:
    sched = scheduler(max_num_seqs=1)
    sched.add(ask("a", 20), 0.0)
    sched.add(ask("b"), 0.0)
    plan = sched.plan(0.0)
    (end,) = sched.fail(plan, 1.0)
    assert (end.request_id, end.reason) == ("a", "error")
    sched.add(ask("a", 20, max_tokens=1), 2.0)
    ends = finish(sched)
    assert [event.request_id for event in ends] == ["b", "a"]
    assert ends[1].cached_tokens == 0, "blocks of a failed plan must not be reused"


def test_slots_and_blocks_of_an_ended_request_wait_for_the_plans_in_flight() -> None:
    sched = scheduler(eos_token_ids=(2,), max_num_seqs=1)
    sched.add(ask("a"), 0.0)
    sched.add(ask("b"), 0.0)
    first, second = sched.plan(0.0), sched.plan(0.0)
    assert second.decode_ids == ("a",)
    (end,) = sched.commit(first, [(2,)], 0.0)
    assert end.reason == "stop"
    third = sched.plan(0.0)
    assert third.num_tokens == 0
    assert sched.commit(second, [(7,)], 0.0) == ()
    assert lengths(sched.plan(0.0)) == {"b": 4}


# ---- the prefix cache


def test_a_second_prompt_skips_the_full_blocks_it_shares_with_the_first() -> None:
    sched = scheduler()
    sched.add(Request(request_id="a", prompt=tuple(range(10)), max_tokens=1), 0.0)
    finish(sched)
    sched.add(Request(request_id="b", prompt=(*range(9), 99, 98), max_tokens=1), 0.0)
    plan, (end,) = step(sched)
    assert plan.events == (Started("b", 0, 8, resumed=False),)
    assert [(c.start, c.length, c.tokens) for c in plan.prefills] == [(8, 3, (8, 99, 98))]
    assert end.cached_tokens == 8
    assert (sched.totals.prefix_queries, sched.totals.prefix_hits) == (21, 8)


def test_the_last_token_of_a_prompt_is_computed_even_when_all_of_it_is_cached() -> None:
    sched = scheduler()
    for name in "ab":
        sched.add(Request(request_id=name, prompt=tuple(range(8)), max_tokens=1), 0.0)
        plan, _ = step(sched)
    assert [(c.start, c.length, c.samples) for c in plan.prefills] == [(4, 4, True)]


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    sched = scheduler()
    sched.add(Request(request_id="a", prompt=(1, 2, 3), max_tokens=6), 0.0)
    finish(sched)
    sched.add(Request(request_id="b", prompt=(1, 2, 3, 7, 7, 7, 7, 7, 7, 4), max_tokens=1), 0.0)
    (end,) = finish(sched)
    assert end.cached_tokens == 8


@pytest.mark.parametrize(
    "changes", [{"salt": "other tenant"}, {"reuse_prefix": False}, {"prompt": (9, *range(1, 12))}]
)
def test_a_salt_a_wish_or_another_beginning_keeps_requests_apart(changes: dict[str, Any]) -> None:
    sched = scheduler()
    for request in (
        Request(request_id="a", prompt=tuple(range(12))),
        Request(request_id="b", **{"prompt": tuple(range(12)), **changes}),
    ):
        sched.add(request, 0.0)
        finish(sched)
    assert sched.totals.prefix_hits == 0
    assert sched.totals.prefix_queries == (12 if "reuse_prefix" in changes else 24)


def test_equal_prompts_arriving_together_are_computed_once() -> None:
    sched = scheduler(max_num_batched_tokens=32)
    for i in range(4):
        sched.add(Request(request_id=str(i), prompt=tuple(range(21)), max_tokens=2), float(i))
    first, _ = step(sched)
    assert lengths(first) == {"0": 21}
    assert (sched.num_running, sched.num_waiting) == (1, 3)
    second, _ = step(sched)
    assert lengths(second) == {"1": 1, "2": 1, "3": 1}
    finish(sched)
    assert sched.totals.prefix_hits == 3 * 20


def test_a_parked_request_goes_on_when_its_leader_is_aborted_or_fails() -> None:
    sched = scheduler(max_num_batched_tokens=8)
    for name in ("leader", "follower", "third"):
        sched.add(Request(request_id=name, prompt=tuple(range(21)), max_tokens=1), 0.0)
    plan, _ = step(sched)
    assert lengths(plan) == {"leader": 8}
    sched.abort("leader", 0.0)
    plan = sched.plan(0.0)
    assert plan.events == (Started("follower", 0, 8, resumed=False),)
    sched.fail(plan, 0.0)
    (end,) = finish(sched)
    assert (end.request_id, end.cached_tokens) == ("third", 8)


def test_a_parked_request_goes_on_when_its_leader_is_preempted() -> None:
    sched = scheduler(num_blocks=12, max_num_batched_tokens=6, max_num_seqs=3)
    sched.add(ask("old", 12, max_tokens=9), 0.0)
    for _ in range(2):
        step(sched)
    for name in ("leader", "follower"):
        sched.add(Request(request_id=name, prompt=tuple(range(30)), max_tokens=1), 1.0)
    assert _run_until_preempted(sched).request_id == "leader"
    sched.abort("leader", 1.0)
    ends = finish(sched)
    assert [end.request_id for end in ends] == ["old", "follower"]


def test_an_urgent_request_does_not_park_behind_a_less_urgent_one() -> None:
    sched = scheduler(max_num_batched_tokens=8)
    sched.add(Request(request_id="slow", prompt=tuple(range(60)), max_tokens=1, priority=1), 0.0)
    plan = sched.plan(0.0)
    sched.add(Request(request_id="urgent", prompt=tuple(range(20)), max_tokens=1), 1.0)
    ahead = sched.plan(1.0)
    assert lengths(ahead)["urgent"] == 8
    for each in (plan, ahead):
        sched.commit(each, [], 1.0)
    finish(sched)


def test_a_parked_request_can_be_aborted() -> None:
    sched = scheduler()
    for name in ("leader", "follower"):
        sched.add(Request(request_id=name, prompt=tuple(range(21)), max_tokens=1), 0.0)
    step(sched)
    assert sched.abort("follower", 0.0) is not None
    assert [end.request_id for end in finish(sched)] == ["leader"]


def test_the_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_beginning() -> None:
    sched = scheduler(num_blocks=6)
    for name, start in (("a", 0), ("b", 100)):
        sched.add(Request(request_id=name, prompt=tuple(range(start, start + 12)), max_tokens=1), 0.0)
        finish(sched)
    sched.add(ask("c", 8, max_tokens=1), 0.0)
    finish(sched)
    for name, start, cached in (("a2", 0, 4), ("b2", 100, 4)):
        sched.add(Request(request_id=name, prompt=tuple(range(start, start + 12)), max_tokens=1), 0.0)
        (end,) = finish(sched)
        assert (name, end.cached_tokens) == (name, cached)


def test_a_reset_forgets_cached_prefixes() -> None:
    sched = scheduler()
    for reset in (False, True):
        if reset:
            assert sched.reset_prefix_cache() == 3
        sched.add(Request(request_id="a", prompt=tuple(range(12)), max_tokens=2), 0.0)
        assert finish(sched)[0].cached_tokens == 0


# ---- speculation


def test_drafts_are_reserved_and_the_accepted_ones_move_the_sequence_on() -> None:
    sched = scheduler(num_speculative_tokens=3)
    sched.add(ask("a", 4, max_tokens=9), 0.0)
    step(sched)
    plan = sched.plan(0.0)
    assert (plan.decode_positions, plan.decode_drafts, plan.num_tokens) == ((4,), (3,), 4)
    sched.commit(plan, [(7, 7)], 0.0)
    plan = sched.plan(0.0)
    assert (plan.decode_positions, plan.decode_drafts) == ((6,), (3,))
    sched.commit(plan, [(7, 7, 7, 7)], 0.0)
    plan = sched.plan(0.0)
    assert (plan.decode_positions, plan.decode_drafts) == ((10,), (1,)), "only two tokens are left to make"
    (end,) = sched.commit(plan, [(7, 7)], 0.0)
    assert (end.reason, end.kept, end.num_generated) == ("length", 2, 9)
    assert (sched.totals.drafted, sched.totals.accepted_drafts) == (7, 1 + 3 + 1)
    check_empty(sched)


def test_tokens_behind_a_stop_token_do_not_count() -> None:
    sched = scheduler(num_speculative_tokens=3, eos_token_ids=(2,))
    sched.add(ask("a", 4, max_tokens=9), 0.0)
    step(sched)
    plan = sched.plan(0.0)
    (end,) = sched.commit(plan, [(7, 2, 7, 7)], 0.0)
    assert (end.reason, end.kept, end.num_generated, end.stop_token) == ("stop", 2, 3, 2)


def test_drafts_leave_half_the_budget_to_prompts() -> None:
    sched = scheduler(num_speculative_tokens=7)
    sched.add(ask("a", 4, max_tokens=30), 0.0)
    step(sched)
    alone_plan, _ = step(sched)
    assert alone_plan.decode_drafts == (7,)
    sched.add(ask("b", 40), 0.0)
    sched.add(ask("c", 4, max_tokens=30), 0.0)
    plan, _ = step(sched)
    assert sum(plan.decode_drafts) + len(plan.decode_ids) <= 8
    assert sum(lengths(plan).values()) >= 8


def test_drafts_preempt_nobody() -> None:
    sched = scheduler(num_blocks=4, num_speculative_tokens=4, max_num_batched_tokens=32)
    sched.add(ask("a", 6, max_tokens=3), 0.0)
    sched.add(ask("b", 6, max_tokens=3), 0.0)
    step(sched)
    plan, _ = step(sched)
    assert plan.decode_drafts == (1, 1), "the blocks at hand cover one draft each"
    assert sched.totals.preemptions == 0


def test_a_sequence_with_drafts_in_flight_sits_out() -> None:
    sched = scheduler(num_speculative_tokens=1)
    sched.add(ask("a", max_tokens=9), 0.0)
    sched.plan(0.0)
    assert sched.plan(0.0).decode_drafts == (1,), "the first token is drawn, but not known yet"
    assert sched.plan(0.0).num_tokens == 0


# ---- planning ahead and counting


def test_planning_ahead_makes_the_same_steps_as_waiting_for_each_commit() -> None:
    plans: dict[int, list[StepPlan]] = {}
    for depth in (1, 3):
        sched = scheduler(max_num_batched_tokens=64)
        for name in "abcd":
            sched.add(ask(name, 6, max_tokens=9), 0.0)
        flights: list[StepPlan] = []
        plans[depth] = []
        while sched.has_work:
            plan = sched.plan(0.0)
            if plan.num_tokens:
                flights.append(plan)
                plans[depth].append(plan)
            if len(flights) >= depth or not plan.num_tokens:
                oldest = flights.pop(0)
                sched.commit(oldest, [(7,)] * len(oldest.sampled_ids), 0.0)
        check_empty(sched)
    assert plans[1] == plans[3]


def test_counted_requests_make_the_same_plans_without_token_ids() -> None:
    real, counted = scheduler(enable_prefix_caching=False), scheduler(counted=True)
    for i in range(7):
        real.add(ask(str(i), 3 + 5 * i, max_tokens=2 + i), 0.0)
        counted.add(Request(request_id=str(i), prompt_len=3 + 5 * i, max_tokens=2 + i), 0.0)
    while real.has_work:
        live, simulated = real.plan(0.0), counted.plan(0.0)
        bare = tuple(chunk._replace(tokens=None) for chunk in live.prefills)
        assert (live.decode_ids, live.decode_positions, live.tables, bare) == (
            simulated.decode_ids,
            simulated.decode_positions,
            simulated.tables,
            simulated.prefills,
        )
        assert real.commit(live, [(7,)] * len(live.sampled_ids), 1.0) == counted.commit_counts(simulated, 1.0)
    assert not counted.has_work


def test_counted_requests_share_prefixes_by_their_keys() -> None:
    sched = scheduler(counted=True)
    for name, keys in (("a", (5, 6)), ("b", (5, 6)), ("c", (6, 5))):
        sched.add(Request(request_id=name, prompt_len=11, max_tokens=1, block_keys=keys), 0.0)
        while sched.has_work:
            ends = sched.commit_counts(sched.plan(0.0), 0.0)
        assert ends[0].cached_tokens == (8 if name == "b" else 0)


def test_counts_say_how_many_drafts_held() -> None:
    sched = scheduler(counted=True, num_speculative_tokens=2)
    sched.add(Request(request_id="a", prompt_len=4, max_tokens=4), 0.0)
    sched.commit_counts(sched.plan(0.0), 0.0)
    plan = sched.plan(0.0)
    assert plan.decode_drafts == (2,)
    with pytest.raises(ServeError, match="4 accepted tokens"):
        sched.commit_counts(plan, 0.0, [4])
    (end,) = sched.commit_counts(plan, 0.0, [3])
    assert (end.kept, end.num_generated) == (3, 4)


def test_a_thousand_waiting_requests_do_not_make_a_step_slower_by_much() -> None:
    """The queue is touched at its top only: its length must not show in the number of entries looked at."""
    sched = scheduler(max_num_seqs=1)
    for i in range(1000):
        sched.add(ask(str(i), max_tokens=2), float(i))
    looked = 0
    for heap in (sched._prefills._queue._oldest, sched._prefills._queue._shortest):
        looked += len(heap)
    finish(sched, limit=2001)
    assert looked == 2000
    assert len(sched._prefills._queue._oldest) + len(sched._prefills._queue._shortest) <= 2 * 66
