"""One microbatch on its way through one stage: forward in pieces, then backward in the same pieces.

A stage is a list of phases, each a function from state to state. Between two phases the graph is cut: the
tensors of the state are detached, and the next phase starts a graph of its own. Backward can then run phase
by phase too, so that an executor may run something else in between.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.autograd.graph import get_gradient_edge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

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


Cut = list[tuple["GradientEdge | None", "Tensor"]]
"""For each tensor of a cut that has a gradient: the graph before it, and the leaf that gathers its gradient.

Neither holds the tensor's memory: what no phase saved is gone as soon as the next phase has read it.
"""


def cut(state: Any, pairs: Cut) -> Any:
    """A copy of `state` whose tensors start a graph of their own; `pairs` gets each that has a gradient."""

    def stand_in(tensor: Tensor) -> Tensor:
        result: Tensor = _StandIn.apply(_leaf(tensor, pairs), tensor.detach())
        return result

    return _mapped(state, stand_in)


def end(state: Any, pairs: Cut) -> Any:
    """As `cut`, but with the leaves themselves in place of the tensors: what waits for gradients."""
    return _mapped(state, lambda tensor: _leaf(tensor, pairs))


def _mapped(state: Any, each: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        return each(state) if state.requires_grad else state
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        inner = {f.name: _mapped(getattr(state, f.name), each) for f in dataclasses.fields(state)}
        return dataclasses.replace(state, **inner)
    if isinstance(state, tuple):
        inner_values = [_mapped(value, each) for value in state]
        return type(state)(*inner_values) if hasattr(state, "_fields") else tuple(inner_values)
    return state


def _leaf(tensor: Tensor, pairs: Cut) -> Tensor:
    """A leaf of the tensor's shape whose memory is one element."""
    leaf = tensor.new_empty(()).expand(tensor.shape).requires_grad_()
    # The graph before a leaf is the leaf: to keep that would keep its memory, and nobody goes back there.
    pairs.append((None if tensor.grad_fn is None else get_gradient_edge(tensor), leaf))
    return leaf


class _StandIn(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004 (the leaf is linked)
        """Save nothing."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        """To the leaf."""
        return grads[0], None


@dataclass
class Chunk:
    """The state of one microbatch in one stage, between its forward and the end of its backward.

    Attributes:
        phases: of the stage, bound to this microbatch.
        state: what the next phase starts from; after the last phase, the output's shape made of leaves, in
            whose `.grad` whoever runs the backward leaves the gradients of the output.
        running: the phase that was started last.
    """

    phases: Sequence[Phase]
    state: Any
    _cuts: list[Cut] = field(default_factory=list)
    running: Phase | None = None
    _held: Weights | None = None
    _output: Any = None

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
        after = phase.run(self.state)
        if self.next_forward is None:
            self._output, self.state = after, end(after, self._cuts[-1])
            self._hold(None)
        else:
            self.state = cut(after, self._cuts[-1])

    def take_output(self) -> Any:
        """After the last `forward`: the stage's output, once; the chunk itself does not need it."""
        output, self._output = self._output, None
        return output

    def backward(self) -> None:
        """Run the last phase backward from the gradients of the leaves after it, and forget it."""
        self.running = phase = _existing(self.next_backward)
        self._hold(phase.weights)
        self.state = None
        known = [(edge, leaf.grad) for edge, leaf in self._cuts.pop() if leaf.grad is not None]
        if known:
            edges, gradients = zip(*known, strict=True)
            torch.autograd.backward(edges, gradients)
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
