"""Roles follow the load, within bounds, and stay when it stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from changing_load import DECODE, MOST_SEQS, MOST_TOKENS, FluidFleet, Load
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.sched.paces import LEAST_SHARE, Line, Pace
from benthic.sched.replan import Needs, ReplanConfig, Replanner, Report, Split, load_within

CONFIG = ReplanConfig(max_num_batched_tokens=MOST_TOKENS, max_num_seqs=MOST_SEQS, window_s=20.0, dwell_s=60.0)


def fleet(prefill: int, decode: int, *, config: ReplanConfig = CONFIG, **more: float) -> FluidFleet:
    return FluidFleet(Replanner(config), prefill, decode, **more)


needs = st.floats(0.05, 6.0)
loads = st.builds(Load.needing, needs, needs)


@settings(max_examples=25, deadline=None)
@given(
    prefill=st.integers(1, 4),
    decode=st.integers(1, 4),
    phases=st.lists(st.tuples(loads, st.integers(30, 200)), min_size=1, max_size=4),
    noise=st.floats(0.0, 0.9),
    seed=st.integers(0, 1000),
)
def test_whatever_the_load_does_one_of_each_kind_stays_and_roles_stay_for_the_dwell_time(
    prefill: int, decode: int, phases: list, noise: float, seed: int
) -> None:
    cluster = fleet(prefill, decode, noise=noise, seed=seed)
    for load, seconds in phases:
        cluster.run(load, seconds)
        assert min(cluster.split) >= 1
        assert sum(cluster.split) == prefill + decode
    times = [at for at, _ in cluster.changes]
    assert all(at >= CONFIG.dwell_s for at in times)
    assert all(late - early >= CONFIG.dwell_s for early, late in pairwise(times))


@settings(max_examples=10, deadline=None)
@given(
    prefill=st.integers(1, 4),
    decode=st.integers(1, 4),
    load=loads,
    noise=st.floats(0.1, 0.3),
    seed=st.integers(0, 1000),
)
def test_under_a_constant_load_no_role_changes_back_and_then_none_changes_at_all(
    prefill: int, decode: int, load: Load, noise: float, seed: int
) -> None:
    cluster = fleet(prefill, decode, noise=noise, seed=seed)
    each = CONFIG.dwell_s + cluster.drain_s + 2 * CONFIG.window_s + 4
    changes = cluster.run(load, (prefill + decode) * each)
    assert len({change.role for change in changes}) <= 1
    assert cluster.run(load, 500.0) == []


@settings(max_examples=25, deadline=None)
@given(size=st.integers(3, 5), to_decode=st.booleans(), load=st.floats(0.6, 0.85), noise=st.floats(0.1, 0.25))
def test_a_shift_of_the_load_is_followed_within_two_windows_of_the_dwell_time(
    size: int, *, to_decode: bool, load: float, noise: float
) -> None:
    few, many = load, load * (size - 1)
    cluster = fleet(size - 1, 1, noise=noise) if to_decode else fleet(1, size - 1, noise=noise)
    before, after = (Load.needing(many, few), Load.needing(few, many))
    if not to_decode:
        before, after = after, before
    assert cluster.run(before, 300.0) == []
    shifted = cluster.now
    each = CONFIG.dwell_s + cluster.drain_s + 3
    cluster.run(after, 2 * CONFIG.window_s + 3)
    assert len(cluster.changes) == 1, "the dwell time was over: two windows are enough"
    assert cluster.changes[0][0] - shifted <= 2 * CONFIG.window_s + 2
    cluster.run(after, (size - 3) * each)
    wanted = Split(1, size - 1) if to_decode else Split(size - 1, 1)
    assert cluster.split == wanted
    assert all(change.role == ("decode" if to_decode else "prefill") for _, change in cluster.changes)


@settings(max_examples=20, deadline=None)
@given(
    prefill=st.integers(1, 4),
    decode=st.integers(1, 4),
    level=st.floats(0.1, 1.2),
    noise=st.floats(0.1, 0.3),
    seed=st.integers(0, 1000),
)
def test_a_balanced_load_changes_nothing(
    prefill: int, decode: int, level: float, noise: float, seed: int
) -> None:
    cluster = fleet(prefill, decode, noise=noise, seed=seed)
    assert cluster.run(Load.needing(level * prefill, level * decode), 400.0) == []


def test_a_fleet_with_room_in_both_roles_is_left_alone() -> None:
    assert fleet(3, 1).run(Load.needing(0.1, 0.4), 600.0) == []
    assert len(fleet(3, 1).run(Load.needing(0.1, 0.6), 100.0)) == 1


def test_a_burst_shorter_than_a_window_changes_nothing() -> None:
    cluster = fleet(2, 2)
    cluster.run(Load.needing(1.0, 1.0), 300.0)
    cluster.run(Load.needing(1.0, 2.0), CONFIG.window_s / 2)
    assert cluster.run(Load.needing(1.0, 1.0), 300.0) == []
    assert cluster.changes == []


def test_a_wanted_time_per_token_asks_for_more_decode_instances() -> None:
    slow = Load.needing(0.6, 1.0)
    assert fleet(2, 2).run(slow, 300.0) == []
    batch = 20
    tight = replace(CONFIG, tpot_s=DECODE.seconds(batch))
    cluster = fleet(2, 2, config=tight)
    (change,) = cluster.run(slow, 300.0)
    assert change.role == "decode"
    assert change.needs.output_speed == pytest.approx(batch / DECODE.seconds(batch), rel=0.1)


def test_a_wanted_time_to_first_token_asks_for_more_prefill_instances() -> None:
    load = Load.needing(1.0, 0.8)
    assert fleet(2, 2).run(load, 300.0) == []
    alone_s = load.length / (Load.needing(1.0, 1.0).prompt)
    cluster = fleet(2, 2, config=replace(CONFIG, ttft_s=1.25 * alone_s))
    (change,) = cluster.run(load, 300.0)
    assert change.role == "prefill"
    assert change.needs.prefill == pytest.approx(3.0, rel=0.1)


def test_blocks_in_use_are_a_need_of_their_own() -> None:
    replanner = Replanner(CONFIG)
    names = [("prefill-0", "prefill", 0.0), ("prefill-1", "prefill", 0.0), ("decode-2", "decode", 0.88)]
    change = None
    for second in range(70):
        reports = [
            Report(
                name,
                role,
                steady=True,
                used_share=used,
                steps=20 * second * (role == "decode"),
                step_seconds=0.3 * second,
                rows=1280 * second,
                tokens=1280 * second,
            )
            for name, role, used in names
        ]
        change = change or replanner.observe(float(second), reports)
    assert change is not None
    assert change.needs.room == pytest.approx(0.88 / 0.9)
    assert (change.name, change.role, change.after) == ("prefill-0", "decode", Split(1, 2))


def test_nothing_is_decided_while_an_instance_starts_drains_or_changes() -> None:
    cluster = fleet(3, 1)
    cluster.instances["prefill-0"].draining_until = 500.0
    assert cluster.run(Load.needing(0.2, 2.0), 499.0) == []
    assert cluster.replanner.needs is None
    assert cluster.run(Load.needing(0.2, 2.0), CONFIG.dwell_s) == []
    assert len(cluster.run(Load.needing(0.2, 2.0), 5.0)) == 1


def test_the_instance_with_the_least_to_finish_changes() -> None:
    replanner = Replanner(CONFIG)
    replanner.needs = Needs(
        prefill=0.1,
        decode=1.0,
        prompt_rate=100.0,
        prompt_speed=1000.0,
        output_rate=1000.0,
        output_speed=1000.0,
        room=0.0,
    )
    reports = [
        Report("prefill-0", "prefill", steady=True, num_requests=3),
        Report("prefill-1", "prefill", steady=True, num_requests=1, queued_tokens=900),
        Report("prefill-2", "prefill", steady=True, num_requests=1, queued_tokens=20),
        Report("decode-3", "decode", steady=True),
    ]
    assert replanner._want(reports).name == "prefill-2"


def test_a_change_says_the_numbers_that_led_to_it() -> None:
    cluster = fleet(2, 1)
    (change,) = cluster.run(Load.needing(0.4, 0.9), 100.0)
    said = str(change)
    assert "is to decode: prefill needs 0.4" in said
    assert "with 1P2D instead of 2P1D the busier role is" in said
    assert f"{change.needs.output_speed:.0f} each" in said
    assert change.needs.utilisation(change.after) <= 0.8 * change.needs.utilisation(change.before)


@given(service=st.floats(0.001, 10.0), factor=st.floats(0.1, 100.0))
def test_the_load_within_a_target_has_a_mean_wait_that_keeps_it(service: float, factor: float) -> None:
    target = factor * service
    load = load_within(service, target)
    assert LEAST_SHARE <= load < 1.0
    if load > LEAST_SHARE:
        assert service + load * service / (2 * (1 - load)) == pytest.approx(target)


@given(base=st.floats(0.001, 0.1), slope=st.floats(1e-5, 1e-2))
def test_a_pace_finds_the_line_behind_its_steps_and_no_single_step_moves_it(
    base: float, slope: float
) -> None:
    pace, line = Pace(256), Line(base, slope)
    for size in (4, 16, 40, 100):
        pace.add(size, 100 * line.seconds(size))  # something was compiled
        for _ in range(3):
            pace.add(size, line.seconds(size))
    assert pace.within().speed == pytest.approx(256 / line.seconds(256))
    bounded = pace.within(line.seconds(64)).speed
    assert bounded == pytest.approx(max(64 / line.seconds(64), LEAST_SHARE * 256 / line.seconds(256)))


def test_a_pace_says_nothing_before_it_knows_how_time_grows() -> None:
    pace = Pace(64)
    for _ in range(20):
        pace.add(8, 0.01)
    assert pace.within() is None
    for _ in range(20):
        pace.add(60, 0.02)
    assert pace.within().speed == pytest.approx(64 / (0.02 + 4 * 0.01 / 52))
    full = Pace(64)
    for _ in range(3):
        full.add(64, 0.02)
    assert full.within().speed == pytest.approx(3200.0)


def test_noise_makes_neither_steps_without_time_nor_large_ones_that_are_shorter() -> None:
    for points in ([(10, 0.02), (40, 0.01)], [(10, 0.001), (40, 0.1)]):
        pace = Pace(64)
        for size, seconds in points:
            for _ in range(3):
                pace.add(size, seconds)
        line = pace.line()
        assert line.base >= 0.0
        assert line.slope >= 0.0
        assert pace.within().speed > 0.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window_s": 0.0}, r"window_s = 0\.0"),
        ({"dwell_s": 5.0}, r"window_s = 20\.0 and dwell_s = 5\.0"),
        ({"gain": 0.0}, r"gain = 0\.0"),
    ],
)
def test_a_rule_out_of_range_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **setting)
