"""Experts as one step: the values and gradients of copying, network and summing one after the other."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from benthic.kernels import ops
from benthic.model.fp8_products import Fp8Products, RunningWeights
from benthic.model.products import PlainProducts, Sum, WeightGradients
from benthic.model.split_linear import SplitLinear

TOKENS, WIDTH, FFN, EXPERTS, TOP_K = 150, 130, 70, 5, 3


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed():
    """Every token's experts; the last one is nobody's."""
    scores = made(TOKENS, EXPERTS, seed=9)
    scores[:, -1] = -9.0
    return scores.topk(TOP_K).indices.to(torch.int32), torch.rand(
        TOKENS, TOP_K, generator=torch.Generator().manual_seed(8)
    )


def leaves(dtype=torch.float32):
    x, weight = made(TOKENS, WIDTH).to(dtype), routed()[1].to(dtype)
    gate_up, down = (
        made(EXPERTS, 2 * FFN, WIDTH, seed=1).to(dtype),
        made(EXPERTS, WIDTH, FFN, seed=2).to(dtype),
    )
    beside = made(TOKENS, WIDTH, seed=3).to(dtype), made(TOKENS, WIDTH, seed=4).to(dtype)
    return [each.requires_grad_() for each in (x, weight, gate_up.to(dtype), down.to(dtype), *beside)]


def exact():
    """Output and gradients in float64, expert by expert, without any op of ours."""
    x, weight, gate_up, down, *beside = given = leaves(torch.float64)
    expert = routed()[0].long()
    out = sum(beside)
    for k in range(TOP_K):
        gate, up = torch.einsum("tfd,td->tf", gate_up[expert[:, k]], x).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out = out + weight[:, k, None] * torch.einsum("tdf,tf->td", down[expert[:, k]], hidden)
    return [out, *torch.autograd.grad(out, given, made(TOKENS, WIDTH, seed=5).double())]


def joined(socket, sink=None, *, defer=False):
    x, weight, gate_up, down, *beside = given = leaves()
    mixture = socket.mixture(gate_up, down)
    out = mixture(x, routed()[0], weight, tuple(beside))
    with sink.defer() if defer else contextlib.nullcontext():
        out.backward(made(TOKENS, WIDTH, seed=5))
    if defer:
        assert gate_up.grad is None
        sink.flush()
        sink.run_oldest()
    return [out.detach(), *(leaf.grad for leaf in given)]


def apart(socket):
    x, weight, gate_up, down, *beside = given = leaves()
    rows, ends, maps = ops.permute(x, routed()[0], EXPERTS)
    out = ops.unpermute(socket.network(rows, gate_up, down, ends), maps, weight, tuple(beside))
    out.backward(made(TOKENS, WIDTH, seed=5))
    return [out.detach(), *(leaf.grad for leaf in given)]


def error(found, true):
    return float((found.detach().double() - true).norm() / true.norm())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("defer", [False, True])
def test_output_and_gradients_are_as_near_the_exact_ones_as_one_step_after_the_other(power_of_two, defer):
    sink = WeightGradients()
    socket = SplitLinear(Fp8Products(RunningWeights(power_of_two), power_of_two), sink)
    one, three, true = joined(socket, sink, defer=defer), apart(socket), exact()
    assert error(one[0], three[0].double()) < 1e-6, "tiles of a copy are those of its token"
    for ours, theirs, expected in zip(one, three, true, strict=True):
        assert ours.shape == expected.shape
        assert error(ours, expected) <= max(1.15 * error(theirs, expected), 1e-6)
    assert not one[3][-1].any(), "an expert without rows has no gradient"


def test_weight_gradients_join_their_sums():
    sink, x = WeightGradients(), made(TOKENS, WIDTH)
    expert, weight = routed()
    gate_up, down = (torch.nn.Parameter(each.detach()) for each in leaves()[2:4])
    sums = [torch.ones_like(each) for each in (gate_up, down)]
    for param, into in zip((gate_up, down), sums, strict=True):
        sink.sum_into(param, functools.partial(Sum, into))
    socket = SplitLinear(Fp8Products(), sink)
    out = socket.mixture(gate_up, down)(x, expert, weight, (x,))
    out.backward(made(TOKENS, WIDTH, seed=5))
    _, _, _, *expected = joined(SplitLinear(Fp8Products()))
    assert gate_up.grad is None
    assert x.grad is None
    for into, found in zip(sums, expected[:2], strict=True):
        torch.testing.assert_close(into - 1.0, found, rtol=1e-4, atol=1e-4)


def test_nothing_as_wide_as_what_experts_give_is_kept():
    kept = {}
    x, weight, gate_up, down, *beside = leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        SplitLinear(Fp8Products()).mixture(gate_up, down)(x, routed()[0], weight, tuple(beside))
    rows = [t for t in kept.values() if t.dim() == 2 and t.shape[0] == TOKENS * TOP_K]
    assert sorted((t.dtype.itemsize, t.shape[1]) for t in rows) == [
        (1, FFN),
        (1, WIDTH),
        (4, 1),
        (4, 2),
        (4, 2 * FFN),
    ]


def test_products_in_the_operands_dtype_have_no_such_step():
    assert SplitLinear(PlainProducts()).mixture(*leaves()[2:4]) is None
