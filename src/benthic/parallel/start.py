"""Joining the ranks that a launcher has started, and agreeing with them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

from benthic.errors import PeerLostError
from benthic.parallel.attempt import agree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.parallel.mesh import Group

_LOST: Final = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "lost contact with the others",
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher such as torchrun tells each process; one process by default."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


@contextmanager
def joined(launch: Launch, device: str, *, timeout_s: float) -> Iterator[None]:
    """Be part of the default process group inside; NCCL for "cuda" (one GPU a local rank), gloo for "cpu".

    A collective that is not done within `timeout_s` ends the process with an error that names it. After an
    error the group is left as it is: other ranks are told by the process's end, not by waiting for them.
    """
    if device == "cuda":
        torch.cuda.set_device(launch.local_rank)
    if launch.ranks == 1:
        yield
        return
    here = torch.device(device, launch.local_rank) if device == "cuda" else None
    shared, _, _ = next(
        dist.rendezvous("env://", launch.rank, launch.ranks, timeout=timedelta(seconds=timeout_s))
    )
    attempt = agree(shared, launch.rank, launch.ranks, timeout_s=timeout_s)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(attempt, shared),
        rank=launch.rank,
        world_size=launch.ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=here,
    )
    yield
    dist.destroy_process_group()


def broke(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a lost connection to another rank, not a fault of this one.

    gloo has no type for it, so its words decide; NCCL's errors are DistBackendError.
    """
    here: BaseException | None = error
    while here is not None:
        said = str(here)
        if isinstance(here, PeerLostError | dist.DistError) or any(words in said for words in _LOST):
            return True
        here = here.__cause__
    return False


def anyone(flag: bool, group: Group, device: torch.device) -> bool:  # noqa: FBT001 (the one thing it asks)
    """Whether any rank of the group says so; every rank must call it."""
    if group.handle is None:
        return flag
    votes = torch.tensor([int(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group.handle)
    return bool(votes.item())
