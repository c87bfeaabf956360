"""A simulated deployment loses no token and no block, and waits as long as arithmetic says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import Affine, LogNormal

from benthic.errors import ConfigError, DataError
from benthic.plan.serving.acceptance import Geometric
from benthic.plan.serving.cluster import Cluster, Link
from benthic.plan.serving.demand import Ask, Fixed, drawn
from benthic.plan.serving.fronts import FrontCost
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.steps import Measured
from benthic.sched.plans import BatchingConfig
from benthic.sched.replay import RecordingScheduler, replay

STEP = Affine(fixed=0.01, token=1e-4, context=1e-7)


def spec(role="decode", *, step=STEP, changes=None, **more) -> GroupSpec:
    values = {"num_blocks": 400, "block_size": 16, "max_model_len": 4096, "counted": True}
    return GroupSpec(role=role, batching=BatchingConfig(**values | (changes or {})), step=step, **more)


def blocks_are_free(cluster: Cluster) -> bool:
    lanes = cluster._lanes.values()
    return all(lane.scheduler.num_free_blocks == lane.scheduler.config.num_blocks for lane in lanes)


def test_one_request_takes_its_steps_one_after_another():
    step = Affine(fixed=0.5, token=0.01)
    outcome = Cluster([spec(step=step, depth=1)]).play([Ask(2.0, 10, 4)])
    (served,) = outcome.served
    assert served.ttft_s == pytest.approx(0.5 + 0.1)
    assert served.tpot_s == pytest.approx(0.51)
    assert outcome.end_s == pytest.approx(2.0 + 0.6 + 3 * 0.51)
    assert outcome.steps == 4


def test_the_hosts_work_hides_behind_the_device_only_when_steps_are_planned_ahead():
    step = Affine(fixed=0.1)
    plain, ahead = (
        Cluster([spec(step=step, depth=depth, host_s=0.05)]).play([Ask(0.0, 8, 21)]) for depth in (1, 2)
    )
    assert plain.end_s == pytest.approx(21 * 0.15)
    assert ahead.end_s == pytest.approx(21 * 0.1 + 0.05)


def test_the_hosts_part_of_a_prompt_shows_where_no_step_before_hides_it():
    changes = {"max_num_batched_tokens": 8, "max_num_seqs": 8}
    one = spec(step=Affine(fixed=0.1), prompt_host_s=0.03, changes=changes)
    (alone,) = Cluster([one]).play([Ask(0.0, 8, 3)]).served
    assert alone.ttft_s == pytest.approx(0.13)
    assert alone.tpot_s == pytest.approx(0.1), "steps that only decode have none"
    chained = Cluster([one]).play([Ask(0.0, 8, 1)] * 3).served
    assert [each.ttft_s for each in chained] == pytest.approx([0.13, 0.23, 0.33])


def test_late_planning_takes_a_request_along_that_comes_while_a_step_runs():
    asks = [Ask(0.0, 8, 60), Ask(2.04, 8, 5)]
    specs = [spec(step=Affine(fixed=0.1), host_s=0.01, late_s=late_s) for late_s in (None, 0.01)]
    at_once, late = (Cluster([each]).play(asks) for each in specs)
    waits = [outcome.served[1].ttft_s for outcome in (at_once, late)]
    assert waits == pytest.approx([0.07 + 0.1 + 0.1, 0.07 + 0.1])
    assert late.end_s == pytest.approx(at_once.end_s)
    assert late.steps == at_once.steps


def test_lanes_that_step_together_plan_at_once():
    with pytest.raises(ConfigError, match="2 lanes step together"):
        spec(lanes=2, late_s=0.002)


def test_pipeline_stages_start_the_next_prompts_before_the_last_are_through():
    step = Affine(fixed=1.0)
    asks = [Ask(0.25 * i, 10, 1) for i in range(4)]
    whole = Cluster([spec(step=step, depth=1, changes={"max_num_seqs": 1, "max_num_batched_tokens": 10})])
    piped = Cluster([spec(step=step, depth=2, stages=2, changes={"max_num_batched_tokens": 256})])
    assert whole.play(asks).end_s > piped.play(asks).end_s


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(1.0, 60.0),
    prefills=st.integers(0, 2),
    decodes=st.integers(1, 2),
    lanes=st.integers(1, 2),
    drafts=st.integers(0, 2),
    num_blocks=st.integers(40, 200),
)
def test_tokens_and_blocks_are_conserved(seed, rate, prefills, decodes, lanes, drafts, num_blocks):
    demand = drawn(LogNormal(prompt_tokens=90, output_tokens=30, most=600), 30, rate=rate, seed=seed)
    changes = {"num_blocks": num_blocks, "num_speculative_tokens": drafts, "max_num_batched_tokens": 256}
    acceptance = Geometric(alpha=0.7, seed=seed) if drafts else None
    specs = [spec("prefill", changes=changes | {"num_speculative_tokens": 0})] * prefills
    specs += [spec(changes=changes, lanes=lanes, acceptance=acceptance)] * decodes
    cluster = Cluster(specs, link=Link(block_bytes=1e6, bytes_per_second=1e9, latency_s=1e-4))
    outcome = cluster.play(demand)
    assert len(outcome.served) + outcome.refused == len(demand)
    generated = sum(t.generated_tokens for group in outcome.groups for t in group.totals)
    assert generated == sum(each.output_tokens for each in outcome.served)
    assert blocks_are_free(cluster)
    assert not any(lane.loads or lane.queued_tokens or lane.used_blocks for lane in cluster._lanes.values())
    for each in outcome.served:
        assert 0.0 < each.ttft_s <= each.e2e_s
        assert (each.tpot_s is None) == (each.output_tokens == 1)


def test_prompts_computed_elsewhere_are_pulled_once_and_their_leases_end():
    specs = [spec("prefill"), spec()]
    cluster = Cluster(specs, link=Link(block_bytes=1e6, bytes_per_second=1e8))
    outcome = cluster.play(drawn(Fixed(prompt_tokens=160, output_tokens=5), 20, rate=10.0))
    assert {(each.prefill, each.decode) for each in outcome.served} == {("prefill-0", "decode-1")}
    assert outcome.transferred_blocks == 20 * 10
    assert blocks_are_free(cluster)


def test_a_prefill_instance_that_holds_too_much_leaves_prompts_to_the_decode_side():
    slow = Link(block_bytes=1e6, bytes_per_second=1e5)
    specs = [spec("prefill", changes={"num_blocks": 30}), spec()]
    cluster = Cluster(specs, link=slow)
    outcome = cluster.play([Ask(0.0, 100, 3) for _ in range(12)])
    assert len(outcome.served) == 12
    assert blocks_are_free(cluster)


def test_a_faster_link_never_delays_a_request():
    ends = []
    for rate in (1e6, 1e7, 1e8, 1e9, math.inf):
        link = Link(block_bytes=1e5, bytes_per_second=rate)
        outcome = Cluster([spec("prefill"), spec()], link=link).play([Ask(0.0, 200, 20)])
        ends.append(outcome.end_s)
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > ends[-1]


@pytest.mark.parametrize(("late_ms", "steps"), [(1.5, 3), (2.5, 4)])
def test_a_pull_starts_behind_the_step_in_flight_and_the_next_plan_waits_two_milliseconds(late_ms, steps):
    link = Link(block_bytes=1.0, bytes_per_second=1e3 / late_ms)
    prefill, decode = spec("prefill", step=Affine(fixed=0.03)), spec(step=Affine(fixed=0.1))
    cluster = Cluster([prefill, decode], link=link)
    # the first decodes from 0.03 s + its pull on, a step each 0.1 s; the second is prefilled at 1.0 s
    first, second = cluster.play([Ask(0.0, 8, 60), Ask(0.97, 8, 2)]).served
    start = first.ttft_s + late_ms / 1e3
    noticed = start + 0.1 * math.ceil((1.0 - start) / 0.1)
    assert second.ttft_s == pytest.approx(0.03)
    assert 0.97 + second.e2e_s == pytest.approx(noticed + 0.1 * steps)


def test_a_request_is_handed_over_before_several_fronts_have_written_its_first_token():
    def end_s(fronts: int) -> float:
        specs = [spec("prefill", step=Affine(fixed=0.03)), spec(step=Affine(fixed=0.1))]
        return Cluster(specs, front=FrontCost(write_s=0.5), fronts=fronts).play([Ask(0.0, 8, 2)]).end_s

    assert end_s(1) == pytest.approx(0.03 + 0.5 + 0.1)
    assert end_s(2) == pytest.approx(0.03 + 0.1)


@pytest.mark.parametrize("fronts", [1, 2])
def test_a_hand_over_passes_the_main_process(fronts):
    def tpot_s(hub_s: float) -> float:
        specs = [spec("prefill", step=Affine(fixed=0.03)), spec(step=Affine(fixed=0.1))]
        front = FrontCost(hub_s=hub_s)
        (served,) = Cluster(specs, front=front, fronts=fronts).play([Ask(0.0, 8, 2)]).served
        return served.tpot_s or 0.0

    assert tpot_s(0.02) == pytest.approx(tpot_s(0.0) + 0.02)


@pytest.mark.parametrize("prompt_tokens", [1024, 1030])
def test_all_but_the_last_chunk_of_a_prompt_moves_while_the_rest_is_computed(prompt_tokens):
    step, link = Affine(fixed=0.1), Link(block_bytes=5.0, bytes_per_second=1000.0)  # 5 ms a block

    def second_token_s(*, caching: bool) -> float:
        prefill = spec("prefill", step=step, depth=1, changes={"max_num_batched_tokens": 256})
        decode = spec(step=step, depth=1, changes={"enable_prefix_caching": caching})
        cluster = Cluster([prefill, decode], link=link)
        outcome = cluster.play([Ask(0.0, prompt_tokens, 2)])
        assert outcome.transferred_blocks == -(-prompt_tokens // 16)
        assert blocks_are_free(cluster)
        return outcome.served[0].e2e_s - outcome.served[0].ttft_s

    columns, last = -(-prompt_tokens // 16), -(-prompt_tokens // 16) - (prompt_tokens - 1) // 256 * 16
    assert second_token_s(caching=False) == pytest.approx(columns * 0.005 + 0.1)
    assert second_token_s(caching=True) == pytest.approx(last * 0.005 + 0.1)


def test_drafts_that_hold_shorten_a_run_as_much_as_the_formula_says():
    alpha, outputs = 0.8, 4000
    changes = {"num_blocks": 1000, "max_model_len": 8192}
    step = Affine(fixed=0.01)
    plain = Cluster([spec(step=step, changes=changes)]).play([Ask(0.0, 10, outputs)])
    drafted = Cluster(
        [spec(step=step, changes=changes | {"num_speculative_tokens": 1}, acceptance=Geometric(alpha=alpha))]
    ).play([Ask(0.0, 10, outputs)])
    assert plain.end_s / drafted.end_s == pytest.approx(1 + alpha, rel=0.03)


def test_shared_beginnings_of_a_recording_are_computed_once():
    keys = tuple(range(10))
    asks = [Ask(float(i), 160, 2, keys) for i in range(5)]
    outcome = Cluster([spec()]).play(asks)
    assert [each.cached_tokens for each in outcome.served] == [0, 144, 144, 144, 144]


def test_requests_follow_their_prefix_to_the_instance_that_has_it():
    a, b = tuple(range(10)), tuple(range(100, 110))
    asks = [Ask(float(i), 160, 2, (a, b)[i % 2]) for i in range(8)]
    outcome = Cluster([spec("prefill"), spec("prefill"), spec()]).play(asks)
    assert len({each.prefill for each in outcome.served[::2]}) == 1
    assert sum(each.cached_tokens > 0 for each in outcome.served) == 6


def test_a_request_that_fits_nowhere_is_refused_and_counts_as_missed():
    outcome = Cluster([spec(changes={"num_blocks": 4})]).play([Ask(0.0, 1000, 5), Ask(0.0, 20, 5)])
    assert outcome.refused == 1
    assert len(outcome.served) == 1


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        ([], "0 requests"),
        ([Ask(-1.0, 5, 5)], "comes at -1.0 s"),
        ([Ask(math.nan, 5, 5)], "finite"),
        ([Ask(2.0, 5, 5), Ask(1.0, 5, 5)], "Sort the requests"),
        ([Ask(0.0, 0, 5)], "0 prompt"),
        ([Ask(0.0, 5, 0)], "0 output"),
    ],
)
def test_demand_that_cannot_be_played_is_refused_with_its_number(asks, words):
    with pytest.raises(DataError, match=words):
        Cluster([spec()]).play(asks)


def test_a_deployment_of_nothing_and_a_link_of_no_width_are_refused():
    with pytest.raises(ConfigError, match="0 instances"):
        Cluster([])
    with pytest.raises(ConfigError, match="above 0"):
        Link(block_bytes=1.0, bytes_per_second=0.0)
    with pytest.raises(ConfigError, match="acceptance"):
        spec(changes={"num_speculative_tokens": 1})
    with pytest.raises(ConfigError, match="counted"):
        spec(changes={"counted": False})


def test_a_simulated_run_is_a_recording_that_replays():
    lines: list[str] = []
    recording = spec(make=lambda config: RecordingScheduler(config, lines.append), changes={"num_blocks": 60})
    demand = drawn(LogNormal(prompt_tokens=90, output_tokens=30, most=600), 40, rate=30.0)
    outcome = Cluster([recording]).play(demand)
    replayed = replay(lines)
    assert replayed.requests == 40
    assert replayed.totals.generated_tokens == sum(each.output_tokens for each in outcome.served)


def test_recorded_step_times_bring_back_the_same_batches():
    seconds: list[float] = []

    def noisy(loads):
        seconds.append(0.01 + 0.003 * (len(seconds) % 7) + 1e-4 * sum(load.tokens for load in loads))
        return seconds[-1]

    demand = drawn(LogNormal(prompt_tokens=90, output_tokens=30, most=600), 40, rate=30.0)
    batches: list[list[str]] = [[], []]
    for step, lines in zip((noisy, Measured(seconds=seconds)), batches, strict=True):
        Cluster(
            [spec(step=step, make=lambda config, lines=lines: RecordingScheduler(config, lines.append))]
        ).play(demand)
    assert batches[0] == batches[1]
    with pytest.raises(DataError, match="one more"):
        Measured(seconds=[])(())
