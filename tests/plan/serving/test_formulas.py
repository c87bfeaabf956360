"""Closed forms, published numbers and DistServe's placements come out as printed."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import LogNormal

from benthic.errors import ConfigError, DataError, UnknownFieldError
from benthic.plan.serving.acceptance import Geometric, expected_tokens
from benthic.plan.serving.demand import SHAREGPT, Ask, Fixed, Resampled, drawn, recorded
from benthic.plan.serving.distserve import Degrees, Study, algorithm_1, algorithm_2, fit_of, instance
from benthic.plan.serving.examples import serving_examples
from benthic.plan.serving.goodput import Targets, find_goodput
from benthic.plan.serving.outcome import Outcome, Served, quantile
from benthic.plan.serving.queueing import Phases, load_for_wait, mean_ttft
from benthic.spec.objectives import Objectives
from benthic.spec.traces import TraceRequest

CHAT = Targets(objectives=Objectives(ttft_s=0.2, tpot_s=0.1))


@pytest.mark.parametrize("worked", serving_examples(), ids=lambda worked: worked.title)
def test_a_worked_example_comes_out_as_published(worked):
    if worked.published is None:
        return
    allowed = {"tokens/s/GPU": 0.2, "x": 0.03}.get(worked.unit, 0.002)
    assert abs(worked.error) < allowed, worked


def test_distserve_bears_as_much_a_gpu_as_its_own_simulator_says():
    per_gpu = []
    for seed in range(4):
        study = Study(model="opt-13b", lengths=SHAREGPT, targets=CHAT, seed=seed, precision=0.08)
        per_gpu.append(study.joint_goodput(Degrees(2, 1), Degrees(1, 1)).rate / 3)
    assert statistics.mean(per_gpu) == pytest.approx(1.5625, rel=0.05)


def test_the_first_algorithm_takes_the_best_of_each_phase_and_counts_instances():
    study = Study(model="opt-13b", lengths=SHAREGPT, targets=CHAT, requests=40, precision=0.3)
    placed = algorithm_1(study, rate=20.0, nodes=1, gpus_per_node=2)
    assert placed.prefills * study.prefill_goodput(placed.prefill).rate >= 20.0
    assert placed.decodes * study.decode_goodput(placed.decode).rate >= 20.0
    assert placed.gpus == placed.prefills * placed.prefill.gpus + placed.decodes * placed.decode.gpus


def test_the_second_algorithm_keeps_pairs_inside_a_node():
    study = Study(model="opt-13b", lengths=SHAREGPT, targets=CHAT, requests=40, precision=0.3)
    placed = algorithm_2(study, rate=3.0, nodes=1, gpus_per_node=3)
    assert placed.prefill.gpus + placed.decode.gpus <= 3
    assert placed.prefills == placed.decodes
    with pytest.raises(ConfigError, match="no pair"):
        algorithm_2(study, rate=3.0, nodes=1, gpus_per_node=1)


def test_the_fit_is_the_published_line():
    step = instance("opt-13b", "prefill", Degrees(2, 1)).step
    from benthic.plan.serving.steps import StepLoad

    load = StepLoad(0, 0, 0, 755, 755 * 756 // 2, 755, 1)
    published = 14.7430 + 0.068577 * 755 + 2.4496e-6 * 755**2 + 1 + 2 + 1e-4 * 755
    assert step([load]) == pytest.approx(published / 1e3)
    with pytest.raises(UnknownFieldError):
        fit_of("opt-14b", 1)
    with pytest.raises(UnknownFieldError):
        fit_of("opt-13b", 3)


def test_a_queue_that_never_ends_is_refused():
    with pytest.raises(ConfigError, match="never ends"):
        mean_ttft(0.1, 10.0)


@given(st.floats(0.01, 2.0), st.floats(0.0, 5.0), st.floats(0.5, 0.99))
def test_who_may_wait_longer_may_load_more(service, wait, share):
    assert 0.0 <= load_for_wait(service, wait, share) <= load_for_wait(service, wait + 0.1, share) <= 1.0


@given(st.floats(0.5, 20.0), st.floats(0.5, 20.0), st.integers(1, 4), st.integers(1, 4), st.integers(8, 40))
def test_the_best_counts_bear_as_much_as_any_that_fit(prefill, decode, p_gpus, d_gpus, gpus):
    phases = Phases(prefill, decode, p_gpus, d_gpus)
    n, m = phases.best(gpus)
    assert n * p_gpus + m * d_gpus <= gpus
    most = max(
        min(p * prefill, d * decode)
        for p in range(1, gpus)
        for d in range(1, gpus)
        if p * p_gpus + d * d_gpus <= gpus
    )
    assert min(n * prefill, m * decode) == pytest.approx(most)
    assert phases.per_gpu(n, m) <= phases.bound * (1 + 1e-9)


def test_too_few_gpus_for_both_phases_are_refused():
    with pytest.raises(ConfigError, match="need 3"):
        Phases(1.0, 1.0, 1, 2).best(2)


def test_drawn_acceptance_has_the_expected_length():
    counts = Geometric(alpha=0.7, seed=3).counts([3] * 20_000)
    assert min(counts) == 1
    assert max(counts) == 4
    assert statistics.mean(counts) == pytest.approx(expected_tokens(0.7, 3), rel=0.01)
    assert expected_tokens(1.0, 3) == 4.0
    with pytest.raises(ConfigError, match="probability"):
        Geometric(alpha=1.2)


def test_a_goodput_search_finds_the_edge_and_says_when_there_is_none():
    def run(rate: float) -> Outcome:
        late = Served(0.0, 1, 2, 1.0 if rate > 7.3 else 0.1, 0.01, 1.0, 0, 0, "a", "a")
        return Outcome(served=(late,), refused=0, end_s=1.0, groups=())

    targets = Targets(objectives=Objectives(ttft_s=0.5))
    for start in (0.1, 7.0, 90.0):
        found = find_goodput(run, targets, start=start, precision=0.01)
        assert found.rate <= 7.3 < found.failed
        assert found.rate == pytest.approx(7.3, rel=0.011)
        assert found.at_best.attainment == 1.0
    assert find_goodput(run, targets, start=1.0, most=4.0).failed == float("inf")
    assert find_goodput(run, Targets(objectives=Objectives(ttft_s=0.01)), start=1.0).rate == 0.0
    with pytest.raises(ConfigError):
        find_goodput(run, targets, start=0.0)


@pytest.mark.parametrize("objectives", [Objectives(), Objectives(tpot_s=0.5)])
def test_where_nothing_bounds_waiting_a_rate_at_which_waits_grow_fails(objectives):
    def run(rate: float) -> Outcome:  # a second each, in turn
        waits = [max(0.0, i * (1.0 - 1.0 / rate)) for i in range(600)]
        served = [Served(i / rate, 1, 2, 1.0 + w, 0.1, 2.0 + w, 0, 0, "a", "a") for i, w in enumerate(waits)]
        return Outcome(served=tuple(served), refused=0, end_s=1.0, groups=())

    found = find_goodput(run, Targets(objectives=objectives), start=0.3, precision=0.01)
    assert found.rate == pytest.approx(1.0, rel=0.02)
    late = Targets(objectives=Objectives(ttft_s=100.0))
    assert find_goodput(run, late, start=0.3, precision=0.01).rate > 1.1, "a target says how long"
    assert not Outcome(served=(), refused=0, end_s=0.0, groups=()).falls_behind


def test_joint_attainment_wants_both_targets_of_one_request():
    rows = [(0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.1, 0.1)]
    served = [Served(0.0, 1, 2, ttft, tpot, 1.0, 0, 0, "a", "a") for ttft, tpot in rows]
    outcome = Outcome(served=tuple(served), refused=1, end_s=1.0, groups=())
    assert outcome.attainment(Objectives(ttft_s=0.5, tpot_s=0.5)) == 2 / 5
    assert outcome.attainment(Objectives(ttft_s=0.5)) == 3 / 5
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5


def test_two_rates_of_one_seed_ask_the_same_lengths():
    lengths = LogNormal(prompt_tokens=500, output_tokens=100, most=2000)
    slow, fast = (drawn(lengths, 200, rate=rate, seed=5) for rate in (1.0, 4.0))
    assert [ask[1:] for ask in slow] == [ask[1:] for ask in fast]
    assert slow[-1].at_s == pytest.approx(4 * fast[-1].at_s)
    assert max(p + o for _, p, o, _ in slow) <= 2000


def test_sharegpts_lengths_have_the_published_means():
    pairs = SHAREGPT.draw(random.Random(1), 20_000)  # noqa: S311 (lengths)
    assert statistics.mean(p for p, _ in pairs) == pytest.approx(755, rel=0.03)
    assert statistics.mean(o for _, o in pairs) == pytest.approx(200, rel=0.06)
    assert max(p + o for p, o in pairs) <= 2048
    assert Resampled(((10, 2), (30, 4))).mean == (20.0, 3.0)


def test_hashes_of_a_recording_become_keys_of_whole_blocks():
    trace = (TraceRequest(at_s=0.0, prompt_tokens=1100, output_tokens=5, block_hashes=(3, 9, 4)),)
    (ask,) = recorded(trace, 256)
    assert ask == Ask(0.0, 1100, 5, (6, 7, 18, 19))
    with pytest.raises(ConfigError, match="divisor of 512"):
        recorded(trace, 48)
    with pytest.raises(ConfigError):
        Fixed(prompt_tokens=0, output_tokens=1)
    with pytest.raises(DataError):
        recorded((TraceRequest(at_s=-1.0, prompt_tokens=1, output_tokens=1),), 64)
