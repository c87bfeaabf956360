"""The product of experts' rows in Gluon, run by Python: its own functions, on memory and barriers as threads.

Layouts are left out; loads, barriers, which rows are multiplied and where sums are written are not.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import (
    QUEUE,
    Described,
    Pointer,
    Tiles,
    each_program,
    gluon_language,
    in_python,
    load,
    unload_whole,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_tiles, gluon_grouped, gluon_queue, gluon_tiles
from benthic.kernels.reference import linear, moe


def view(ring, _dtype, shape, _layout):
    """Tiles of a ring of 64 x 64: as many below one another, or 64 columns beside 64 columns."""
    if shape[2] == 64:
        return Tiles(ring.data.view(shape))
    return SimpleNamespace(index=lambda at: Tiles(torch.cat(tuple(ring.data[2 * at : 2 * at + 2]), dim=1)))


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(int32=torch.float64)
    in_python(
        monkeypatch,
        (gluon_grouped, gluon_fp8_tiles, gluon_queue, gluon_tiles),
        **QUEUE,
        gl=found,
        load=load,
        unload=unload_whole,
        view=view,
        warpgroup_mma=lambda x, weight, sums, is_async: sums + x.data @ weight.data,
    )
    return found


SIZES = [
    (1, 0, 64, 63, 65, 127, 128, 129),
    (191, 192, 193, 0, 255, 256, 257),
    (320, 700),
    (0, 0),
    (3,),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("turned", [True, False], ids=["turned", "upright"])
@pytest.mark.parametrize("columns", [64, 320])
def test_rows_are_multiplied_by_their_own_expert_and_written_once(language, sizes, spare, turned, columns):
    run(language, sizes, spare, (192, columns), turned=turned, gated=False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("width", [64, 192])
def test_gates_meet_their_own_ups(language, sizes, spare, width):
    run(language, sizes, spare, (320, 2 * width), turned=True, gated=True)


@pytest.mark.parametrize("rows", [1, 63, 256, 700])
def test_one_weight_without_ends_has_all_rows(language, rows):
    run(language, (rows,), 0, (192, 384), turned=True, gated=True, given=False)


def run(language, sizes, spare, dims, *, turned, gated, given=True):
    k_dim, n_dim = dims
    generator = torch.Generator().manual_seed(0)
    ends, rows = torch.tensor(sizes).cumsum(0), sum(sizes) + spare
    x = torch.randn(rows, k_dim, generator=generator)
    x[rows - spare :] = torch.nan  # they belong to nobody
    weight = torch.randn(len(sizes), n_dim, k_dim, generator=generator) / k_dim**0.5
    exact = (moe.grouped_swiglu if gated else moe.grouped_linear)(x, weight, ends)
    out, written = torch.full_like(exact, torch.nan), torch.zeros(exact.shape, dtype=torch.int64)
    laid = weight if turned else weight.transpose(1, 2).contiguous()
    n_tiles = math.ceil(n_dim / 128)
    for programs, queued in ((1, True), (3, True), (3, False)):
        counter = itertools.count() if queued else None
        for _ in each_program(language, programs if rows else 0):
            gluon_grouped._rows_times_experts(
                Described(x, 64, 64), Described(laid.flatten(0, 1), 64, 64),
                Described(out, 64, 64 if gated else 128, written=written),
                Pointer(out, written=written), Pointer(ends) if given else None, counter,
                rows, len(sizes), n_dim, k_dim, n_tiles,
                TURNED=turned, GATED=gated, REGISTERS=0, FEW_REGISTERS=0,
            )  # fmt: skip
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
        assert (written == 1).all()
        written.zero_()
        out.fill_(torch.nan)


class Launches:
    """In place of a kernel: what its operands say is multiplied, by the definition."""

    def __getitem__(self, grid):
        return self.run

    def run(self, x, weight, out, out_ptr, ends, _counter, rows, experts, n_dim, k_dim, _n_tiles, **how):
        assert (x.shape, x.strides, out.shape[0]) == ([rows, k_dim], [x.base.stride(0), 1], rows)
        table = weight.base.as_strided(weight.shape, weight.strides)
        turned = how["TURNED"]
        table = table.view(experts, n_dim, k_dim) if turned else table.view(experts, k_dim, n_dim).mT
        ends = torch.tensor([rows]) if ends is None else ends
        out_ptr.copy_((moe.grouped_swiglu if how["GATED"] else moe.grouped_linear)(x.base, table, ends))
        self.turned = turned


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("padded", [0, 8])
def test_weights_are_described_as_they_lie(monkeypatch, upright, gated, padded):
    launches = Launches()
    monkeypatch.setattr(gluon_grouped, "_rows_times_experts", launches)
    monkeypatch.setattr(gluon_grouped, "multiprocessors", lambda _device: 132)
    monkeypatch.setattr(gluon_grouped, "take_context", lambda _device: None)
    dims = (3, 128 + padded, 64) if upright else (3, 64, 128 + padded)
    weight = torch.randn(dims).bfloat16()
    weight = weight[:, :128].mT if upright else weight[..., :128]
    x, ends = torch.randn(50, 128).bfloat16(), torch.tensor([7, 7, 40], dtype=torch.int32)
    found = gluon_grouped.multiply(x, weight, ends, gated=gated)
    exact = (moe.grouped_swiglu if gated else moe.grouped_linear)(x, weight, ends)
    torch.testing.assert_close(found, exact, rtol=0, atol=0)
    assert launches.turned == (gated or not upright or padded > 0)


def test_swiglu_of_one_weight_is_that_of_an_expert_with_all_rows(monkeypatch):
    monkeypatch.setattr(gluon_grouped, "_rows_times_experts", Launches())
    monkeypatch.setattr(gluon_grouped, "multiprocessors", lambda _device: 132)
    monkeypatch.setattr(gluon_grouped, "take_context", lambda _device: None)
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(128, 64).bfloat16()
    exact = linear.linear_swiglu(x, weight)
    torch.testing.assert_close(gluon_grouped.linear_swiglu(x, weight), exact, rtol=1e-2, atol=1e-2)


def test_gradients_meet_the_products_of_the_definition(monkeypatch):
    monkeypatch.setattr(gluon_grouped, "_rows_times_experts", Launches())
    monkeypatch.setattr(gluon_grouped, "multiprocessors", lambda _device: 132)
    monkeypatch.setattr(gluon_grouped, "take_context", lambda _device: None)
    ends = torch.tensor([7, 7, 50], dtype=torch.int32)
    found = []
    for product in (gluon_grouped.grouped_linear, moe.grouped_linear):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((50, 128), (3, 64, 128)))
        x, weight = (each.bfloat16().requires_grad_() for each in (x, weight))
        out = product(x, weight, ends)
        out.backward(torch.randn(out.shape, generator=generator).bfloat16())
        found.append((out, x.grad, weight.grad))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2)
