"""One microbatch on its way through one stage: forward in pieces, then backward in the same pieces.

A stage is a list of steps, each a function from state to state, joined to as few phases as there may be.
Between two phases the graph is cut: the tensors of the state are detached, and the next phase starts a graph
of its own. Backward can then run phase by phase too, so that an executor may run something else in between.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.graph import get_gradient_edge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge


class Weights(Protocol):
    """What must be in memory while a phase runs, forward or backward (sharded parameters)."""

    def acquire(self) -> None:
        """Make the parameters whole."""
        ...

    def release(self) -> None:
        """They are not needed until the next `acquire`."""
        ...


@dataclass(frozen=True)
class Step:
    """One piece of a stage.

    `run` maps the state before to the state after; a state is a tensor, or a dataclass or tuple of them.
    `weights` must be held while it runs. With `sends` it leaves a transfer on its way that the next step
    finishes; backward, the next one leaves one that this one finishes. With `again` it reads parameters that
    steps before it have read.
    """

    name: str
    run: Callable[[Any], Any]
    weights: Weights | None = None
    sends: bool = False
    again: bool = False


@dataclass(frozen=True)
class Phase:
    """Steps between two cuts, and the weights that all of them hold."""

    steps: tuple[Step, ...]
    weights: Weights | None

    @property
    def name(self) -> str:
        """Its steps, from the first to the last."""
        first, last = self.steps[0].name, self.steps[-1].name
        return first if first == last else f"{first} to {last}"


def joined(steps: Iterable[Step], *, apart: bool) -> list[Phase]:
    """Steps in order as phases, cut where other weights are needed and, with `apart`, behind what sends.

    Every cut costs the host the end of a graph and the start of another, forward and backward. One comes too
    before parameters are read again: in one graph their two gradients were added to each other first, and
    the sum had other bits than in a layout that has these steps on two ranks.
    """
    found: list[list[Step]] = []
    held: Weights | None = None
    for step in steps:
        other = held is not None and step.weights is not None and step.weights != held
        if not found or other or step.again or (apart and found[-1][-1].sends):
            found.append([])
            held = None
        found[-1].append(step)
        held = held if step.weights is None else step.weights
    weights = (next((s.weights for s in each if s.weights is not None), None) for each in found)
    return [Phase(tuple(each), its) for each, its in zip(found, weights, strict=True)]


@dataclass
class Cut:
    """The graph before a cut, and the gradients that come back to it, one slot for each tensor that has one.

    Neither holds a tensor's memory: what no phase saved is gone as soon as the next phase has read it.
    """

    edges: list[GradientEdge | None] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)

    def collect(self, state: Any) -> list[Tensor]:
        """Make room for the gradients of a state, whose tensors are returned."""
        tensors: list[Tensor] = []
        _find(state, tensors)
        # The graph before a leaf is the leaf: to keep that would keep its memory, and nobody goes back there.
        self.edges = [None if each.grad_fn is None else get_gradient_edge(each) for each in tensors]
        self.gradients = [None] * len(tensors)
        return tensors


def cut(state: Any, made: Cut) -> Any:
    """A copy of `state` whose tensors start a graph of their own, which leaves their gradients in `made`."""
    tensors = made.collect(state)
    if not tensors:
        return state
    return _with(state, iter(_Start.apply(_linked(tensors[0].device), tensors, made)))


def end(state: Any, made: Cut) -> tuple[Any, list[Tensor]]:
    """As `cut`, but with leaves whose memory is one element: what waits for gradients."""
    leaves = [each.new_empty(()).expand(each.shape).requires_grad_() for each in made.collect(state)]
    return _with(state, iter(leaves)), leaves


def _find(state: Any, found: list[Tensor]) -> None:
    """Add the tensors of a state that have a gradient."""
    if isinstance(state, torch.Tensor):
        if state.requires_grad:
            found.append(state)
    elif (values := _values(state)) is not None:
        for value in values:
            _find(value, found)


def _with(state: Any, tensors: Iterator[Tensor]) -> Any:
    """The state with others for these, in the same order."""
    if isinstance(state, torch.Tensor):
        return next(tensors) if state.requires_grad else state
    values = _values(state)
    if values is None:
        return state
    changed = [_with(value, tensors) for value in values]
    return tuple(changed) if type(state) is tuple else type(state)(*changed)


def _values(state: Any) -> tuple[Any, ...] | None:
    """The parts of a dataclass, a named tuple or a tuple; None: it has none."""
    if isinstance(state, tuple):
        return state
    names = _names(state.__class__)
    return None if names is None else tuple([getattr(state, name) for name in names])


@functools.cache
def _names(kind: type) -> tuple[str, ...] | None:
    """What a dataclass is made of."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


@functools.cache
def _linked(device: torch.device) -> Tensor:
    """Autograd records a node that has an operand with a gradient; those of a cut belong to other graphs."""
    return torch.empty(0, device=device, requires_grad=True)


class _Start(torch.autograd.Function):
    """The first node of a phase: the values of some tensors, whose gradients go no further."""

    @staticmethod
    def forward(ctx: Any, linked: Tensor, tensors: list[Tensor], made: Cut) -> tuple[Tensor, ...]:  # noqa: ARG004
        """Save nothing."""
        ctx.made = made
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
        """Leave them in their slots."""
        ctx.made.gradients = list(grads)
        return None, None, None


@dataclass
class Chunk:
    """The state of one microbatch in one stage, between its forward and the end of its backward.

    Attributes:
        phases: of the stage, bound to this microbatch.
        state: what the next phase starts from; after the last phase, the output's shape made of leaves, in
            whose `.grad` whoever runs the backward leaves the gradients of the output.
        running: the step that was started last, or backward the phase.
    """

    phases: Sequence[Phase]
    state: Any
    _cuts: list[Cut] = field(default_factory=list)
    _leaves: list[Tensor] = field(default_factory=list)
    running: str | None = None
    _held: Weights | None = None
    _output: Any = None

    def __post_init__(self) -> None:
        """Cut the first phase off from whatever made the state."""
        self._cuts.append(Cut())
        self.state = cut(self.state, self._cuts[0])

    @property
    def done(self) -> int:
        """Phases that `forward` has run and `backward` has not."""
        return len(self._cuts) - 1

    @property
    def next_forward(self) -> Phase | None:
        """The phase that `forward` will run; None after the last."""
        return self.phases[self.done] if self.done < len(self.phases) else None

    @property
    def next_backward(self) -> Phase | None:
        """The phase that `backward` will run; None after the first."""
        return self.phases[self.done - 1] if self.done else None

    def forward(self) -> None:
        """Run the next phase and cut after it."""
        phase = _existing(self.next_forward)
        self._hold(phase.weights)
        self._cuts.append(Cut())
        after, self.state = self.state, None
        for step in phase.steps:
            self.running = step.name
            after = step.run(after)
        if self.next_forward is None:
            self._output = after
            self.state, self._leaves = end(after, self._cuts[-1])
            self._hold(None)
        else:
            self.state = cut(after, self._cuts[-1])

    def take_output(self) -> Any:
        """After the last `forward`: the stage's output, once; the chunk itself does not need it."""
        output, self._output = self._output, None
        return output

    def backward(self) -> None:
        """Run the last phase backward from the gradients that came back to the cut after it; forget it."""
        phase = _existing(self.next_backward)
        self.running = phase.name
        self._hold(phase.weights)
        self.state = None
        after = self._cuts.pop()
        gradients = [leaf.grad for leaf in self._leaves] or after.gradients
        self._leaves = []
        known = [pair for pair in zip(after.edges, gradients, strict=True) if pair[1] is not None]
        if known:
            edges, left = zip(*known, strict=True)
            torch.autograd.backward(edges, left)
        if self.next_backward is None:
            self._hold(None)

    def input_gradients(self) -> list[Tensor | None]:
        """After the last `backward`: the gradients of the tensors that the stage started from."""
        return self._cuts[0].gradients

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
