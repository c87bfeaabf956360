"""FP8 products of three groups in Gluon, run by Python: its own functions, with threads and barriers.

Layouts are left out; loads, barriers, whose rows are multiplied and where sums are written are not.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import Pointer, Tiles, in_python, specialize

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_three, gluon_fp8_tiles, gluon_queue, gluon_tiles, ops
from benthic.kernels.ops import Fp8
from benthic.kernels.reference import fp8_linear


class Values(torch.Tensor):
    """Numbers in registers: adding to a name gives it others."""

    type = SimpleNamespace(layout=None)

    def __iadd__(self, more):
        return self + more


class Described:
    """A matrix whose blocks are loaded, and written once each."""

    def __init__(self, data, *block, written=None):
        self.data, self.dtype, self.layout, self.written = data, data.dtype, None, written
        self.block_type = SimpleNamespace(nbytes=math.prod(block) * data.itemsize)


def load(described, corner, bar, tile, *, pred=True):
    if pred:
        row, column = (int(each) for each in corner)
        part = described.data[row : row + tile.shape[0], column : column + tile.shape[1]]
        tile.data.zero_()
        tile.data[: part.shape[0], : part.shape[1]] = part
        bar.came(size=-described.block_type.nbytes)


def unload(described, corner, tile):
    row, column = (int(each) for each in corner)
    place = slice(row, row + 64), slice(column, column + 128)
    part = described.data[place]
    assert len(part) == 64, "whole parts alone leave by TMA"
    part.copy_(tile.data[:, : part.shape[1]])
    described.written[place] += 1


def take(pointer, *, mask=True, other=None):
    if not mask:
        return other
    found = pointer.data[torch.as_tensor(pointer.at)]
    return found if found.is_floating_point() else int(found)


def put(pointer, values, mask):
    at = pointer.at[mask]
    pointer.data[at] = values[mask].as_subclass(torch.Tensor)
    pointer.written.view(-1).index_add_(0, at, torch.ones_like(at))


def least(a, b):
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Values)


def most(a, b):
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Values)


@pytest.fixture
def language(monkeypatch):
    found = SimpleNamespace(
        load=take, store=put, float32=torch.float32, int64=torch.int64, int32=torch.float64,
        static_range=range, minimum=least,
        maximum=most,
        where=lambda condition, left, right: left if condition else right,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Values),
        arange=lambda start, end, layout: torch.arange(start, end),
        warp_specialize=specialize,
        allocate_shared_memory=lambda dtype, shape, _: Tiles(torch.full(shape, torch.nan).to(dtype)),
        NVMMADistributedLayout=lambda *_: None, BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None,
        SwizzledSharedLayout=lambda *_: None,
    )  # fmt: skip
    in_python(
        monkeypatch,
        (gluon_fp8_three, gluon_fp8_tiles, gluon_queue, gluon_tiles),
        gl=found,
        load=load,
        unload=unload,
        asked=lambda counter, *_: 0 if counter is None else next(counter),
        answered=lambda answer: answer,
        write_number=lambda numbers, at, value: numbers.index(at).data.fill_(value),
        read_number=lambda numbers, at: int(numbers.index(at).data),
        warpgroup_mma=lambda x, weight, _zero, use_acc, is_async: (
            x.data.float() @ weight.data.float()
        ).as_subclass(Values),
    )
    return found


def products(language, x, weight, ends, out, written, *, programs, counter):
    """Run every program of a launch."""
    experts, n_dim, k_dim = weight.values.shape
    known = None if ends is None else Pointer(ends)
    language.num_programs = lambda _axis: programs
    for program in range(programs):
        language.program_id = lambda _axis, program=program: program
        gluon_fp8_three._rows_times_blocks(
            Described(x.values.float(), 64, 128), Described(weight.values.float().flatten(0, 1), 128, 128),
            Described(out, 64, 128, written=written), Pointer(x.scale), Pointer(weight.scale.contiguous()),
            Pointer(out, written=written), known, counter,
            len(out), experts, n_dim, math.ceil(k_dim / 128), math.ceil(n_dim / 128), weight.scale.shape[-2],
            *x.scale.stride(), REGISTERS=0, FEW_REGISTERS=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [(1, 0, 64, 63, 65), (191, 192, 193), (0, 256, 385), (0, 0), (300,)], ids=str
)
@pytest.mark.parametrize("spare", [0, 70])
@pytest.mark.parametrize("dims", [(256, 320), (144, 80)], ids=str)
def test_rows_are_multiplied_by_their_own_expert_and_written_once(language, sizes, spare, dims):
    k_dim, n_dim = dims
    generator = torch.Generator().manual_seed(0)
    ends, rows = torch.tensor(sizes).cumsum(0).int(), sum(sizes) + spare
    x = Fp8(*ops.quantise_fp8_rows(torch.randn(rows, k_dim, generator=generator), impl="reference"))
    x.scale[rows - spare :] = torch.nan  # they belong to nobody
    weight = ops.quantise_fp8_weight(torch.randn(len(sizes), n_dim, k_dim, generator=generator))
    x_set = Fp8(x.values, x.scale.nan_to_num(0))
    exact = fp8_linear.linear(x_set, weight, ends, dtype=torch.float32)
    alone = len(sizes) == 1 and not spare  # a single weight, whose ends nobody has to know
    ways = [(ends, True), (None, False)] if alone else [(ends, True), (ends, False)]
    for programs, (known, queued) in itertools.product((1, 3), ways):
        out, written = torch.full_like(exact, torch.nan), torch.zeros(exact.shape, dtype=torch.int64)
        counter = itertools.count() if queued else None
        products(language, x, weight, known, out, written, programs=programs if rows else 0, counter=counter)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)
        assert (written == 1).all()
