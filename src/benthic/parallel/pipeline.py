"""Executes any pipeline table with real tensors.

What a rank does is its program, `benthic.sched.pipeline.lower`: slots, sends and receives in an order that
cannot deadlock. A slot of one action runs all phases of a chunk forward (F), backward (B), backward without
weight gradients (I), or computes the weight gradients that an I has put off (W). A slot of two runs the
phases of a forward and of a backward alternately, so that one computes while the other communicates.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from benthic.errors import PeerLostError, PipelineError
from benthic.model.products import WeightGradients
from benthic.parallel.chunk import Chunk
from benthic.sched.pipeline.dependencies import feeds
from benthic.sched.pipeline.lower import Compute, Program, Recv, Send, lower
from benthic.sched.pipeline.spans import Span
from benthic.sched.pipeline.table import Action, Slot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from benthic.parallel.chunk import Phase
    from benthic.parallel.links import Arrival, Links
    from benthic.parallel.stopwatch import Stopwatch
    from benthic.sched.pipeline.table import Table

    Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Flow:
    """What passes through the phases of a stage: residual stream (or a block's state) and loss so far.

    `loss` is the stage's own share of the weighted loss, a float32 scalar, or None before there is any.
    """

    value: Any
    loss: Tensor | None = None


class Stage(Protocol):
    """One stage of the model on this rank."""

    def phases(self, microbatch: int) -> Sequence[Phase]:
        """The stage's phases, from `Flow` to `Flow`, for one microbatch."""
        ...

    def boundary(self, microbatch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor that enters the stage, and of its gradient."""
        ...

    def finished(self, microbatch: int) -> None:
        """All gradients of one microbatch are in."""
        ...


@dataclass
class TableExecutor:
    """Runs one rank of a table.

    Args:
        table: checked.
        rank: pipeline rank.
        stages: the stages that live here, by number.
        links: to the other pipeline ranks; a table of one rank needs none.
        sink: where the weight gradients of an I wait for their W.
        stopwatch: measures every slot; None: nothing is measured.
    """

    table: Table
    rank: int
    stages: Mapping[int, Stage]
    links: Links | None = None
    sink: WeightGradients = field(default_factory=WeightGradients)
    stopwatch: Stopwatch | None = None
    _program: Program = field(init=False)
    _chunks: dict[tuple[int, int], Chunk] = field(default_factory=dict)
    _arrivals: dict[Action, tuple[Arrival, int]] = field(default_factory=dict)
    _results: dict[Action, Tensor] = field(default_factory=dict)
    _waiting: dict[tuple[int, int], int] = field(default_factory=dict)
    _marks: list[tuple[Slot, Mark, Mark]] = field(default_factory=list)
    _position: int = field(default=0)
    _active: tuple[Chunk, ...] = field(default=())
    _awaited: tuple[Action, int] | None = field(default=None)

    def __post_init__(self) -> None:
        """Lower the table once."""
        self._program = lower(self.table)[self.rank]

    def run(self, *, forward_only: bool = False) -> None:
        """Forward and backward of every microbatch of one step; gradients are then in the parameters.

        `forward_only` leaves out the backwards and what they would send; call it without gradients.

        Raises:
            PipelineError: something failed; rank, slot and the slots before it are named.
            PeerLostError: what failed is the connection to another pipeline rank, which is named.
        """
        self._marks.clear()
        if self.stopwatch is not None:
            self.stopwatch.start()
        # Backward in a thread of its own would cost two wake-ups a phase, and this thread only waits for it.
        with torch.autograd.set_multithreading_enabled(mode=False):
            self._work(forward_only=forward_only)
        self._chunks.clear()
        self._active = ()
        if self.links is not None:
            self._finish(self.links)

    def _work(self, *, forward_only: bool) -> None:
        """The program, operation by operation."""
        for position, op in enumerate(self._program):
            self._position = position
            if forward_only and not isinstance(op, Compute) and op.payload.kind != "F":
                continue
            if isinstance(op, Compute):
                self._slot(op.slot, position, forward_only=forward_only)
            elif isinstance(op, Send):
                self._wired.send(self._results.pop(op.payload), op.to)
            else:
                self._receive(op)

    def spans(self, step: int) -> list[Span]:
        """When each slot of the last run began and ended; empty without a stopwatch."""
        watch = self.stopwatch
        if watch is None:
            return []
        return [
            Span(self.rank, slot, watch.seconds(start), watch.seconds(end), step)
            for slot, start, end in self._marks
        ]

    def doing(self) -> str:
        """What this rank is in the middle of, for a report about a run that hangs; any thread may ask.

        On a GPU it is what the host launched last.
        """
        at = f"operation {self._position + 1} of {len(self._program)} of table {self.table.name!r}"
        phases = [chunk.running for chunk in self._active if chunk.running is not None]
        inside = f", in phase {' and '.join(phases)}" if phases else ""
        awaited = self._awaited
        waits = "" if awaited is None else f", waits for {awaited[0]} from pipeline rank {awaited[1]}"
        return f"pipeline rank {self.rank}: {self._program[self._position]} ({at}){inside}{waits}"

    def _finish(self, links: Links) -> None:
        try:
            links.finish()
        except RuntimeError as error:
            to = sorted({op.to for op in self._program if isinstance(op, Send)})
            message = f"pipeline rank {self.rank} could not send everything to pipeline ranks {to}: {error}"
            raise PeerLostError(message) from error

    @property
    def _wired(self) -> Links:
        assert self.links is not None, "a table of several ranks needs links"  # noqa: S101
        return self.links

    def _receive(self, op: Recv) -> None:
        """Activations come in the shape that the next stage takes, gradients in that of the stage before."""
        stage = feeds(op.payload, self.table.stages)
        front = stage if op.payload.kind == "F" else op.payload.stage
        assert stage is not None and front is not None, f"nothing waits for {op.payload}"  # noqa: S101, PT018
        home = self.stages[stage]
        arrival = self._wired.receive(*home.boundary(op.payload.microbatch), op.source)
        self._arrivals[op.payload] = arrival, op.source

    def _slot(self, slot: Slot, position: int, *, forward_only: bool) -> None:
        if forward_only:
            if slot.first.kind != "F":
                return
            slot = Slot(slot.first)
        try:
            start = self._single(slot.first) if slot.second is None else self._pair(slot.first, slot.second)
        except Exception as error:
            before = " ".join(str(op) for op in self._program[max(0, position - 4) : position])
            message = (
                f"pipeline rank {self.rank} failed in slot {slot} of table {self.table.name!r} "
                f"(operation {position + 1} of {len(self._program)}, after: {before or 'nothing'}): "
                f"{type(error).__name__}: {error}"
            )
            kind = PeerLostError if isinstance(error, PeerLostError) else PipelineError
            raise kind(message) from error
        if self.stopwatch is not None and start is not None:
            self._marks.append((slot, start, self.stopwatch.mark()))

    def _mark(self) -> Mark | None:
        return None if self.stopwatch is None else self.stopwatch.mark()

    def _single(self, action: Action) -> Mark | None:
        """Run a slot of one action; when it began, which is after what it needs has arrived."""
        if action.kind == "W":
            start = self._mark()
            self._weights(action)
            return start
        chunk = self._enter(action)
        self._active, start = (chunk,), self._mark()
        forward = action.kind == "F"
        with self._gradients(action):
            while (chunk.next_forward if forward else chunk.next_backward) is not None:
                chunk.forward() if forward else chunk.backward()
        self._leave(action, chunk)
        return start

    def _pair(self, forward: Action, backward: Action) -> Mark | None:
        """Alternate between two chunks, so that one computes while what the other has sent travels.

        A phase ends where a transfer is on its way, which the chunk's next phase finishes: each transfer has
        a phase of the other chunk to hide behind. The backward goes first, for it gives memory back.
        """
        ahead, back = self._enter(forward), self._enter(backward)
        self._active, start = (ahead, back), self._mark()
        while ahead.next_forward is not None or back.next_backward is not None:
            if back.next_backward is not None:
                with self._gradients(backward):
                    back.backward()
            if ahead.next_forward is not None:
                ahead.forward()
        self._leave(forward, ahead)
        self._leave(backward, back)
        return start

    def _gradients(self, action: Action) -> AbstractContextManager[None]:
        """Weight gradients are put aside during an I."""
        return self.sink.defer() if action.kind == "I" else nullcontext()

    def _enter(self, action: Action) -> Chunk:
        """The chunk of an action, with what it needs from its neighbour."""
        key = (action.stage, action.microbatch)
        if action.kind == "F":
            value = None if action.stage == 0 else self._arrived(action._replace(stage=action.stage - 1))
            if value is not None and torch.is_grad_enabled():
                value.requires_grad_()
            chunk = Chunk(self.stages[action.stage].phases(action.microbatch), Flow(value))
            self._chunks[key] = chunk
            return chunk
        chunk = self._chunks[key]
        flow: Flow = chunk.state
        if action.stage + 1 < self.table.stages:
            flow.value.grad = self._arrived_gradient(action.stage + 1, action.microbatch)
        if flow.loss is not None and flow.loss.requires_grad:
            flow.loss.grad = torch.ones_like(flow.loss)
        return chunk

    def _arrived(self, need: Action) -> Tensor:
        if need in self._results:
            return self._results.pop(need)
        arrival, source = self._arrivals.pop(need)
        self._awaited = need, source
        try:
            tensor = arrival.wait()
        except RuntimeError as error:
            message = f"lost pipeline rank {source} while waiting for {need}: {error}"
            raise PeerLostError(message) from error
        self._awaited = None
        return tensor

    def _arrived_gradient(self, stage: int, microbatch: int) -> Tensor:
        """The gradient that the next stage's backward, a B or an I, has left."""
        whole, split = Action("B", stage, microbatch), Action("I", stage, microbatch)
        here = split if split in self._results or split in self._arrivals else whole
        return self._arrived(here)

    def _leave(self, action: Action, chunk: Chunk) -> None:
        """Keep what the neighbour needs; forget what nobody needs any more."""
        key = (action.stage, action.microbatch)
        if action.kind == "F":
            output = chunk.take_output()
            if action.stage + 1 < self.table.stages:
                self._results[action] = output.value.detach()
            return
        if action.stage > 0:
            (gradient,) = chunk.input_gradients()
            assert gradient is not None, f"{action} left no gradient for the stage before"  # noqa: S101
            self._results[action] = gradient
        del self._chunks[key]
        if action.kind == "I":
            self._waiting[key] = self.sink.flush()
        else:
            self.stages[action.stage].finished(action.microbatch)

    def _weights(self, action: Action) -> None:
        self.sink.run(self._waiting.pop((action.stage, action.microbatch)))
        self.stages[action.stage].finished(action.microbatch)
