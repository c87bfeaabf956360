"""FP8 rows turned into columns in Gluon, run by Python: its own functions, on memory that TMA writes at once.

Layouts and instructions are left out; which squares are read, when, and where they are written are not.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import TILE, Described, Pointer, Tiles, in_python, load, tile_scale, where

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_retile, gluon_fp8_tiles, ops
from benthic.kernels.reference.fp8_linear import padded_rows


def take(pointer, *, mask=True, other=0):
    at, mask = torch.as_tensor(pointer.at), torch.as_tensor(mask)
    return torch.where(mask, pointer.data[torch.where(mask, at, 0)], torch.as_tensor(other))


def put(pointer, values, mask):
    pointer.data[pointer.at[mask]] = values[mask]
    pointer.written.index_add_(0, pointer.at[mask], torch.ones_like(pointer.at[mask]))


def unload(out, corner, block):
    """Words of 128 columns, every eighth one after another; what stands over the edge is left out."""
    first, column, word = (int(each) for each in corner)
    assert first == 0
    words = block.load(None).permute(1, 0, 2).reshape(TILE, 32)
    to = slice(8 * column, 8 * column + TILE), slice(word, word + 32)
    out.data[to] = words[: out.data[to].shape[0]]
    out.written[to] += 1


def packed(x):
    values = x.to(torch.float8_e4m3fn).view(torch.uint8)
    return values.view(-1, 4, TILE).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


def memory(dtype, shape, _layout):
    return Tiles(torch.full(shape, 77 if dtype == torch.int32 else torch.nan, dtype=dtype))


@pytest.fixture
def language(monkeypatch):
    found = SimpleNamespace(
        load=take, store=put, where=where, abs=torch.abs, max=lambda x, axis: x.amax(axis),
        arange=lambda start, end, layout: torch.arange(start, end), allocate_shared_memory=memory,
        float32=torch.float32, int32=torch.int32, int64=torch.int64,
    )  # fmt: skip
    in_python(
        monkeypatch,
        (gluon_fp8_retile, gluon_fp8_tiles),
        gl=found,
        load=load,
        unload=unload,
        packed=packed,
        _values=lambda square: square.load(None).float(),
        quotient=lambda x, by, _inverse: x / by,
        tile_scale=tile_scale,
        inverse_of=lambda scale: 1.0 / scale,
    )
    return found


def run(language, rows, ends, *, programs, power_of_two):
    """What the kernel writes, and how often."""
    (count, width), experts = rows.values.shape, 1 if ends is None else len(ends)
    padded, n_tiles = padded_rows(count, experts), -(-width // TILE)
    squares = padded // TILE * n_tiles
    words = torch.full((width, padded // 4), 77, dtype=torch.int32)
    out = SimpleNamespace(data=words, written=torch.zeros_like(words), layout=None)
    scale = Pointer(torch.full((width * padded // TILE,), torch.nan))
    in_scale = rows.scale.t().contiguous()
    language.num_programs = lambda _axis: programs
    for program in range(min(programs, squares)):
        language.program_id = lambda _axis, program=program: torch.tensor(program)
        gluon_fp8_retile._retile_squares(
            Described(rows.values), Pointer(in_scale), out, scale, Pointer(words if ends is None else ends),
            count, experts, torch.tensor(width), n_tiles, squares, 1, count, width,
            HAS_ENDS=ends is not None, POWER_OF_TWO=power_of_two,
        )  # fmt: skip
    assert (scale.written == 1).all()
    assert (out.written == 1).all()
    return words.view(torch.uint8), scale.data.view(-1, width).t()


@pytest.mark.parametrize("sizes", [None, (1, 0, 127, 128, 129), (0, 0), (300,), (64, 200, 0)], ids=str)
@pytest.mark.parametrize("spare", [0, 70, 200])
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(("width", "power_of_two"), [(128, True), (400, False), (400, True)])
def test_columns_are_those_of_the_rows_and_written_once(
    language, sizes, spare, programs, width, power_of_two
):
    count = (333 if sizes is None else sum(sizes)) + spare
    if not count:
        return
    ends = None if sizes is None else torch.tensor(sizes).cumsum(0).int()
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 2
    rows = ops.Fp8(*ops.quantise_fp8_rows(x, power_of_two=power_of_two, impl="reference"))
    exact = ops.retile_fp8(rows, ends, power_of_two=power_of_two, impl="reference")
    values, scale = run(language, rows, ends, programs=programs, power_of_two=power_of_two)
    assert torch.equal(scale, exact.scale)
    assert torch.equal(values, exact.values.view(torch.uint8))
