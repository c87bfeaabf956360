"""Two streams of a GPU, one that computes and one that communicates; on a CPU everything runs in turn."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.parallel.chunk import Chunk


@dataclass
class Lanes:
    """Runs the phases of chunks, each on the stream of its lane, after the phase before it.

    A chunk's phases depend on each other alone, so the streams are ordered by one event a chunk. Tensors
    that cross are marked for the allocator.
    """

    network: torch.cuda.Stream | None = None
    _ready: dict[int, torch.cuda.Event] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device) -> Lanes:
        """A second stream on a GPU, none on a CPU."""
        if device.type != "cuda":
            return cls()
        return cls(torch.cuda.Stream(device, priority=-1))

    def step(self, chunk: Chunk, *, forward: bool) -> None:
        """Run the next phase of `chunk` in one direction."""
        run = chunk.forward if forward else chunk.backward
        phase = chunk.next_forward if forward else chunk.next_backward
        if self.network is None or phase is None:
            run()
            return
        compute = torch.cuda.current_stream()
        stream = self.network if phase.lane == "network" else compute
        before = self._ready.pop(id(chunk), None)
        if before is None:
            before = torch.cuda.Event()
            before.record(compute)
        stream.wait_event(before)
        with torch.cuda.stream(stream):
            run()
            after = torch.cuda.Event()
            after.record(stream)
        for tensor in tensors(chunk):
            tensor.record_stream(self.network if stream is compute else compute)
        compute_next = (chunk.next_forward if forward else chunk.next_backward) is None
        if compute_next:  # what follows the chunk (a send, the next stage) is on the computing stream
            compute.wait_event(after)
        else:
            self._ready[id(chunk)] = after

    def join(self) -> None:
        """Let the computing stream wait for everything on the other."""
        if self.network is not None:
            torch.cuda.current_stream().wait_stream(self.network)
        self._ready.clear()


def tensors(chunk: Chunk) -> Iterator[torch.Tensor]:
    """The tensors between the phase that ran last and the next one, and their gradients."""
    yield from _tensors(chunk.state)
    for _, leaf in chunk.border():
        yield leaf
        if leaf.grad is not None:
            yield leaf.grad


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif is_dataclass(state):
        for each in fields(state):
            yield from _tensors(getattr(state, each.name))
    elif isinstance(state, tuple):
        for value in state:
            yield from _tensors(value)
