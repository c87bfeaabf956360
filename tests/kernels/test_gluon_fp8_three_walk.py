"""FP8 products of three groups in Gluon, run by Python: its own functions, with threads and barriers.

Layouts are left out; loads, barriers, whose rows are multiplied and where sums are written are not.
"""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from gluon_threads import (
    QUEUE,
    Described,
    Pointer,
    Values,
    each_program,
    gluon_language,
    in_python,
    load,
    of_tensors,
    unload_whole,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8_three, gluon_fp8_tiles, gluon_queue, gluon_tiles, ops
from benthic.kernels.ops import Fp8
from benthic.kernels.reference import fp8_linear


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(
        minimum=of_tensors(torch.minimum), maximum=of_tensors(torch.maximum), int32=torch.float64
    )
    in_python(
        monkeypatch,
        (gluon_fp8_three, gluon_fp8_tiles, gluon_queue, gluon_tiles),
        **QUEUE,
        gl=found,
        load=load,
        unload=unload_whole,
        warpgroup_mma=lambda x, weight, _zero, use_acc, is_async: (
            x.data.float() @ weight.data.float()
        ).as_subclass(Values),
    )
    return found


def products(language, x, weight, ends, out, written, *, programs, counter):
    """Run every program of a launch."""
    experts, n_dim, k_dim = weight.values.shape
    known = None if ends is None else Pointer(ends)
    for _ in each_program(language, programs):
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
