"""The two flat collectives of ZeRO, under the names that torch had before 2.13 and has since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.parallel.mesh import Group

_GATHER: Final[Callable[..., object]] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_SCATTER: Final[Callable[..., object]] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather(whole: Tensor, shard: Tensor, group: Group) -> None:
    """Fill `whole` with the shards of all ranks in order; both flat and of one dtype."""
    _GATHER(whole, shard, group=group.handle)


def reduce_scatter(shard: Tensor, whole: Tensor, group: Group) -> None:
    """Fill `shard` with this rank's part of the sum of `whole` over the group."""
    _SCATTER(shard, whole, group=group.handle)


def exchange(sent: Tensor, out: list[int], into: list[int], group: Group) -> Tensor:
    """Send `out[r]` elements of the flat `sent` to each rank r, in order; return `into[r]` from each."""
    if group.handle is None:
        return sent
    received = sent.new_empty(sum(into))
    dist.all_to_all_single(received, sent, into, out, group=group.handle)
    return received
