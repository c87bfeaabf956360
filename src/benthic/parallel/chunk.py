"""One microbatch on its way through one stage: forward in pieces, then backward in the same pieces.

A stage is a list of phases, each a function from state to state. Between two phases the graph is cut: the
tensors of the state are detached, and the next phase starts from leaves. Backward can then run phase by
phase too, so that an executor may run something else in between.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Lane = Literal["compute", "network"]


class Weights(Protocol):
    """What must be in memory while a phase runs, forward or backward (sharded parameters)."""

    def acquire(self) -> None:
        """Make the parameters whole."""
        ...

    def release(self) -> None:
        """They are not needed until the next `acquire`."""
        ...


@dataclass(frozen=True)
class Phase:
    """One piece of a stage.

    `run` maps the state before to the state after; a state is a tensor, or a dataclass or tuple of them.
    `lane` says what it mostly uses. `weights` must be held while it runs.
    """

    name: str
    lane: Lane
    run: Callable[[Any], Any]
    weights: Weights | None = None


Cut = list[tuple["Tensor", "Tensor"]]
"""Tensors before a cut with the leaves that stand for them after it."""


def cut(state: Any, pairs: Cut) -> Any:
    """A copy of `state` whose tensors are leaves; `pairs` gets each that has a gradient, with its leaf."""
    if isinstance(state, torch.Tensor):
        if not state.requires_grad:
            return state
        leaf = state.detach().requires_grad_()
        pairs.append((state, leaf))
        return leaf
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        inner = {f.name: cut(getattr(state, f.name), pairs) for f in dataclasses.fields(state)}
        return dataclasses.replace(state, **inner)
    if isinstance(state, tuple):
        inner_values = [cut(value, pairs) for value in state]
        return type(state)(*inner_values) if hasattr(state, "_fields") else tuple(inner_values)
    return state


@dataclass
class Chunk:
    """The state of one microbatch in one stage, between its forward and the end of its backward.

    Attributes:
        phases: of the stage, bound to this microbatch.
        state: what the next phase starts from; after the last phase, the stage's output.
        running: the phase that was started last.
    """

    phases: Sequence[Phase]
    state: Any
    _cuts: list[Cut] = field(default_factory=list)
    running: Phase | None = None
    _held: Weights | None = None

    def __post_init__(self) -> None:
        """Cut the first phase off from whatever made the state."""
        self._cuts.append([])
        self.state = cut(self.state, self._cuts[0])

    @property
    def next_forward(self) -> Phase | None:
        """The phase that `forward` will run; None after the last."""
        done = len(self._cuts) - 1
        return self.phases[done] if done < len(self.phases) else None

    @property
    def next_backward(self) -> Phase | None:
        """The phase that `backward` will run; None after the first."""
        left = len(self._cuts) - 1
        return self.phases[left - 1] if left else None

    def forward(self) -> None:
        """Run the next phase and cut after it."""
        self.running = phase = _existing(self.next_forward)
        self._hold(phase.weights)
        self._cuts.append([])
        self.state = cut(phase.run(self.state), self._cuts[-1])
        if self.next_forward is None:
            self._hold(None)

    def backward(self) -> None:
        """Run the last phase backward from the gradients of the leaves after it, and forget it."""
        self.running = phase = _existing(self.next_backward)
        self._hold(phase.weights)
        self.state = None
        known = [(tensor, leaf.grad) for tensor, leaf in self._cuts.pop() if leaf.grad is not None]
        if known:
            tensors, gradients = zip(*known, strict=True)
            torch.autograd.backward(tensors, gradients)
        if self.next_backward is None:
            self._hold(None)

    def input_gradients(self) -> list[Tensor | None]:
        """After the last `backward`: the gradients of the tensors that the stage started from."""
        return [leaf.grad for _, leaf in self._cuts[0]]

    def _hold(self, weights: Weights | None) -> None:
        """Have these weights in memory and let go of those held before."""
        if weights == self._held:
            return
        if weights is not None:
            weights.acquire()
        if self._held is not None:
            self._held.release()
        self._held = weights


def _existing(phase: Phase | None) -> Phase:
    assert phase is not None, "no phase is left in this direction"  # noqa: S101 (the caller asked `next_*`)
    return phase
