"""All-gather and reduce-scatter along the first dim: as plain calls for ZeRO, differentiable for tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.parallel.mesh import Group

# Under the names that torch had before 2.13 and has since.
_GATHER: Final[Callable[..., object]] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_SCATTER: Final[Callable[..., object]] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather(whole: Tensor, shard: Tensor, group: Group) -> None:
    """Fill `whole` with the shards of all ranks in order; both contiguous and of one dtype."""
    _GATHER(whole, shard, group=group.handle)


def reduce_scatter(shard: Tensor, whole: Tensor, group: Group) -> None:
    """Fill `shard` with this rank's part of the sum of `whole` over the group."""
    _SCATTER(shard, whole, group=group.handle)


def start_gather(whole: Tensor, shard: Tensor, group: Group) -> dist.Work:
    """As `gather`, but goes on at once; both tensors must stay until the work has been waited for."""
    return cast("dist.Work", _GATHER(whole, shard, group=group.handle, async_op=True))


def start_reduce_scatter(shard: Tensor, whole: Tensor, group: Group) -> dist.Work:
    """As `reduce_scatter`, but goes on at once; both tensors must stay until the work has been waited for."""
    return cast("dist.Work", _SCATTER(shard, whole, group=group.handle, async_op=True))


def exchange(sent: Tensor, out: list[int], into: list[int], group: Group) -> Tensor:
    """Send `out[r]` elements of the flat `sent` to each rank r, in order; return `into[r]` from each."""
    if group.handle is None:
        return sent
    received = sent.new_empty(sum(into))
    dist.all_to_all_single(received, sent, into, out, group=group.handle)
    return received


def gather_tokens(x_TX: Tensor, group: Group) -> Tensor:
    """The tokens of all ranks of the group, in order; backward sums their gradients and keeps this rank's."""
    whole: Tensor = _GatherTokens.apply(x_TX, group)
    return whole


def sum_tokens(x_TX: Tensor, group: Group) -> Tensor:
    """This rank's part of the tokens, summed over the group; backward gathers the gradients of all parts."""
    part: Tensor = _SumTokens.apply(x_TX, group)
    return part


class _GatherTokens(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(x_TX, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _SumTokens(torch.autograd.Function):
    """Reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(x_TX, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None


def _gathered(part_TX: Tensor, group: Group) -> Tensor:
    whole_TX = part_TX.new_empty((part_TX.shape[0] * group.size, *part_TX.shape[1:]))
    gather(whole_TX, part_TX.contiguous(), group)
    return whole_TX


def _summed(whole_TX: Tensor, group: Group) -> Tensor:
    part_TX = whole_TX.new_empty((whole_TX.shape[0] // group.size, *whole_TX.shape[1:]))
    reduce_scatter(part_TX, whole_TX.contiguous(), group)
    return part_TX
