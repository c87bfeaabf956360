"""ZeRO: parameters that the same ranks hold, as flat arrays of which every rank keeps one shard.

Stage 1 shards the optimizer's state (Rajbhandari et al. 2020, section 5.1): gradients are summed over the
group at the end of a step, every rank updates its shard, and weights are gathered. Stage 2 sums and shards
gradients after every backward of a stage; stage 3 also keeps weights in shards and gathers a block's before
its phases run. Float32 weights of which products read FP8 copies are kept in shards under every stage: they
are gathered where a step first needs them, and are whole only until the copies are made.

Written here rather than taken from FSDP2, whose hooks sit on module calls: a block is run phase by phase,
weight gradients may come long after the backward, and a stage may live on two pipeline ranks
(docs/adr/0009-own-zero.md).
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benthic.kernels import ops
from benthic.model.products import Sum
from benthic.parallel.collectives import gather, reduce_scatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from benthic.model.products import WeightGradients
    from benthic.parallel.mesh import Group


@dataclass(frozen=True)
class Piece:
    """What this rank updates of one parameter: `[start, stop)` of its flattened local part.

    Views into the shard: `gradient` is the sum over all ranks and microbatches, float32; `running` the
    parameter itself where it is narrower than its master; `kept` what is kept of the master beside it: all of
    it, float32, or the int16 remainder that bfloat16 `running` lacks (`ops.split_master`).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    kept: Tensor
    gradient: Tensor
    running: Tensor | None

    @property
    def weight(self) -> Tensor | None:
        """The weight whose remainder is kept, if that is all that is."""
        return self.running if self.kept.dtype == torch.int16 else None

    @property
    def master(self) -> Tensor:
        """The weight in float32: what is kept, or a copy where that is a remainder."""
        return self.kept if self.weight is None else ops.join_master(self.weight, self.kept)

    def write(self, master: Tensor) -> None:
        """Set the master, float32, which may be what `master` gave, and round it into `running`."""
        if self.weight is not None:
            ops.split_master(master, self.weight, self.kept)
            return
        if master is not self.kept:
            self.kept.copy_(master)
        if self.running is not None:
            self.running.copy_(master)

    def part(self, first: int, count: int) -> Piece:
        """`count` elements of this piece from its `first` on."""
        within, start = slice(first, first + count), self.start + first
        own = self.kept[within], self.gradient[within], None if self.running is None else self.running[within]
        return Piece(self.name, self.shape, start, start + count, *own)


class Bucket:
    """Some parameters of one stage.

    Args:
        named: parameters by name, all of one dtype and device, with equal replicas on all ranks of `group`.
        group: ranks that hold the same parameters and run the same slots: shards are spread over them.
        partners: ranks that hold copies too but run other slots (the other pipeline rank of a stage, or of a
            shared embedding); their shards' gradients are summed at the end of a step.
        zero_stage: 1, 2 or 3.
        copied: products read copies of these weights, made when first used after an update.
        split: of masters of bfloat16 weights only remainders are kept (`ops.split_master`).

    Gradients of weights that are narrower than float32 or copied come past autograd (`collect`): the first is
    written over what the step before has left, so that nothing has to be cleared. Squares that its product
    gives are kept for the norm until something is added: they serve where a step has one microbatch, on one
    rank, under ZeRO-1.

    Attributes:
        gathered: the weights are whole between `acquire` and `release` alone.
        length: elements of one rank's shard of the flat array.
        kept: what is kept of the shard's masters, as in `Piece`; float32 weights are their own.
        starts: where each parameter starts in the flat array.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        group: Group,
        partners: Group,
        *,
        zero_stage: int,
        copied: bool = False,
        split: bool = False,
    ) -> None:
        self.group, self.partners, self.zero_stage = group, partners, zero_stage
        self._copied = copied and group.size > 1
        self.gathered = (zero_stage == 3 and group.size > 1) or self._copied
        self.params = dict(named)
        first = next(iter(self.params.values()))
        count = sum(p.numel() for p in self.params.values())
        self.length = -(-count // group.size)
        here = slice(group.index * self.length, (group.index + 1) * self.length)
        self._here = here
        self._flat = torch.zeros(self.length * group.size, dtype=first.dtype, device=first.device)
        self.starts = self._adopt()
        self._shard = self._flat[here].clone() if self.gathered else self._flat[here]
        split = split and first.dtype == torch.bfloat16
        self.kept = torch.zeros_like(self._shard, dtype=torch.int16) if split else self._shard.float()
        self._written = copied or first.dtype != torch.float32
        self._gradients: Tensor | None = None
        self._views: dict[str, Tensor] = {}
        self._unwritten: set[str] = set()
        self._squares: dict[str, Tensor] = {}
        self._final = self._written and zero_stage == 1 and group.size == partners.size == 1
        self._sum = self._room_for_sums()
        self._users, self._whole, self._current = 0, not self.gathered, False
        self._bytes = self._flat.untyped_storage().nbytes()
        past = self.params.items() if self._written else ()
        self._hooks = [p.register_post_accumulate_grad_hook(_Adder(self, n)) for n, p in past]
        if self.gathered:
            self._free()

    def _adopt(self) -> dict[str, int]:
        """Move the parameters into the flat array, of which they become views."""
        starts, at = {}, 0
        for name, param in self.params.items():
            view = self._flat[at : at + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view
            starts[name], at = at, at + param.numel()
        return starts

    # --- weights that are gathered

    def acquire(self, *, copies: bool = False) -> None:
        """Gather the weights from all shards, unless they are here; with `copies`, current copies will do."""
        self._users += 1
        if self.gathered and not self._whole and not (copies and self._current):
            self._flat.untyped_storage().resize_(self._bytes)
            self._gather()
            self._whole = True

    def release(self, *, copies: bool = False) -> None:
        """Free the gathered weights when nobody uses them any more; with `copies`, all have been made."""
        self._users -= 1
        self._current = self._current or (copies and self._copied)
        if self.gathered and self._users == 0:
            self._free()

    def _free(self) -> None:
        self._flat.untyped_storage().resize_(0)
        self._whole = False

    def _gather(self) -> None:
        with torch.no_grad():
            gather(self._flat, self._shard, self.group)

    # --- gradients

    def _room_for_sums(self) -> Tensor:
        """This rank's shard of the summed gradients: under ZeRO-1 a part of the whole ones."""
        if self.zero_stage == 1:
            return self.prepare()[self._here]
        return torch.zeros(self.length, dtype=torch.float32, device=self._flat.device)

    def collect(self, sink: WeightGradients) -> None:
        """Let weight gradients come straight into the sums, past autograd, which would round or copy them."""
        for name, param in self.params.items():
            sink.sum_into(param, functools.partial(self.accumulator, name))

    def accumulator(self, name: str) -> Sum:
        """Where whoever asks adds a gradient of a parameter, or writes it if nothing is there yet."""
        self.prepare()
        fresh = name in self._unwritten
        self._unwritten.discard(name)
        self._squares.pop(name, None)  # of what is about to change
        squares = functools.partial(self._squares.__setitem__, name) if fresh and self._final else None
        return Sum(self._views[name], fresh, squares)

    def prepare(self) -> Tensor:
        """Have room for whole gradients, float32 and flat; what autograd has already left goes there."""
        if self._gradients is not None:
            return self._gradients
        self._gradients = torch.empty(self._flat.numel(), dtype=torch.float32, device=self._flat.device)
        self._begin(self._gradients)
        for name, param in self.params.items():
            start = self.starts[name]
            view = self._gradients[start : start + param.numel()].view(param.shape)
            self._views[name] = view
            if not self._written:
                if param.grad is not None:
                    view.copy_(param.grad)
                param.grad = view
        return self._gradients

    def _begin(self, gradients: Tensor) -> None:
        """Nothing has been added yet; what lies between parameters and the array's end stays zero."""
        if self._written:
            self._unwritten = set(self.params)
            gradients[sum(p.numel() for p in self.params.values()) :].zero_()
        else:
            gradients.zero_()

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        self._squares.clear()
        if self.zero_stage != 1:  # else the sum is a part of the whole
            self._sum.zero_()
        if self._gradients is not None:
            self._begin(self._gradients)

    def reduce(self) -> None:
        """Add the whole gradients to this rank's shard, summed over the group.

        Under ZeRO-1 once a step; under ZeRO-2 and 3 whenever a microbatch's are in, which frees the whole.
        """
        whole = self.prepare()
        for name in self._unwritten:  # no row came to these
            self._views[name].zero_()
        self._unwritten.clear()
        mine = whole[self._here]
        if self.group.size > 1:
            mine = torch.empty_like(self._sum)
            reduce_scatter(mine, whole, self.group)
        if self.zero_stage == 1:
            if self.group.size > 1:
                self._sum.copy_(mine)
            return
        self._sum += mine
        self._gradients = None
        self._views.clear()
        for param in self.params.values():
            param.grad = None

    def settle(self) -> None:
        """At the end of a step: the shard's gradients of all copies together."""
        if self.zero_stage == 1:
            self.reduce()
        if self.partners.size > 1:
            dist.all_reduce(self._sum, group=self.partners.handle)

    def square_sum(self) -> Tensor:
        """This rank's share of the squared gradient norm: copies of one shard share it."""
        if not self._squares:
            return torch.linalg.vector_norm(self._sum).square() / self.partners.size
        total = torch.cat(list(self._squares.values())).sum()
        read = [view for name, view in self._views.items() if name not in self._squares]
        return total + torch.stack(torch._foreach_norm(read)).square().sum() if read else total  # noqa: SLF001

    # --- the update

    def pieces(self) -> Iterator[Piece]:
        """What this rank updates, parameter by parameter."""
        for name, param in self.params.items():
            begin, end = self.starts[name], self.starts[name] + param.numel()
            a, b = max(begin, self._here.start), min(end, self._here.stop)
            if a < b:
                inside = slice(a - self._here.start, b - self._here.start)
                shape = tuple(param.shape)
                running = None if param.dtype == torch.float32 else self._shard[inside]
                own = self.kept[inside], self._sum[inside], running
                yield Piece(name, shape, a - begin, b - begin, *own)

    def place_of(self, piece: Piece) -> int:
        """Where a piece starts in this rank's shard."""
        return self.starts[piece.name] + piece.start - self._here.start

    def publish(self, *, rounded: bool = False) -> None:
        """Round the masters into the weights, unless the update has, and give every rank all of them."""
        if not rounded and self.kept.dtype == torch.float32 and self.kept is not self._shard:
            self._shard.copy_(self.kept)
        if not self.gathered and self.group.size > 1:
            gather(self._flat, self._shard.clone(), self.group)
        self.changed()

    def changed(self) -> None:
        """Copies made of the weights serve no longer."""
        self._current = False
        # The parameters are views that know nothing of an update; copies made of them go by their version.
        torch.autograd.graph.increment_version(list(self.params.values()))


class _Adder:
    """Adds the gradient that autograd made of a parameter to its accumulator, and frees it.

    The parameter keeps its hook where Python's collector cannot see, so the hook must not keep the bucket:
    nothing of either would ever be freed.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = weakref.ref(bucket), name

    def __call__(self, param: Tensor) -> None:
        bucket = self._bucket()
        assert bucket is not None, f"the bucket of {self._name} is gone, but its gradient is not"  # noqa: S101
        if param.grad is not None:
            into, fresh, _ = bucket.accumulator(self._name)
            ops.accumulate(into, param.grad, fresh=fresh)
            param.grad = None


def global_norm(buckets: Iterable[Bucket], world: Group) -> Tensor:
    """The 2-norm of all gradients of the model, a float32 scalar that is equal on every rank."""
    total = torch.stack([bucket.square_sum() for bucket in buckets]).sum()
    if world.size > 1:
        dist.all_reduce(total, group=world.handle)
    return total.sqrt()
