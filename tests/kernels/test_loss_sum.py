"""The head's loss whose gradients are made in the forward pass, on a CPU."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ShapeError
from benthic.kernels import ops
from benthic.kernels.chunked_loss import chunk_of

TOKENS, WIDTH, WORDS = 29, 12, 53


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(WORDS, (TOKENS,), generator=generator)
    target[[0, 7, 28]] = -100
    return hidden, weight, target


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_gradients_are_those_of_finite_differences_whatever_comes_in(impl: str) -> None:
    hidden, weight, target = operands()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total, _ = ops.linear_cross_entropy_sum(hidden, weight, target, factor=0.3, chunk=8, impl=impl)
        return 1.7 * total

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_backward_from_anything_but_one_gives_nan_where_the_weight_gradient_is_added_already() -> None:
    hidden, weight, target = operands()
    into = torch.zeros_like(weight)
    loss, _ = ops.linear_cross_entropy_sum(hidden, weight, target, into_VD=into)
    (2.0 * loss).backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().all()
    assert weight.grad is None


def test_two_heads_of_one_weight_add_up_in_its_sum() -> None:
    hidden, weight, target = operands()
    into = torch.zeros_like(weight)
    for factor in (0.5, 0.25):
        ops.linear_cross_entropy_sum(hidden, weight, target, factor=factor, into_VD=into)[0].backward()
    loss = ops.linear_cross_entropy(hidden, weight, target, impl="reference").sum()
    torch.testing.assert_close(into, torch.autograd.grad(0.75 * loss, weight)[0])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_the_first_gradient_is_written_over_what_was_there(impl: str) -> None:
    hidden, weight, target = operands()
    sums = [torch.zeros_like(weight), torch.full_like(weight, torch.nan)]
    for into, fresh in zip(sums, (False, True), strict=True):
        loss, _ = ops.linear_cross_entropy_sum(
            hidden, weight, target, chunk=4, into_VD=into, fresh=fresh, impl=impl
        )
        loss.backward()
    assert torch.equal(*sums)
    assert sums[0].any()
    with torch.no_grad():
        ops.linear_cross_entropy_sum(hidden, weight, target, into_VD=sums[1], fresh=True, impl=impl)
    assert sums[1].eq(0).all()
    ops.linear_cross_entropy_sum(hidden[:0], weight, target[:0], into_VD=sums[0], fresh=True, impl=impl)
    assert sums[0].eq(0).all()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_without_gradients_nothing_is_added_and_nothing_recorded(impl: str) -> None:
    hidden, weight, target = operands()
    into = torch.zeros_like(weight)
    with torch.no_grad():
        loss, total = ops.linear_cross_entropy_sum(
            hidden, weight, target, factor=0.5, into_VD=into, impl=impl
        )
    assert not loss.requires_grad
    assert into.eq(0).all()
    torch.testing.assert_close(loss, 0.5 * total)


def test_ignored_tokens_alone_have_no_loss_and_no_gradient() -> None:
    hidden, weight, target = operands()
    loss, _ = ops.linear_cross_entropy_sum(hidden, weight, torch.full_like(target, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_bfloat16_gradients_of_the_weight_are_summed_in_float32() -> None:
    hidden, weight, target = operands(torch.bfloat16)
    into = torch.zeros(WORDS, WIDTH)
    ops.linear_cross_entropy_sum(hidden, weight, target, chunk=4, into_VD=into)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ops.linear_cross_entropy(*exact, target).sum().backward()
    assert exact[1].grad is not None
    error = (into - exact[1].grad).norm() / exact[1].grad.norm()
    assert error < 0.01


def test_a_sum_of_another_shape_is_refused_with_both() -> None:
    hidden, weight, target = operands()
    with pytest.raises(ShapeError, match=r"\(53, 12\) cannot be added to \(12, 53\)"):
        ops.linear_cross_entropy_sum(hidden, weight, target, into_VD=torch.zeros(WIDTH, WORDS))


def test_chunks_fit_their_room_and_are_even() -> None:
    assert chunk_of(16384, 163840, 2, 1 << 30) == 2816  # 6 chunks, whole tiles of 128
    assert chunk_of(100, 163840, 2, 1 << 20) == 3
    assert chunk_of(5, 50, 4, 1) == 1
    assert chunk_of(0, 50, 4, 1 << 20) >= 1
