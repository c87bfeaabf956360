"""How many drafts pay off: decided from times and acceptance that are given, not from a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benthic.sched.batching import BatchingConfig, Request, Scheduler
from benthic.sched.drafting import PROBE_EVERY, PROBE_STEPS, TRIAL_STEPS, bucket

Cost = Callable[[int, int], float]


def run(
    cost: Cost, held: Callable[[int], int], *, batch: int, most: int = 3, steps: int = 60, **options: object
) -> tuple[Scheduler, list[int]]:
    """Drafts of every decode step of `batch` equal requests; a step of d drafts takes `cost(batch, d)`."""
    config = BatchingConfig(
        num_blocks=batch * 300,
        max_model_len=16384,
        num_speculative_tokens=most,
        adaptive_drafts=True,
        counted=True,
    )
    sched = Scheduler(config)
    for i in range(batch):
        sched.add(Request(request_id=str(i), prompt_len=4, max_tokens=16000, **options), 0.0)
    now, chosen = 0.0, []
    sched.commit_counts(sched.plan(now), now)
    for _ in range(steps):
        plan = sched.plan(now)
        drafts = max(plan.decode_drafts)
        now += cost(len(plan.decode_ids), drafts)
        sched.commit_counts(plan, now, [1 + min(held(i), d) for i, d in enumerate(plan.decode_drafts)])
        chosen.append(drafts)
    return sched, chosen


def idle_device(batch: int, drafts: int) -> float:
    """Verification is nearly free."""
    return 1.0 + 0.02 * drafts * batch


def busy_device(batch: int, drafts: int) -> float:
    """Every row costs the same."""
    return 0.1 + 0.1 * batch * (1 + drafts)


def test_one_sequence_on_an_idle_device_takes_all_drafts() -> None:
    _, chosen = run(idle_device, lambda _: 3, batch=1)
    assert set(chosen[10:]) == {3}


def test_a_batch_that_fills_the_device_takes_none_though_half_of_the_drafts_hold() -> None:
    _, chosen = run(busy_device, lambda i: i % 2 * 3, batch=64)
    assert chosen[0] == 3, "it has to try"
    assert set(chosen[10:]) == {0}


def test_drafts_that_never_hold_are_given_up_however_cheap_they_are() -> None:
    _, chosen = run(idle_device, lambda _: 0, batch=1, steps=150)
    assert chosen[0] == 3
    assert set(chosen[100:]) == {0}


def test_a_draft_that_mostly_holds_is_taken_and_those_behind_it_that_do_not_are_left() -> None:
    _, chosen = run(lambda _, drafts: 1.0 + 0.1 * drafts, lambda _: 1, batch=2, steps=200)
    assert set(chosen[100:]) == {1}


def test_the_same_scheduler_decides_by_batch_size() -> None:
    config = BatchingConfig(
        num_blocks=6000, max_model_len=8192, num_speculative_tokens=2, adaptive_drafts=True, counted=True
    )
    sched, now = Scheduler(config), 0.0
    for i in range(32):
        sched.add(Request(request_id=str(i), prompt_len=4, max_tokens=8000 if i == 0 else 60), now)
    by_batch: dict[int, list[int]] = {}
    for _ in range(140):
        plan = sched.plan(now)
        drafts = max(plan.decode_drafts, default=0)
        now += 0.5 + 0.5 * (len(plan.decode_ids) * (1 + drafts) > 40)
        sched.commit_counts(plan, now, [1 + d for d in plan.decode_drafts] + [1] * len(plan.prefills))
        by_batch.setdefault(len(plan.decode_ids), []).append(drafts)
    assert set(by_batch[1][8:]) == {2}
    assert by_batch[32][0] == 2
    assert max(by_batch[32]) == 2


def test_after_a_while_without_drafts_they_are_tried_again() -> None:
    good_from = 2 * PROBE_EVERY

    def cost(_: int, drafts: int) -> float:
        return 1.0 + 0.1 * drafts

    step = iter(range(10_000))
    _, chosen = run(cost, lambda _: 0 if next(step) < good_from else 3, batch=1, steps=8 * PROBE_EVERY)
    resting = chosen[20:PROBE_EVERY]
    assert set(resting) == {0}
    assert chosen[20:good_from].count(3) <= 2 * PROBE_STEPS
    assert chosen[-1] == 3


def test_a_batch_whose_steps_always_carry_prompts_stops_trying() -> None:
    config = BatchingConfig(
        num_blocks=5000,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_speculative_tokens=2,
        adaptive_drafts=True,
        counted=True,
    )
    sched, now, chosen = Scheduler(config), 0.0, []
    sched.add(Request(request_id="long", prompt_len=4, max_tokens=2000), now)
    sched.add(Request(request_id="flood", prompt_len=4000, max_tokens=1), now)
    for _ in range(TRIAL_STEPS + 20):
        plan = sched.plan(now)
        now += 1.0
        sched.commit_counts(plan, now)
        chosen += list(plan.decode_drafts)
    assert chosen[0] == 2
    assert set(chosen[-10:]) == {0}


def test_a_request_that_must_not_be_drafted_for_takes_one_token_a_step_beside_others() -> None:
    sched = Scheduler(BatchingConfig(num_blocks=50, max_model_len=64, num_speculative_tokens=2))
    sched.add(Request(request_id="a", prompt=(1, 2), max_tokens=20), 0.0)
    sched.add(Request(request_id="b", prompt=(3, 4), max_tokens=20, speculate=False), 0.0)
    sched.commit(sched.plan(0.0), [(7,), (7,)], 0.0)
    plan = sched.plan(0.0)
    assert dict(zip(plan.decode_ids, plan.decode_drafts, strict=True)) == {"a": 2, "b": 0}
    sched.commit(plan, [(7, 7, 7), (7,)], 0.0)
    assert sched.plan(0.0).decode_positions == (5, 3)


def test_blocks_of_rejected_drafts_are_given_back_at_the_commit() -> None:
    sched = Scheduler(BatchingConfig(num_blocks=8, block_size=2, max_model_len=16, num_speculative_tokens=5))
    sched.add(Request(request_id="a", prompt=(1, 2, 3), max_tokens=12), 0.0)
    sched.commit(sched.plan(0.0), [(7,)], 0.0)
    assert sched.num_free_blocks == 6
    plan = sched.plan(0.0)
    assert plan.decode_drafts == (5,)
    assert sched.num_free_blocks == 3
    sched.commit(plan, [(7,)], 0.0)
    assert sched.num_free_blocks == 5, "positions 0 to 4 are known"
    plan = sched.plan(0.0)
    sched.commit(plan, [(7, 7, 7, 7, 7, 7)], 0.0)
    assert sched.num_free_blocks == 3, "positions 0 to 9 hold what was accepted"


def test_only_accepted_tokens_are_found_by_later_requests() -> None:
    sched = Scheduler(BatchingConfig(num_blocks=20, block_size=2, max_model_len=16, num_speculative_tokens=3))
    sched.add(Request(request_id="a", prompt=(1, 2, 3), max_tokens=8), 0.0)
    sched.commit(sched.plan(0.0), [(4,)], 0.0)
    sched.commit(sched.plan(0.0), [(5,)], 0.0)
    sched.abort("a", 0.0)
    for name, prompt, cached in (("b", (1, 2, 3, 4, 5, 6), 4), ("c", (1, 2, 3, 4, 9, 9, 9), 4)):
        sched.add(Request(request_id=name, prompt=prompt, max_tokens=1), 0.0)
        (end,) = sched.commit(sched.plan(0.0), [(7,)], 0.0)
        assert end.cached_tokens == cached


def test_totals_count_what_was_given_and_what_held_by_place() -> None:
    sched = Scheduler(BatchingConfig(num_blocks=20, max_model_len=64, num_speculative_tokens=3))
    sched.add(Request(request_id="a", prompt=(1,), max_tokens=30), 0.0)
    sched.commit(sched.plan(0.0), [(7,)], 0.0)
    for row, given in (((7, 7, 7), None), ((7,), [0]), ((7, 7), [1]), ((7,), None)):
        sched.commit(sched.plan(0.0), [row], 0.0, given)
    totals = sched.totals
    assert (totals.drafts, totals.drafted, totals.accepted_drafts) == (3, 7, 3)
    assert totals.accepted_at == [2, 1, 0]


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (64, 64)])
def test_batches_are_timed_together_with_those_padded_to_the_same_size(batch: int, size: int) -> None:
    assert bucket(batch) == size
