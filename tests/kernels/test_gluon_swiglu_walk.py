"""SwiGLU's gradient in FP8 in Gluon, run by Python: its own functions, on memory that TMA overwrites at once.

Layouts and instructions are left out; which squares are read, where tiles are written, and what lies over
what in shared memory are not.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gluon_threads import (
    QUOTIENTS,
    TILE,
    Described,
    Pointer,
    Tiles,
    Values,
    each_program,
    gluon_language,
    in_python,
    load,
    take_all,
    where,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_parts, gluon_fp8_swiglu, gluon_fp8_tiles, ops
from benthic.kernels.reference import norm
from benthic.kernels.reference.fp8_linear import padded_rows


def words_of(x, by, _inverse):
    values = (x / by[None, :]).to(torch.float8_e4m3fn).view(torch.uint8)
    return values.view(-1, 4, TILE).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(
        load=take_all, where=where, minimum=lambda a, b: min(int(a), int(b)), maximum=torch.maximum,
        join=lambda a, b: torch.stack((a, b), -1), num_warps=lambda: 8, float8e4nv=torch.float8_e4m3fn,
    )  # fmt: skip
    in_python(
        monkeypatch,
        (gluon_fp8_swiglu, gluon_fp8_parts, gluon_fp8_tiles),
        **QUOTIENTS,
        gl=found,
        load=load,
        view=lambda tiles, dtype, shape, _layout: Tiles(tiles.data.view(dtype).view(shape)),
        wide=lambda x: x.float().as_subclass(Values),
        larger=lambda a, b: torch.where(a.abs() >= b.abs(), a, b),
        largest_of_rows=lambda x: x.abs().float().amax(1),
        words_of=words_of,
        _sigmoid=torch.sigmoid,
    )
    return found


def run(language, gate_up, dy, weight, ends, *, programs, power_of_two):
    """What the kernel writes, and how often."""
    (rows, width), experts = dy.shape, 1 if ends is None else len(ends)
    padded, n_tiles = padded_rows(rows, experts), width // TILE
    squares = (padded // TILE + 1) * n_tiles
    values = [torch.full((2 * width * each,), 77, dtype=torch.uint8) for each in (rows, padded)]
    scales = [torch.full((2 * width * each // TILE,), torch.nan) for each in (rows, padded)]
    by_row, by_column = Pointer(values[0].view(torch.float8_e4m3fn)), Pointer(values[1].view(torch.int32))
    row_scale, column_scale = (Pointer(scale) for scale in scales)
    parts = Pointer(torch.full((n_tiles * rows,), torch.nan))
    for _ in each_program(language, min(programs, squares), torch.tensor):
        gluon_fp8_swiglu._swiglu_squares(
            Described(gate_up, TILE, TILE), Described(dy, TILE, TILE), by_row, row_scale, by_column,
            column_scale, Pointer(values[0] if ends is None else ends),
            None if weight is None else Pointer(weight), parts, rows, experts, torch.tensor(width),
            padded // 4, n_tiles, squares, rows, 2 * width,
            HAS_ENDS=ends is not None, POWER_OF_TWO=power_of_two, WEIGHTED=weight is not None,
        )  # fmt: skip
    for pointer in (by_row, by_column, row_scale, column_scale):
        assert (pointer.written == 1).all()
    assert (parts.written == (weight is not None)).all()
    values = [each.view(shape) for each, shape in zip(values, ((rows, -1), (2 * width, -1)), strict=True)]
    scales = [scale.view(2 * n_tiles, rows).t() if i == 0 else scale.view(-1, 2 * width).t()
              for i, scale in enumerate(scales)]  # fmt: skip
    return values, scales, parts.data.view(n_tiles, rows).sum(0)


def operands(sizes, spare, width):
    rows = (333 if sizes is None else sum(sizes)) + spare
    ends = None if sizes is None else torch.tensor(sizes).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    gate_up, dy = (torch.randn(rows, n, generator=generator).bfloat16() * 2 for n in (2 * width, width))
    return gate_up, dy, torch.randn(rows, generator=generator), ends


def same(values, scales, exact):
    for found, scale, tiles in zip(values, scales, exact, strict=True):
        assert torch.equal(scale, tiles.scale)
        assert torch.equal(found, tiles.values.view(torch.uint8))


@pytest.mark.parametrize("sizes", [None, (1, 0, 127, 128, 129), (0, 0), (300,), (64, 200, 0)], ids=str)
@pytest.mark.parametrize("spare", [0, 70, 200])
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(("width", "power_of_two"), [(128, True), (384, False)])
def test_both_tilings_are_those_of_the_gradient_and_written_once(
    language, sizes, spare, programs, width, power_of_two
):
    gate_up, dy, _, ends = operands(sizes, spare, width)
    if not len(dy):
        return
    exact = ops.swiglu_gradient_fp8_both(gate_up, dy, ends, power_of_two=power_of_two, impl="reference")
    values, scales, _ = run(language, gate_up, dy, None, ends, programs=programs, power_of_two=power_of_two)
    same(values, scales, exact)


@pytest.mark.parametrize("sizes", [None, (1, 0, 127, 128, 129), (0, 0), (64, 200, 0)], ids=str)
@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(("width", "power_of_two"), [(128, True), (384, False)])
def test_rows_are_weighted_and_their_weights_gradients_written_once(
    language, monkeypatch, sizes, spare, programs, width, power_of_two
):
    monkeypatch.setattr(norm, "weighted_swiglu_gradient", weights_last)
    gate_up, dy, weight, ends = operands(sizes, spare, width)
    if not len(dy):
        return
    options = {"power_of_two": power_of_two}
    *exact, dweight = ops.weighted_swiglu_gradient_fp8_both(
        gate_up, dy, weight, ends, **options, impl="reference"
    )
    values, scales, found = run(language, gate_up, dy, weight, ends, programs=programs, **options)
    same(values, scales, exact)
    torch.testing.assert_close(found, dweight, rtol=1e-5, atol=1e-4)


def weights_last(gate_up, dy, weight):
    """The definition in the order of the kernels, whose bits it has."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    d, sigmoid, by = dy.float(), torch.sigmoid(gate), weight[:, None]
    dgate, dup = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), d * gate * sigmoid
    return torch.cat((dgate * by, dup * by), dim=-1).to(gate_up.dtype), (dup * up).sum(-1)
