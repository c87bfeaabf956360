"""The ranks that serve one model together, and the few collectives that they need."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

from benthic.parallel.collectives import gather
from benthic.parallel.mesh import Group

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

HOST: Final = "127.0.0.1"

Store = dist.TCPStore
"""Where the ranks of a team find each other."""


def open_store() -> Store:
    """A store of this process, which the others reach at its `port`."""
    return Store(HOST, 0, is_master=True, wait_for_workers=False)


def file_store(path: Path, size: int) -> dist.Store:
    """A store in a file, for `size` ranks of one host of which none comes first."""
    return dist.FileStore(str(path), size)


@dataclass(frozen=True)
class Team:
    """Rank `index` of `size` on one host; NCCL between GPUs, gloo on a CPU.

    Every rank makes the same calls in the same order. A rank that ends or does not come makes the others'
    calls raise RuntimeError, at once with gloo and after the timeout of `join` with NCCL.
    """

    index: int
    size: int
    device: torch.device

    @classmethod
    def join(
        cls, store: dist.Store | int, index: int, size: int, device: torch.device, *, timeout_s: float
    ) -> Team:
        """Become rank `index` of the default process group; every rank must call it.

        Args:
            store: where the ranks find each other, or the port of `open_store`'s.
            index: this rank.
            size: how many there are.
            device: what this rank computes on; on GPUs each has one of its own.
            timeout_s: how long a collective may take.
        """
        if isinstance(store, int):
            store = Store(HOST, store, is_master=False)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=index,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
        return cls(index, size, device)

    @property
    def group(self) -> Group:
        """The ranks as a group for collectives."""
        return Group(tuple(range(self.size)), self.index, None)

    def part(self, *, orderly: bool = True) -> None:
        """Leave the group; unless all ranks do, NCCL's is left as it is, since taking it down could hang."""
        if orderly or self.device.type != "cuda":
            dist.destroy_process_group()

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, in place, the same bits on each."""
        dist.all_reduce(part)
        return part

    def columns(self, part_SV: Tensor) -> Tensor:
        """All ranks' columns side by side."""
        rows, width = part_SV.shape
        whole_NSV = part_SV.new_empty((self.size * rows, width))
        gather(whole_NSV, part_SV.contiguous(), self.group)
        return whole_NSV.view(self.size, rows, width).transpose(0, 1).reshape(rows, self.size * width)

    def told(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        number = torch.tensor([value], device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
        return int(number)
