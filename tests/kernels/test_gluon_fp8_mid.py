"""FP8 products of some dozens of rows an expert in Gluon: when they run, and the kernel run by Python.

In Python layouts are left out; loads, barriers, what a program multiplies and what it writes are not.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import in_python, specialize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_mid as module
from benthic.kernels import gluon_fp8_tiles, ops
from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.ops.fp8_linear import MID_ROWS


def test_no_rows_launch_nothing():
    weight = ops.quantise_fp8_weight(torch.zeros(3, 72, 256), impl="reference")
    none = ops.Fp8(torch.zeros(0, 256).to(torch.float8_e4m3fn), torch.zeros(0, 2))
    ends = torch.zeros(3, dtype=torch.int32)
    assert module.linear(none, weight, ends, dtype=torch.bfloat16).shape == (0, 72)


class Tiles:
    """Shared memory: tiles one after another."""

    def __init__(self, data):
        self.data, self.shape, self.dtype = data, data.shape, data.dtype

    def index(self, at):
        return Tiles(self.data[at])

    def slice(self, start, length):
        return Tiles(self.data.narrow(0, start, length))

    def permute(self, order):
        return Tiles(self.data.permute(order))

    def store(self, values):
        self.data.copy_(values)

    def load(self, _layout):
        return self.data.clone()


class Pointer:
    """A tensor and places in it, and how often each is written."""

    def __init__(self, data, at=0, written=None):
        self.data, self.at = data.view(-1), torch.as_tensor(at)
        self.written = torch.zeros(data.numel(), dtype=torch.int64) if written is None else written
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more):
        return Pointer(self.data, self.at + more, self.written)


class Described:
    """A matrix whose blocks are loaded, and where those begin; behind its ends are zeros."""

    def __init__(self, data, rows):
        self.data, self.dtype, self.layout, self.loaded = data, data.dtype, None, []
        self.block_type = SimpleNamespace(nbytes=rows * 128)


def load(described, corner, bar, tile, *, pred=True):
    if not pred:
        return
    row, column = map(int, corner)
    assert tile.shape[0] * 128 == described.block_type.nbytes
    described.loaded.append((row, column))
    part = described.data[row : row + tile.shape[0], column : column + 128]
    tile.data.zero_()
    tile.data[: part.shape[0], : part.shape[1]] = part
    bar.came(size=-described.block_type.nbytes)


def take(pointer, mask=True, other=0):  # noqa: FBT002 (Triton's own)
    mask = torch.as_tensor(mask)
    return torch.where(mask, pointer.data[torch.where(mask, pointer.at, 0)], other)


def put(pointer, values, mask):
    at = pointer.at[mask]
    pointer.data[at] = values[mask]
    pointer.written.index_add_(0, at, torch.ones_like(at))


def of_tensors(function):
    return lambda left, right: function(torch.as_tensor(left), torch.as_tensor(right))


@pytest.fixture
def language(monkeypatch):
    found = SimpleNamespace(
        load=take, store=put, float32=torch.float32, int64=torch.int64, static_range=range,
        minimum=of_tensors(torch.minimum), maximum=of_tensors(torch.maximum), multiple_of=lambda x, _: x,
        where=torch.where, sum=torch.sum, zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        arange=lambda start, end, layout: torch.arange(start, end),
        convert_layout=lambda x, _layout: x, warp_specialize=specialize,
        allocate_shared_memory=lambda dtype, shape, _: Tiles(torch.full(shape, torch.nan, dtype=dtype)),
        NVMMADistributedLayout=lambda *_: None, BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None,
    )  # fmt: skip

    def product(weight, x, zero, *, use_acc, is_async):
        assert (use_acc, is_async) == (False, True)
        return zero + weight.data @ x.data

    modules = module, gluon_fp8_tiles
    in_python(monkeypatch, modules, gl=found, load=load, _wait=lambda _: None, warpgroup_mma=product)
    new_bars, wait = module.new_bars, module.mbarrier.wait
    found.bars, found.waited = [], set()

    def remember(count, arrivals):
        found.bars.append(new_bars(count, arrivals))
        return found.bars[-1]

    monkeypatch.setattr(module, "new_bars", remember)
    monkeypatch.setattr(
        module.mbarrier, "wait", lambda bar, parity: (found.waited.add(bar), wait(bar, parity))
    )
    return found


def made(sizes, spare, n_dim, k_dim):
    generator = torch.Generator().manual_seed(0)
    experts, rows, k_tiles = len(sizes), sum(sizes) + spare, cdiv(k_dim, 128)
    x = torch.randn(rows, k_dim, generator=generator)
    weight = torch.randn(experts, n_dim, k_dim, generator=generator)
    x_scale = torch.rand(k_tiles, rows, generator=generator).t()
    return x, weight, x_scale, torch.rand(experts, cdiv(n_dim, 128), k_tiles, generator=generator)


def run(language, operands, sizes, programs, form, *, early):
    """Outputs, and the boxes of rows and of weights that were loaded."""
    x, weight, x_scale, weight_scale = operands
    (rows, k_dim), (experts, n_dim, _) = x.shape, weight.shape
    ends, out = torch.tensor(sizes).cumsum(0), Pointer(torch.full((rows, n_dim), torch.nan))
    boxes, blocks = Described(x, 32), Described(weight.flatten(0, 1), form.wide)
    by_column = Pointer(x_scale.t())
    language.num_programs = lambda _axis: torch.tensor(programs)
    for program in range(programs):
        language.program_id = lambda _axis, program=program: torch.tensor(program)
        module._blocks_times_rows(
            boxes, blocks, by_column, Pointer(weight_scale), out, Pointer(ends),
            rows, experts, n_dim, cdiv(k_dim, 128), cdiv(n_dim, form.groups * form.wide),
            weight_scale.shape[1], 1, rows,
            ROWS=form.rows, GROUPS=form.groups, WIDE=form.wide, EXPERTS=next_power_of_2(experts + 1),
            OUT_LAYOUT=None, PDL=early, REGISTERS=0, FEW_REGISTERS=0,
        )  # fmt: skip
        if early:  # for what has been loaded ahead, also of programs that multiply nothing
            assert {language.bars[-1].index(stage) for stage in range(4)} <= language.waited
    assert (out.written == 1).all()
    return out.data.view(rows, n_dim), boxes.loaded, blocks.loaded


def exact(operands, sizes, spare):
    x, weight, x_scale, weight_scale = operands
    wide = x * x_scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    scales = weight_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = weight * scales[:, : weight.shape[1], : weight.shape[2]]
    parts = wide.split([*sizes, spare])
    outs = [part @ own.T for part, own in zip(parts, weights, strict=False)]
    return torch.cat([*outs, torch.zeros(spare, weight.shape[1])])


FEWER, SOME, MORE = module.FORMS
SIZES = [(31, 0, 1, 33, 200, 64, 0), (24, 19, 32, 27, 30), (0, 0, 65), (0, 0)]


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("form", module.FORMS, ids=lambda form: f"{form.rows} rows")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("spare", "n_dim", "k_dim"), [(0, 520, 700), (40, 256, 300), (7, 392, 130)])
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_rows_meet_their_own_experts_and_are_written_once(
    language, sizes, spare, n_dim, k_dim, programs, form, early
):
    operands = made(sizes, spare, n_dim, k_dim)
    if sum(sizes) + spare:
        out, _, _ = run(language, operands, sizes, programs, form, early=early)
        torch.testing.assert_close(out, exact(operands, sizes, spare), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize(("form", "n_dim"), [(SOME, 512), (MORE, 384)], ids=["256 outputs", "192 outputs"])
def test_weights_are_loaded_once_and_of_rows_the_boxes_that_experts_have(language, form, n_dim, early):
    sizes, k_tiles = (24, 40, 64, 32), 5
    operands = made(sizes, 0, n_dim, 128 * k_tiles)
    _, boxes, blocks = run(language, operands, sizes, 4, form, early=early)
    assert len(set(blocks)) == len(blocks) == 4 * (n_dim // form.wide) * k_tiles
    assert len(boxes) == (1 + 2 + 2 + 1) * 2 * k_tiles


def test_an_expert_without_rows_costs_no_more_than_the_weights_loaded_ahead(language):
    sizes, k_tiles = (0, 40, 0, 0, 20), 9
    operands = made(sizes, 0, 256, 128 * k_tiles)
    needed = 2 * 2 * k_tiles
    for programs in (2, 4):  # two tiles, and parts of them
        assert len(run(language, operands, sizes, programs, SOME, early=False)[2]) == needed
    assert len(run(language, operands, sizes, 2, SOME, early=True)[2]) == needed + 2 * 2 * 4


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 90), st.integers(1, 3),
       st.integers(1, 40), st.sampled_from(module.FORMS))  # fmt: skip
def test_tiles_of_a_last_wave_are_cut_if_all_parts_fit_in_one(
    language, sizes, spare, n_tiles, programs, form
):
    language.num_programs = lambda _axis: torch.tensor(programs)
    ends = torch.tensor(sizes).cumsum(0)
    count = next_power_of_2(len(sizes) + 1)
    found = module._whole(
        Pointer(ends), int(ends[-1]) + spare, len(sizes), n_tiles, form.rows, form.groups, count
    )
    tiles = sum(cdiv(size, form.rows) for size in [*sizes, spare]) * n_tiles
    left = tiles % programs
    assert found == (tiles - left if form.groups * left <= programs else tiles)


@pytest.mark.parametrize(("rows", "tall"), [(34, 32), (40, 32), (41, 64), (96, 64), (97, 96), (160, 96)])
def test_tiles_are_as_tall_as_most_experts_need(rows, tall, monkeypatch):
    heights = []
    monkeypatch.setattr(module, "multiply", lambda *operands, dtype: heights.append(operands[3].rows))
    x = ops.Fp8(torch.zeros(rows, 128), torch.zeros(rows, 1))
    module.linear(x, None, torch.tensor([1, rows]), dtype=torch.bfloat16)
    assert heights == [tall]
    assert module.FORMS[-1].average == MID_ROWS
