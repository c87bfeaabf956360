"""A chunk between forward and backward: gradients through cuts, and nothing kept that nobody reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from live_memory import LiveMemory

from benthic.parallel.chunk import Chunk, Phase


class Pair(NamedTuple):
    """A state of two tensors, one of which only passes."""

    passing: torch.Tensor
    value: torch.Tensor


def phases(weight: torch.Tensor) -> list[Phase]:
    return [
        Phase("split", "compute", lambda x: Pair(x, x @ weight)),
        Phase("square", "compute", lambda pair: Pair(pair.passing, pair.value.square())),
        Phase("join", "compute", lambda pair: pair.passing + pair.value),
    ]


def test_gradients_through_cuts_are_those_of_the_whole() -> None:
    x, weight = torch.randn(5, 4), torch.randn(4, 4, requires_grad=True)
    whole = x.clone().requires_grad_()
    (whole + (whole @ weight).square()).backward(torch.ones(5, 4))
    expected, weight.grad = weight.grad, None
    chunk = Chunk(phases(weight), x.requires_grad_())
    while chunk.next_forward is not None:
        chunk.forward()
    assert torch.equal(chunk.take_output(), x + (x @ weight).square())
    assert chunk.take_output() is None
    chunk.state.grad = torch.ones(5, 4)
    while chunk.next_backward is not None:
        chunk.backward()
    (gradient,) = chunk.input_gradients()
    assert torch.allclose(gradient, whole.grad)
    assert torch.allclose(weight.grad, expected)


def test_what_no_phase_saved_is_not_alive_between_forward_and_backward() -> None:
    """Of four tensors [1000, 4], the square and the sum are saved by nobody; the input is the caller's."""
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(1000, 4, requires_grad=True)
    with LiveMemory() as memory:
        chunk = Chunk(phases(weight), x)
        while chunk.next_forward is not None:
            chunk.forward()
        chunk.take_output()
        large = [shape for _, _, shape, _ in memory.alive() if shape == (1000, 4)]
    assert len(large) == 1  # the product, of which square needs the value
