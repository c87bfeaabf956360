"""The product of some dozens of rows an expert in Gluon, run by Python: on memory and barriers as threads.

Layouts are left out; loads, barriers, what a program multiplies and where it writes are not.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gluon_threads import Described, Pointer, Tiles, each_program, gluon_language, in_python, load
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_dozens, gluon_fp8_tiles
from benthic.kernels.host import cdiv
from benthic.kernels.reference import moe


class Row(int):
    """A row's number, of which `.to(gl.int64)` is asked."""

    def __add__(self, more):
        return Row(int(self) + more)

    def to(self, _dtype):
        return int(self)


@pytest.fixture
def language(monkeypatch):
    found = gluon_language()
    write = gluon_dozens._write.fn
    in_python(
        monkeypatch,
        (gluon_dozens, gluon_fp8_tiles),
        gl=found,
        load=load,
        view=lambda ring, _dtype, shape, _layout: Tiles(ring.data.view(shape)),
        warpgroup_mma=lambda weight, x, sums, is_async: sums + weight.data @ x.data,
        _wait=lambda _: None,
        _write=lambda sums, row, *rest: write(sums, Row(row), *rest),
    )
    new_bars, found.bars = gluon_dozens.new_bars, []

    def remembered(count, arrivals):
        bars = new_bars(count, arrivals)
        found.bars += [bars.index(at) for at in range(count)]
        return bars

    monkeypatch.setattr(gluon_dozens, "new_bars", remembered)
    return found


def run(language, operands, sizes, programs, *, gated, early=True):
    """Outputs, and the blocks of x and of weights that were loaded."""
    x, weight = operands
    (rows, k_dim), (experts, n_dim, _) = x.shape, weight.shape
    width, own = (n_dim // 2, 64) if gated else (n_dim, 128)
    n_tiles = cdiv(width, 2 * own)
    out = Pointer(torch.full((rows, width), torch.nan))
    boxes, blocks = Described(x, gluon_dozens.BOX, 64), Described(weight.flatten(0, 1), 64, 64)
    for _ in each_program(language, programs):
        gluon_dozens._experts_times_rows(
            boxes, blocks, out, Pointer(torch.tensor(sizes).cumsum(0)), rows, experts, n_dim,
            cdiv(k_dim, 128) * 2, n_tiles, gluon_dozens.whole(experts * n_tiles, programs),
            GATED=gated, COUNT=2, OUT_LAYOUT=None, PDL=early, REGISTERS=0, FEW_REGISTERS=0,
        )  # fmt: skip
    for bar in language.bars:  # nothing is on its way when a program has ended
        assert (bar.bytes, bar.missing) == (0, bar.count)
    assert (out.written == 1).all()
    return out.data.view(rows, width), boxes.loaded, blocks.loaded


def made(sizes, spare, n_dim, k_dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes) + spare, k_dim, generator=generator)
    x[sum(sizes) :] = torch.nan  # they belong to nobody
    return x, torch.randn(len(sizes), n_dim, k_dim, generator=generator) / k_dim**0.5


SIZES = [(31, 0, 1, 33, 200, 64, 0), (24, 19, 32, 27, 130), (0, 0, 65), (0, 0), (3,)]


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("spare", "dims"), [(0, (384, 320)), (70, (640, 64)), (7, (128, 576))])
def test_rows_are_multiplied_by_their_own_expert_and_written_once(language, sizes, spare, dims, gated, early):
    operands = made(sizes, spare, dims[0] + (0 if gated else 64), dims[1])
    exact = (moe.grouped_swiglu if gated else moe.grouped_linear)(
        *(each.double() for each in operands), torch.tensor(sizes).cumsum(0)
    )
    for programs in (1, 3, 8) if len(exact) else ():
        out, _, _ = run(language, operands, sizes, programs, gated=gated, early=early)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "swiglu"])
def test_weights_are_loaded_once_and_of_x_the_boxes_that_experts_have(language, gated, early):
    sizes, chunks = (24, 40, 64, 16), 6
    operands = made(sizes, 0, 512, 64 * chunks)
    for programs in (3, 4, 8):  # of eight tiles
        _, boxes, blocks = run(language, operands, sizes, programs, gated=gated, early=early)
        assert len(set(blocks)) == len(blocks) == 4 * 8 * chunks
        assert len(boxes) == (1 + 2 + 2 + 1) * 2 * chunks


def test_a_last_wave_of_half_as_many_tiles_as_programs_is_cut(language):
    sizes, chunks = (20, 20, 20), 4
    operands = made(sizes, 0, 512, 64 * chunks)  # six tiles: four, and four halves
    _, boxes, blocks = run(language, operands, sizes, 4, gated=False)
    assert len(set(blocks)) == len(blocks) == 4 * 6 * chunks
    assert len(boxes) == (4 + 4) * chunks


def test_weights_loaded_ahead_for_an_expert_without_rows_are_passed_over(language):
    sizes, chunks = (0, 40, 0, 20), 6
    operands = made(sizes, 0, 256, 64 * chunks)
    for early, ahead in ((False, 0), (True, 2 * 4 * 4)):  # both programs' first tiles are other ones
        _, _, blocks = run(language, operands, sizes, 2, gated=False, early=early)
        assert len(blocks) == 2 * 4 * chunks + ahead


def test_a_program_whose_first_tile_belongs_to_no_expert_waits_for_what_it_loaded_ahead(language):
    sizes = (24, 24)
    operands = made(sizes, 70, 256, 256)
    out, _, blocks = run(language, operands, sizes, 3, gated=False)
    assert not out[48:].any()
    assert len(blocks) == 3 * 4 * 4


@given(st.integers(0, 2000), st.integers(1, 140))
def test_tiles_of_a_last_wave_are_cut_if_all_halves_fit_in_one(tiles, programs):
    first, left = gluon_dozens.whole(tiles, programs), tiles % programs
    assert first in (tiles, tiles - left)
    assert (first < tiles) == (0 < 2 * left <= programs)


def test_no_rows_launch_nothing():
    none, weight = torch.zeros(0, 128, dtype=torch.bfloat16), torch.zeros(2, 256, 128, dtype=torch.bfloat16)
    assert gluon_dozens.grouped_swiglu(none, weight, torch.tensor([0, 0])).shape == (0, 128)
