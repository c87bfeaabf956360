"""Point-to-point transfers between pipeline ranks, in the order of a lowered table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence


class Arrival(Protocol):
    """A tensor on its way."""

    def wait(self) -> torch.Tensor:
        """The tensor, once the current stream may read it."""
        ...


class Links(Protocol):
    """How results travel between pipeline ranks."""

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Start sending; the tensor is kept until it has left."""
        ...

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Arrival:
        """Start receiving."""
        ...

    def finish(self) -> None:
        """Wait until everything has left."""
        ...


@dataclass
class _Receiving:
    buffer: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.buffer


@dataclass
class GroupLinks:
    """Transfers over a process group, whose rank i is pipeline rank i.

    Sends and receives of one pair of ranks must be started in the same order on both sides, which the
    programs of `benthic.sched.pipeline.lower` guarantee.
    """

    group: dist.ProcessGroup
    device: torch.device
    _leaving: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Start sending; the tensor is kept until it has left."""
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):  # may not ask then
            self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self.group, group_dst=to)
        if work is not None:
            self._leaving.append((work, tensor))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Arrival:
        """Start receiving."""
        buffer = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        work = dist.irecv(buffer, group=self.group, group_src=source)
        assert work is not None, "this rank is not in the pipeline's group"  # noqa: S101
        return _Receiving(buffer, work)

    def finish(self) -> None:
        """Wait until everything has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()
