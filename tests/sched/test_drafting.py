"""How many drafts pay off: decided from times and acceptance that are given, not from a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benthic.sched.batching import BatchingConfig, Request, Scheduler
from benthic.sched.drafting import bucket

Cost = Callable[[int, int], float]


@dataclass
class Run:
    """What a run chose, how long it took and how many tokens it made."""

    chosen: list[int]
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(
    cost: Cost,
    held: Callable[[int], int],
    *,
    batch: int,
    most: int = 3,
    steps: int = 60,
    adaptive: bool = True,
    sched: Scheduler | None = None,
    length: int = 16000,
) -> Run:
    """Decode steps of `batch` equal requests; a step of d drafts takes `cost(batch, d)`."""
    sched = sched or scheduler(batch, most, adaptive=adaptive)
    now, found = 0.0, Run([], 0.0, 0)
    for i in range(batch):
        sched.add(Request(request_id=str(i), prompt_len=4, max_tokens=length), now)
    sched.commit_counts(sched.plan(now), now)
    while len(found.chosen) < steps and sched.has_work:
        plan = sched.plan(now)
        drafts = max(plan.decode_drafts, default=0)
        now += cost(len(plan.decode_ids), drafts)
        counts = [1 + min(held(i), d) for i, d in enumerate(plan.decode_drafts)]
        sched.commit_counts(plan, now, counts)
        found.chosen.append(drafts)
        found.tokens += sum(counts)
    found.seconds = now
    return found


def scheduler(batch: int, most: int, *, adaptive: bool = True) -> Scheduler:
    return Scheduler(
        BatchingConfig(
            num_blocks=batch * 300,
            max_model_len=16384,
            num_speculative_tokens=most,
            adaptive_drafts=adaptive,
            counted=True,
        )
    )


def idle_device(batch: int, drafts: int) -> float:
    """Verification is nearly free."""
    return 1.0 + 0.02 * drafts * batch


def busy_device(batch: int, drafts: int) -> float:
    """Every row costs the same."""
    return 0.1 + 0.1 * batch * (1 + drafts)


def slow_drafter(batch: int, drafts: int) -> float:
    """A draft takes longer than a step of the model itself, whatever the batch."""
    return 1.0 + 2.0 * drafts


def test_one_sequence_on_an_idle_device_takes_all_drafts() -> None:
    chosen = run(idle_device, lambda _: 3, batch=1).chosen
    assert chosen[:3] == [0] * 3, "steps without drafts are measured first"
    assert set(chosen[3:]) == {3}


def test_a_batch_that_fills_the_device_takes_none_though_half_of_the_drafts_hold() -> None:
    chosen = run(busy_device, lambda i: i % 2 * 3, batch=64).chosen
    assert chosen[3] == 3, "it has to try"
    assert set(chosen[5:]) == {0}


def test_drafts_that_never_hold_are_given_up_however_cheap_they_are() -> None:
    found = run(idle_device, lambda _: 0, batch=1, steps=300)
    assert found.chosen[3] == 3
    assert found.chosen[100:].count(0) > 170
    assert found.seconds < 1.02 * 300


def test_a_draft_that_mostly_holds_is_taken_and_those_behind_it_that_do_not_are_left() -> None:
    found = run(lambda _, drafts: 1.0 + 0.1 * drafts, lambda _: 1, batch=2, steps=200)
    assert found.chosen[100:].count(1) > 90


@pytest.mark.parametrize("cost", [idle_device, busy_device, slow_drafter])
@pytest.mark.parametrize("batch", [1, 3, 16, 64])
@pytest.mark.parametrize("held", [0, 1, 3])
def test_a_long_run_loses_little_against_the_best_number_in_hindsight(
    cost: Cost, batch: int, held: int
) -> None:
    """A thirtieth at most, trials and probes included."""

    def fixed(most: int) -> float:
        if not most:
            return batch / cost(batch, 0)
        return run(cost, lambda _: held, batch=batch, most=most, adaptive=False, steps=20).rate

    best = max(map(fixed, range(4)))
    assert run(cost, lambda _: held, batch=batch, steps=800).rate > 29 / 30 * best


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_run_of_128_tokens_whose_drafts_never_pay_is_almost_as_fast_as_without(batch: int) -> None:
    """Requests end one by one, so that the batch goes through every size."""

    def held(i: int) -> int:
        return i % 3

    sched = scheduler(batch, 3)
    found = run(slow_drafter, held, batch=batch, steps=10_000, sched=sched, length=128)
    drafted = sum(drafts > 0 for drafts in found.chosen)
    assert 2 <= drafted <= 16
    assert found.chosen[-60:].count(0) > 50


def test_what_one_batch_size_taught_holds_for_those_near_it() -> None:
    sched, now = scheduler(64, 3), 0.0
    for i in range(64):
        sched.add(Request(request_id=str(i), prompt_len=4, max_tokens=40 + 40 * i), now)
    sched.commit_counts(sched.plan(now), now)
    tries: dict[int, int] = {}
    while sched.has_work:
        plan = sched.plan(now)
        size, drafts = bucket(len(plan.decode_ids)), max(plan.decode_drafts, default=0)
        tries[size] = tries.get(size, 0) + (drafts > 0)
        now += slow_drafter(size, drafts)
        sched.commit_counts(plan, now)
    assert tries[64] == 2
    assert tries[56] == tries[48] == tries[40] == 0, "40 to 320 steps each, too few for a probe"


def test_a_slow_first_step_with_drafts_does_not_speak_against_them() -> None:
    """It compiled something."""
    first = iter([50.0])

    def cost(_: int, drafts: int) -> float:
        return next(first, 1.1) if drafts else 1.0

    assert set(run(cost, lambda _: 3, batch=1).chosen[3:]) == {3}


def test_sequences_that_get_no_drafts_count_as_ones_whose_drafts_did_not_hold() -> None:
    """Prompt lookup finds something for one sequence in four; the step gets longer for all."""
    config = BatchingConfig(
        num_blocks=600, max_model_len=4096, num_speculative_tokens=3, adaptive_drafts=True
    )
    sched, now, chosen = Scheduler(config), 0.0, []
    for i in range(8):
        sched.add(Request(request_id=str(i), prompt=(i,), max_tokens=2000), now)
    sched.commit(sched.plan(now), [(7,)] * 8, now)
    for _ in range(60):
        plan = sched.plan(now)
        given = [drafts * (i % 4 == 0) for i, drafts in enumerate(plan.decode_drafts)]
        now += 2.0 if any(given) else 1.0
        sched.commit(plan, [(7,) * (1 + drafts) for drafts in given], now, given)
        chosen.append(max(plan.decode_drafts))
    assert 3 in chosen
    assert set(chosen[8:30]) == {0}, "1.75 tokens in twice the time"


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
        now += 0.5 + 3.0 * (len(plan.decode_ids) * (1 + drafts) > 40)
        sched.commit_counts(plan, now, [1 + d for d in plan.decode_drafts] + [1] * len(plan.prefills))
        by_batch.setdefault(len(plan.decode_ids), []).append(drafts)
    assert set(by_batch[1][8:]) == {2}
    assert max(by_batch[32]) == 2
    assert set(by_batch[32][8:]) == {0}


def test_after_a_while_without_drafts_they_are_tried_again() -> None:
    good_from, step = 500, iter(range(10_000))

    def cost(_: int, drafts: int) -> float:
        return 1.0 + 0.1 * drafts

    chosen = run(cost, lambda _: 0 if next(step) < good_from else 3, batch=1, steps=3000).chosen
    assert chosen[100:good_from].count(0) > 350
    assert chosen[-1] == 3


def test_a_batch_whose_steps_always_carry_prompts_drafts_nothing() -> None:
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
    for _ in range(50):
        plan = sched.plan(now)
        now += 1.0
        sched.commit_counts(plan, now)
        chosen += list(plan.decode_drafts)
    assert set(chosen) == {0}


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
