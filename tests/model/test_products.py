"""The linear socket as three products: deferred weight gradients are the immediate ones, wherever they go."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benthic.errors import ScheduleError, ShapeError
from benthic.kernels import ops
from benthic.model.fp8_products import Fp8Products
from benthic.model.local import plain_linear
from benthic.model.products import PlainProducts, Sum, WeightGradients
from benthic.model.split_linear import SplitLinear

ENDS = {
    "uneven": (9, 29, 30, 37),
    "empty experts": (0, 20, 20, 37),
    "spare rows": (3, 3, 11, 30),
    "none": (0,) * 4,
}
PRODUCTS = [
    PlainProducts(),
    PlainProducts(torch.bfloat16),
    PlainProducts(torch.bfloat16, wide_gradients=True),
]


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def param(*shape, seed=1, dtype=torch.float32):
    return torch.nn.Parameter(made(*shape, seed=seed, dtype=dtype))


def step(socket, sink, losses, *, defer):
    """Backward of every loss, weight gradients at once or after all of them."""
    for loss in losses:
        if not defer:
            loss().backward()
            continue
        with sink.defer():
            loss().backward()
        sink.flush()
    while sink.pending:
        sink.run_oldest()


def network(socket, weights, ends):
    """A product with a view, one with a whole parameter, and one for each expert through a view."""
    gate_up, down, experts = weights

    def loss(seed=0):
        x = made(37, 24, seed=10 + seed)
        hidden = socket(x, gate_up.flatten(0, 1)).tanh()
        rows = socket.grouped(socket(hidden, down), experts.flatten(1, 2), ends)
        return (rows * made(37, 16, seed=20 + seed)).sum()

    return loss


def gradients(products, name, *, defer):
    sink = WeightGradients()
    socket = SplitLinear(products, sink)
    weights = param(2, 8, 24, seed=1), param(12, 16, seed=2), param(4, 2, 8, 12, seed=3)
    loss = network(socket, weights, torch.tensor(ENDS[name], dtype=torch.int32))
    step(socket, sink, [loss, functools.partial(loss, seed=1)], defer=defer)
    return [w.grad for w in weights]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("products", PRODUCTS, ids=str)
def test_deferred_weight_gradients_are_the_immediate_ones_bit_for_bit(products, name):
    at_once, later = (gradients(products, name, defer=defer) for defer in (False, True))
    for now, then in zip(at_once, later, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("dims", [(24, 16), (23, 9)], ids=str)
def test_split_products_equal_the_plain_socket_and_its_gradients(name, dims):
    ends = torch.tensor(ENDS[name], dtype=torch.int32)
    found = []
    for socket in (plain_linear, SplitLinear(PlainProducts())):
        x, w, e = made(37, dims[0]).requires_grad_(), param(dims[1], dims[0]), param(4, dims[0], dims[1])
        out = socket.grouped(socket(x, w), e, ends)
        assert not out[ends[-1] :].any()
        out.backward(made(*out.shape, seed=4))
        found.append((out, x.grad, w.grad, e.grad))
    for split, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-5)


def of_network(socket, *, at_once, ends, trained):
    """Output and gradients of a network, as one step or as two products and SwiGLU."""
    experts = () if ends is None else (4,)
    leaves = made(37, 24, seed=1), made(*experts, 2 * 10, 24, seed=2), made(*experts, 16, 10, seed=3)
    leaves = [leaf.requires_grad_(name in trained) for leaf, name in zip(leaves, "xgd", strict=True)]
    x, gate_up, down = leaves
    if at_once:
        out = socket.network(x, gate_up, down, ends)
    else:
        out = socket.product(ops.swiglu(socket.product(x, gate_up, ends)), down, ends)
    out.backward(made(*out.shape, seed=4))
    return [out, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("trained", ["xgd", "gd", "d", "g", "x"])
@pytest.mark.parametrize("name", [None, *ENDS], ids=str)
@pytest.mark.parametrize("products", [*PRODUCTS, Fp8Products()], ids=lambda products: type(products).__name__)
def test_a_network_in_one_step_gives_what_its_two_products_and_swiglu_give(products, name, trained):
    ends = None if name is None else torch.tensor(ENDS[name], dtype=torch.int32)
    one, three = (
        of_network(SplitLinear(products), at_once=at_once, ends=ends, trained=trained)
        for at_once in (True, False)
    )
    for found, expected in zip(one, three, strict=True):
        if expected is None:
            assert found is None, "a gradient that nobody asked for"
        else:  # SwiGLU's last bit may differ where autograd records, and E4M3 then rounds a value elsewhere
            assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("defer", [False, True])
def test_both_weight_gradients_of_a_network_wait_and_may_be_sums(defer):
    sink = WeightGradients()
    gate_up, down = param(2, 10, 24, seed=2), param(16, 10, seed=3)
    sums = [torch.zeros_like(weight) for weight in (gate_up, down)]
    for weight, into in zip((gate_up, down), sums, strict=True):
        sink.sum_into(weight, functools.partial(Sum, into))
    out = SplitLinear(PlainProducts(), sink).network(made(37, 24), gate_up.flatten(0, 1), down)
    with sink.defer() if defer else contextlib.nullcontext():
        out.sum().backward()
    if defer:
        assert not any(into.any() for into in sums)
        sink.flush()
        sink.run_oldest()
    exact = plain_linear.network(made(37, 24), gate_up.flatten(0, 1), down).sum()
    for into, expected in zip(sums, torch.autograd.grad(exact, (gate_up, down)), strict=True):
        torch.testing.assert_close(into, expected, rtol=1e-5, atol=1e-5)
    assert gate_up.grad is None
    assert down.grad is None


def test_a_leading_batch_dimension_stays():
    x, weight = made(3, 5, 8).requires_grad_(), param(6, 8)
    out = SplitLinear(PlainProducts())(x, weight)
    torch.testing.assert_close(out, x @ weight.T)
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, 5, 8))


def test_chunks_run_first_in_first_out_and_out_of_order_by_number():
    sink = WeightGradients()
    socket, weight = SplitLinear(PlainProducts(), sink), param(4, 4)
    numbers = []
    for scale in (1.0, 2.0, 4.0):
        with sink.defer():
            (socket(torch.eye(4), weight) * scale).sum().backward()
        numbers.append(sink.flush())
    assert (sink.pending, weight.grad) == (3, None)
    sink.run_oldest()
    assert weight.grad.unique().tolist() == [1.0]
    sink.run(numbers[2])
    assert weight.grad.unique().tolist() == [5.0]
    sink.run_oldest()
    assert (sink.pending, weight.grad.unique().tolist()) == (0, [7.0])
    with pytest.raises(ScheduleError, match="0 chunks"):
        sink.run_oldest()
    with pytest.raises(ScheduleError, match=f"chunk {numbers[2]} .* not waiting"):
        sink.run(numbers[2])


def test_an_unflushed_chunk_is_pending_and_deferring_ends_with_its_block():
    sink = WeightGradients()
    socket, weight = SplitLinear(PlainProducts(), sink), param(4, 4)
    with sink.defer():
        socket(torch.eye(4), weight).sum().backward()
    with contextlib.suppress(RuntimeError), sink.defer():
        torch.eye(4).sum().backward()
    assert sink.pending == 1
    socket(torch.eye(4), weight).sum().backward()
    assert (sink.pending, weight.grad.unique().tolist()) == (1, [1.0])


def test_one_parameter_through_two_views_gets_both_gradients():
    results = []
    for defer in (False, True):
        sink = WeightGradients()
        socket, weight = SplitLinear(PlainProducts(), sink), param(2, 6, 8)

        def loss(socket=socket, weight=weight):
            x = made(5, 8)
            y = socket(x, weight.flatten(0, 1)).sum() + socket(x, weight[1]).square().sum()
            return y + socket(x, weight[0, 2:4]).sum()

        step(socket, sink, [loss], defer=defer)
        results.append(weight.grad)
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("defer", [False, True])
def test_hooks_of_the_parameter_receive_every_gradient_once(defer):
    sink = WeightGradients()
    socket, weight = SplitLinear(PlainProducts(), sink), param(2, 3, 8)
    taken = []

    def take(p):
        """As `parallel.buckets` does: the deferred pass itself calls with nothing to take."""
        if p.grad is not None:
            taken.append(p.grad)
            p.grad = None

    weight.register_post_accumulate_grad_hook(take)
    losses = [lambda n=n: (socket(made(5, 8), weight.flatten(0, 1)) * n).sum() for n in (1.0, 2.0)]
    step(socket, sink, losses, defer=defer)
    assert len(taken) == 2
    torch.testing.assert_close(taken[0] * 2, taken[1])


@pytest.mark.parametrize("defer", [False, True])
def test_float32_gradients_reach_the_sum_of_a_bfloat16_parameter_unrounded(defer):
    sink = WeightGradients()
    socket = SplitLinear(PlainProducts(wide_gradients=True), sink)
    whole, experts = param(2, 8, 24, dtype=torch.bfloat16), param(4, 8, 16, seed=2, dtype=torch.bfloat16)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in (whole, experts)]
    for p, total in zip((whole, experts), sums, strict=True):
        sink.sum_into(p, lambda total=total: Sum(total))
    ends = torch.tensor((3, 3, 11, 30), dtype=torch.int32)
    x, dy = made(37, 24, dtype=torch.bfloat16), made(37, 8, seed=3, dtype=torch.bfloat16)
    hidden = socket(x, whole.flatten(0, 1)).detach()

    def loss():
        return (socket.grouped(socket(x, whole.flatten(0, 1)), experts, ends) * dy).sum()

    step(socket, sink, [loss, loss], defer=defer)
    assert whole.grad is None
    assert experts.grad is None
    exact = torch.zeros(4, 8, 16)
    for expert, (start, end) in enumerate([(0, 3), (3, 3), (3, 11), (11, 30)]):
        exact[expert] = 2 * dy[start:end].float().T @ hidden[start:end].float()
    torch.testing.assert_close(sums[1], exact, rtol=1e-6, atol=1e-6)
    assert (sums[1].bfloat16().float() != sums[1]).any()
    assert sums[0].abs().max() > 0


def test_two_views_of_a_summed_parameter_land_where_they_lie():
    sink = WeightGradients()
    socket, weight = SplitLinear(PlainProducts(), sink), param(2, 3, 4, dtype=torch.bfloat16)
    total = torch.zeros_like(weight, dtype=torch.float32)
    sink.sum_into(weight, lambda: Sum(total))
    x = torch.ones(5, 4, dtype=torch.bfloat16)
    (socket(x, weight[1]).sum() + socket(x, weight[0, 1:2]).sum()).backward()
    assert total[:, :, 0].tolist() == [[0.0, 5.0, 0.0], [5.0, 5.0, 5.0]]
    sink.sum_into(weight, lambda: Sum(torch.zeros(6, 4)))
    with pytest.raises(ShapeError, match="lay the sum out as the parameter"):
        socket(x, weight[1]).sum().backward()


def test_the_first_gradient_of_a_sum_is_written_over_what_lies_there():
    sink = WeightGradients()
    socket = SplitLinear(PlainProducts(), sink)
    weight, gate_up = param(3, 4, dtype=torch.bfloat16), param(2, 3, 4, dtype=torch.bfloat16)
    sums = [torch.full_like(p, torch.nan, dtype=torch.float32) for p in (weight, gate_up)]
    fresh = [iter([True, False]), iter([True, False])]
    for p, total, first in zip((weight, gate_up), sums, fresh, strict=True):
        sink.sum_into(p, lambda total=total, first=first: Sum(total, next(first)))
    x = torch.ones(5, 4, dtype=torch.bfloat16)
    for _ in range(2):
        socket(x, weight).sum().backward()
    assert (sums[0] == 10.0).all()
    socket(x, gate_up[1]).sum().backward()  # a part: the other one is zeros
    assert sums[1][:, :, 0].tolist() == [[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]


@pytest.mark.parametrize("defer", [False, True])
def test_recomputed_activations_give_the_same_gradients(defer):
    results = []
    for wrap in (False, True):
        sink = WeightGradients()
        socket, weights = SplitLinear(PlainProducts(), sink), (param(2, 8, 24), param(24, 16, seed=2))

        def phase(x, socket=socket, weights=weights):
            return socket(socket(x, weights[0].flatten(0, 1)).tanh(), weights[1])

        def loss(phase=phase, wrap=wrap):
            x = made(7, 24).requires_grad_()
            run = functools.partial(checkpoint, phase, use_reentrant=False) if wrap else phase
            return run(x).square().sum()

        step(socket, sink, [loss, loss], defer=defer)
        results.append([w.grad for w in weights])
    for plain, wrapped in zip(*results, strict=True):
        assert torch.equal(plain, wrapped)


def test_a_computed_weight_is_multiplied_at_once_and_refused_when_it_would_wait():
    sink = WeightGradients()
    socket, weight = SplitLinear(PlainProducts(), sink), param(4, 4)
    socket(torch.eye(4), weight * 2).sum().backward()
    assert weight.grad.unique().tolist() == [2.0]
    with pytest.raises(ScheduleError, match="parameter or a view"), sink.defer():
        socket(torch.eye(4), weight * 2).sum().backward()


def test_frozen_operands_get_no_gradient_and_keep_nothing():
    sink = WeightGradients()
    socket = SplitLinear(PlainProducts(), sink)
    x, weight = made(5, 8).requires_grad_(), param(6, 8).detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = socket(x, weight)
    assert [tuple(t.shape) for t in kept] == [(6, 8)]
    with sink.defer():
        out.sum().backward()
    assert (sink.pending, weight.grad) == (0, None)
    assert dataclasses.replace(socket) == socket


def test_weight_gradients_in_two_dtypes_are_refused_with_both():
    with pytest.raises(
        ShapeError, match=r"37 output gradients in torch\.float32 but 37 rows in torch\.bfloat16"
    ):
        ops.weight_gradient(made(37, 4), made(37, 8, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match=r"gradients are 5 wide .* but weights give 6"):
        ops.grouped_input_gradient(made(3, 5), made(2, 6, 7), torch.tensor((1, 3), dtype=torch.int32))
