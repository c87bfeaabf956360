"""FP8 rows turned into columns in Gluon, run by Python: its own functions, on memory that TMA writes at once.

Layouts and instructions are left out; which squares are read, when, and where they are written are not.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import (
    QUOTIENTS,
    TILE,
    Described,
    Pointer,
    each_program,
    gluon_language,
    in_python,
    load,
    take_all,
    where,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_retile, gluon_fp8_tiles, ops
from benthic.kernels.reference.fp8_linear import padded_rows


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


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(load=take_all, where=where)
    in_python(
        monkeypatch,
        (gluon_fp8_retile, gluon_fp8_tiles),
        **QUOTIENTS,
        gl=found,
        load=load,
        unload=unload,
        packed=packed,
        _values=lambda square: square.load(None).float(),
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
    for _ in each_program(language, min(programs, squares), torch.tensor):
        gluon_fp8_retile._retile_squares(
            Described(rows.values, TILE, TILE), Pointer(in_scale), out, scale,
            Pointer(words if ends is None else ends), count, experts,
            torch.tensor(width), n_tiles, squares, 1, count, width,
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
