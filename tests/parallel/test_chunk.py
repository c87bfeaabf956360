"""A chunk between forward and backward: gradients through cuts, and nothing kept that nobody reads."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from live_memory import LiveMemory

from benthic.parallel.chunk import Chunk, Phase, Step, joined


class Pair(NamedTuple):
    """A state of two tensors, one of which only passes."""

    passing: torch.Tensor
    value: torch.Tensor


def phases(weight: torch.Tensor, *, apart: bool = True) -> list[Phase]:
    steps = (
        Step("split", lambda x: Pair(x, x @ weight), sends=True),
        Step("square", lambda pair: Pair(pair.passing, pair.value.square()), sends=True),
        Step("join", lambda pair: pair.passing + pair.value),
    )
    return joined(steps, apart=apart)


class Named:
    """Weights that are equal if their names are, as those of one unit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def acquire(self) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""


def names(phases: list[Phase]) -> list[list[str]]:
    return [[step.name for step in phase.steps] for phase in phases]


def test_steps_are_cut_for_weights_for_transfers_and_before_what_is_read_again() -> None:
    def step(name: str, unit: str | None, **known: bool) -> Step:
        return Step(name, lambda x: x, None if unit is None else Named(unit), **known)

    steps = [
        step("embed", "E"),
        step("attention", "0"),
        step("dispatch", "0", sends=True),
        step("experts", "0", sends=True),
        step("combine", None),
        step("next", "1"),
        step("head", "H"),
        step("project", "H", again=True),
    ]
    whole = [["embed"], ["attention", "dispatch", "experts", "combine"], ["next"], ["head"], ["project"]]
    assert names(joined(steps, apart=False)) == whole
    apart = joined(steps, apart=True)
    assert names(apart) == [
        ["embed"], ["attention", "dispatch"], ["experts"], ["combine", "next"], ["head"], ["project"],
    ]  # fmt: skip
    assert [phase.weights for phase in apart] == [Named(unit) for unit in "E001HH"]
    assert [phase.name for phase in apart[1:3]] == ["attention to dispatch", "experts"]
    held = [Step(each.name, each.run, None, each.sends, each.again) for each in steps]
    assert [len(each) for each in names(joined(held, apart=False))] == [7, 1]


@pytest.mark.parametrize("apart", [True, False])
def test_gradients_through_cuts_are_those_of_the_whole(apart: bool) -> None:  # noqa: FBT001
    x, weight = torch.randn(5, 4), torch.randn(4, 4, requires_grad=True)
    whole = x.clone().requires_grad_()
    (whole + (whole @ weight).square()).backward(torch.ones(5, 4))
    expected, weight.grad = weight.grad, None
    chunk = Chunk(phases(weight, apart=apart), x.requires_grad_())
    assert len(chunk.phases) == (3 if apart else 1)
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
