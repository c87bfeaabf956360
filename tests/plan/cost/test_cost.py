"""Prices say where they come from, stay between their bounds, and never beat the roofline."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import ConfigError, UnknownFieldError
from benthic.plan.cost import machine as machines
from benthic.plan.cost.machine import Machine, Measured, Profile
from benthic.plan.cost.ops import (
    AllToAll,
    Attention,
    ChunkedPrefill,
    Collective,
    Gemm,
    GroupedGemm,
    MemoryBound,
    MlaDecode,
    PointToPoint,
)
from benthic.plan.cost.price import price
from benthic.plan.cost.priced import Total, coverage_bar, total
from benthic.plan.cost.roofline import floor
from benthic.spec import hardware as gpus

SIZE = st.integers(1, 100_000)
OPS = st.one_of(
    st.builds(Gemm, m=SIZE, n=SIZE, k=SIZE, dtype=st.sampled_from(["bf16", "fp8"])),
    st.builds(GroupedGemm, rows=SIZE, experts=st.integers(1, 256), n=SIZE, k=SIZE, skew=st.floats(1, 4)),
    st.builds(
        Attention,
        rows=st.integers(1, 8),
        heads=st.integers(1, 128),
        seq_len=SIZE,
        qk_dim=st.just(192),
        v_dim=st.just(128),
        backward=st.booleans(),
    ),
    st.builds(
        MlaDecode, requests=st.integers(1, 512), context=st.integers(512, 10**7), heads=st.integers(1, 128)
    ),
    st.builds(
        ChunkedPrefill,
        requests=st.just(1),
        tokens=SIZE,
        pairs=st.integers(100_000, 10**10),
        heads=st.just(16),
    ),
    st.builds(
        MemoryBound, bytes=st.floats(1, 1e11), name=st.sampled_from(["copy", "rms_norm", "unheard of"])
    ),
    st.builds(AllToAll, nvlink=st.floats(1, 1e9), network=st.floats(0, 1e9), ranks=st.integers(2, 256)),
    st.builds(PointToPoint, bytes=st.floats(1, 1e9), tier=st.sampled_from(["nvlink", "network"])),
    st.builds(
        Collective,
        name=st.sampled_from(["all-gather", "reduce-scatter", "all-reduce"]),
        bytes=st.floats(1, 1e11),
        ranks=st.sampled_from([8, 16, 128]),
        per_node=st.sampled_from([1, 8]),
    ),
)
RATES = ("bf16_flops", "fp8_flops", "hbm_bandwidth", "nvlink_bandwidth", "network_bandwidth")


@given(op=OPS, name=st.sampled_from(["h200", "h800", "b200", "h20"]))
def test_a_price_lies_between_its_bounds_and_never_beats_the_roofline(op, name):
    machine = machines.get(name)
    found = price(op, machine)
    assert floor(op, machine.hardware) <= found.low <= found.seconds <= found.high


@given(op=OPS, rate=st.sampled_from(RATES), factor=st.floats(1, 10), name=st.sampled_from(["h200", "h800"]))
def test_faster_hardware_never_raises_a_price(op, rate, factor, name):
    machine = machines.get(name)
    faster = dataclasses.replace(machine.hardware, **{rate: getattr(machine.hardware, rate) * factor})
    quick = dataclasses.replace(machine, hardware=faster)
    assert price(op, quick).seconds <= price(op, machine).seconds * (1 + 1e-9)


def test_what_was_measured_is_priced_as_measured_and_what_lies_between_is_interpolated():
    h200 = machines.get("h200")
    assert price(Gemm(m=4096, n=7168, k=2048), h200).provenance == "measured"
    between = price(Gemm(m=5000, n=7168, k=2048), h200)
    assert between.provenance == "interpolated"
    assert 650e12 < Gemm(m=5000, n=7168, k=2048).flops / between.seconds < 750e12


def test_another_machine_takes_over_the_share_of_the_roofline():
    op = Gemm(m=4096, n=7168, k=2048)
    h200, b200 = (price(op, machines.get(name)) for name in ("h200", "b200"))
    assert b200.provenance == "transferred"
    assert h200.seconds / b200.seconds == pytest.approx(2250 / 989, rel=0.05)


def test_without_any_points_the_roofline_is_what_is_left():
    bare = Machine(hardware=gpus.get("h100"))
    assert price(Gemm(m=4096, n=4096, k=4096), bare).provenance == "roofline"


def test_deepseeks_own_kernels_price_its_own_shapes():
    h800 = machines.get("h800")
    experts = GroupedGemm(rows=8 * 4096, experts=8, n=4096, k=7168, dtype="fp8")
    assert experts.flops / price(experts, h800).seconds == pytest.approx(1288e12, rel=0.01)
    # 4096 tokens to 4 of 8 nodes at 51 GB/s, counted with the sender's own node
    dispatch = AllToAll(nvlink=4096 * 7.36 * 7392 * 7 / 8, network=4096 * 4 * 7392 * 7 / 8, ranks=64)
    assert price(dispatch, h800).seconds == pytest.approx(4096 * 4 * 7392 / 51e9, rel=0.05)


def test_a_gradient_added_to_its_sum_takes_longer_than_the_same_product_forward():
    h800 = machines.get("h800")
    output = Gemm(m=4096, n=24576, k=1536, dtype="fp8")
    gradient = Gemm(m=24576, n=1536, k=4096, dtype="fp8", name="gradient")
    assert gradient.flops / price(gradient, h800).seconds == pytest.approx(986e12, rel=0.01)
    turned = Gemm(m=1536, n=24576, k=4096, dtype="fp8", name="gradient")
    assert price(turned, h800).seconds == price(gradient, h800).seconds >= price(output, h800).seconds
    for n, k in ((4096, 7168), (7168, 2048)):
        experts = GroupedGemm(rows=32768, experts=4, n=n, k=k, dtype="fp8")
        added = price(dataclasses.replace(experts, gradient=True), h800)
        assert added.provenance == "measured"
        assert added.seconds > price(experts, h800).seconds


def test_a_skewed_expert_load_costs_what_the_busiest_rank_computes():
    h800 = machines.get("h800")
    even, skewed = (
        price(GroupedGemm(rows=32768, experts=4, n=4096, k=7168, dtype="fp8", skew=skew), h800).seconds
        for skew in (1.0, 1.5)
    )
    assert skewed / even == pytest.approx(1.5, rel=0.1)


def test_a_profile_survives_its_file(tmp_path):
    points = tuple(Measured(Gemm(m=m, n=64, k=64, dtype="fp8"), m * 1e-6, "a test") for m in (16, 32))
    written = Profile(hardware="h200", source="a test", points=points, overheads={"block": 1e-3})
    path = tmp_path / "profile.json"
    path.write_text(written.as_json())
    found = machines.read(path)
    assert (found.points, found.overheads, found.hardware) == (points, {"block": 1e-3}, "h200")
    own = machines.get("h200", profile=found)
    assert price(Gemm(m=16, n=64, k=64, dtype="fp8"), own).seconds == 16e-6
    assert own.overhead("block") == 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("{}", "lacks format, hardware, overheads, points, source"),
        ('{"format": 9, "hardware": "", "source": "", "overheads": {}, "points": []}', "format 9"),
        (
            '{"format": 1, "hardware": "", "source": "", "overheads": {}, "points": [["Gem", {}, 1, ""]]}',
            "Did you mean 'Gemm'",
        ),
        (
            (
                '{"format": 1, "hardware": "", "source": "", "overheads": {}, '
                '"points": [["MemoryBound", {"bytes": 8}, 0, ""]]}'
            ),
            "must be above 0",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_reason(text, words):
    with pytest.raises(ConfigError, match=words):
        machines.parse(text, where="a file")


def test_unknown_gpus_and_missing_fp8_are_refused():
    with pytest.raises(UnknownFieldError, match="Did you mean 'h200'"):
        machines.get("h2000")
    with pytest.raises(ConfigError, match="a100 has no FP8"):
        price(Gemm(m=64, n=64, k=64, dtype="fp8"), machines.get("a100"))
    with pytest.raises(ConfigError, match="gpus_per_node = 0"):
        machines.get("h200", gpus_per_node=0)


@given(st.lists(OPS, max_size=6), st.floats(0, 100))
def test_sums_keep_every_second_and_its_provenance(ops, count):
    h200 = machines.get("h200")
    prices = [price(op, h200) for op in ops]
    whole = total(prices)
    assert whole.seconds == pytest.approx(sum(p.seconds for p in prices))
    assert sum(whole.shares) == pytest.approx(whole.seconds)
    assert (whole + Total()).shares == whole.shares
    assert whole.times(count).seconds == pytest.approx(count * whole.seconds)
    assert len(coverage_bar(whole.coverage).split("]")[0]) == 41


def test_importing_the_cost_model_needs_no_torch():
    code = "import sys, benthic.plan.cost.price, benthic.plan.cost.machine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
