"""FP8 products of some dozens of rows in Gluon: how they are divided, and both kernels run by Python.

In Python layouts are left out; loads, barriers, what a program multiplies and where sums go are not.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gluon_threads import Described, Pointer, each_program, gluon_language, in_python, load, take_all, unload
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_split as module
from benthic.kernels import gluon_fp8_tiles, ops
from benthic.kernels.host import cdiv

DEEPSEEK_V3 = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
DIVIDED = {
    64: [
        (64, 1, 14, False), (64, 3, 12, True), (64, 2, 8, True),
        (64, 3, 37, False), (64, 2, 14, False), (64, 1, 16, True),
    ],
    128: [
        (128, 2, 8, False), (128, 3, 12, True), (128, 2, 8, True),
        (128, 3, 37, False), (128, 2, 14, False), (128, 1, 16, True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("rows", DIVIDED)
def test_weights_of_deepseek_v3_are_divided_over_an_h200(rows):
    assert [module.division(rows, n, k, 132) for n, k in DEEPSEEK_V3] == DIVIDED[rows]


@given(st.integers(1, 300), st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 140))
def test_a_division_has_no_more_programs_than_multiprocessors(rows, n_dim, k_dim, processors):
    tall, groups, share, whole = module.division(rows, n_dim, k_dim, processors)
    k_tiles = cdiv(k_dim, 128)
    assert cdiv(cdiv(rows, tall) * cdiv(n_dim, groups * 64) * k_tiles, share) <= processors
    assert share >= min(k_tiles, module.LEAST)
    assert whole == (share % k_tiles == 0)
    assert module.division(rows, n_dim, k_dim, processors) == (tall, groups, share, whole)


def test_no_rows_launch_nothing():
    weight = ops.quantise_fp8_weight(torch.zeros(72, 256), impl="reference")
    none = ops.Fp8(torch.zeros(0, 256).to(torch.float8_e4m3fn), torch.zeros(0, 2))
    assert module.linear(none, weight, None, dtype=torch.bfloat16).shape == (0, 72)


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(
        load=take_all,
        minimum=lambda a, b: torch.clamp(a, max=b) if isinstance(a, torch.Tensor) else min(a, b),
    )

    def product(x, weight, zero, *, use_acc, is_async):
        assert not use_acc
        assert is_async
        return zero + x.data @ weight.data

    in_python(
        monkeypatch,
        (module, gluon_fp8_tiles),
        gl=found,
        tl=found,
        load=load,
        unload=unload,
        wait_for_inputs=lambda _: None,
        _wait=lambda _: None,
        warpgroup_mma=product,
    )
    return found


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("rows", "tall"), [(1, 64), (100, 64), (65, 128), (200, 128)])
@pytest.mark.parametrize(("n_dim", "k_dim"), [(200, 650), (640, 128), (72, 1000)])
@pytest.mark.parametrize("share", [1, 4, 7, 13, 100])
def test_every_chunk_is_multiplied_once_and_sums_meet_in_their_tile(
    language, groups, rows, tall, n_dim, k_dim, share
):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(m, k_dim, generator=generator) for m in (rows, n_dim))
    k_tiles, m_tiles = cdiv(k_dim, 128), cdiv(rows, tall)
    x_scale = torch.rand(rows, k_tiles, generator=generator)
    weight_scale = torch.rand(cdiv(n_dim, 128), k_tiles, generator=generator)
    tiles = m_tiles * cdiv(n_dim, 64 * groups)
    programs = cdiv(tiles * k_tiles, share)
    out = Pointer(torch.full((rows, n_dim), torch.nan))
    parts = Pointer(torch.full((2 * programs * groups * tall * 64,), torch.nan))
    described = Described(out.data.view(rows, n_dim), tall, 64, written=out.written.view(rows, n_dim))
    for _ in each_program(language, programs):
        module._shares(
            Described(x, tall, 128), Described(weight, 64, 128), described, parts, Pointer(x_scale),
            Pointer(weight_scale), rows, n_dim, tiles * k_tiles, share, k_tiles, m_tiles,
            *x_scale.stride(), *weight_scale.stride(),
            ROWS=tall, GROUPS=groups, STAGES=3, PDL=True, REGISTERS=0, FEW_REGISTERS=0,
        )  # fmt: skip
    assert parts.written.max() <= 1
    for place in [
        (part, tile)
        for part in range(cdiv(min(rows, tall), 8))
        for tile in range(min(tiles, programs - 1) * groups)
    ]:
        language.program_id = lambda axis, place=place: place[axis]
        module._add_shares(
            parts, out, rows, n_dim, share, k_tiles, m_tiles,
            ROWS=tall, GROUPS=groups, PART=64, SLICE=8, PDL=True,
        )  # fmt: skip
    assert (out.written == 1).all()
    exact = widened(x, x_scale, (1, 128)) @ widened(weight, weight_scale, (128, 128)).T
    torch.testing.assert_close(out.data.view(rows, n_dim).double(), exact, rtol=1e-4, atol=1e-3)


def widened(values, scale, tile):
    each = scale.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return (values * each[: values.shape[0], : values.shape[1]]).double()
