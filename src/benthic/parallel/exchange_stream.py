"""A stream for what an exchange writes into peers' memory, so that it runs beside the computing stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Inputs = tuple[Tensor | None, ...]


class Pushed(Protocol):
    """A push under way; both may be called again."""

    def join(self) -> None:
        """Make the current stream wait for its end; called before an input is overwritten."""
        ...

    def wait(self) -> None:
        """Make the host wait for its end."""
        ...


class PushStream(Protocol):
    """Where pushes run, one behind the other."""

    def __call__(self, push: Callable[[], None], inputs: Inputs) -> Pushed:
        """Start `push`, which reads `inputs` and leaves no tensor of its own, behind all launched before."""
        ...


def push_stream(device: torch.device) -> PushStream:
    """A stream of its own on a GPU; elsewhere pushes happen at once."""
    return CudaPushStream(device) if device.type == "cuda" else at_once


def at_once(push: Callable[[], None], inputs: Inputs) -> Pushed:  # noqa: ARG001 (the signature)
    """Push before anything else."""
    push()
    return _Over()


class _Over:
    """Nothing to wait for."""

    def join(self) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""


class CudaPushStream:
    """Pushes on a stream of high priority, for peers wait for its small kernels.

    Inputs are memory of the computing stream. They are kept here, not by whoever started the push, until
    the computing stream has waited for its end: what is forgotten after an error is not given to others
    while it is read. Events fork and join inside a captured CUDA graph as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._kept: dict[object, Inputs] = {}

    def __call__(self, push: Callable[[], None], inputs: Inputs) -> Pushed:
        """See `PushStream`."""
        ready, over = torch.cuda.Event(), torch.cuda.Event()
        self._kept[over] = inputs
        ready.record()
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            push()
            over.record()
        return _UnderWay(over, self._kept)


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """Until `over`."""

    over: torch.cuda.Event
    kept: dict[object, Inputs]

    def join(self) -> None:
        """Wait and let go of the inputs, once."""
        if self.kept.pop(self.over, None) is not None:
            self.over.wait()

    def wait(self) -> None:
        """Wait on the host."""
        self.over.synchronize()
