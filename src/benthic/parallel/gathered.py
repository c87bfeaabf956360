"""Expert parallelism for ranks that have tokens of their own: rows visit all ranks, partial sums go home.

Every rank holds all of attention and whole routed experts (DeepSeek-V3 report section 3.4). Of each mixture
layer's tokens all ranks get all rows, compute what their experts add to them, and each row's partial sums are
added at its own rank. No shape depends on the routing, so nothing waits for the host, and where all ranks
have as many rows a CUDA graph can hold it.

Cost of a layer, with N ranks and R rows on all of them together: a rank sends and receives about
R (N - 1) / N rows each way, however many of their experts it holds; of a row out also 8 bytes an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from benthic.kernels import ops
from benthic.kernels.reference.norm import wide
from benthic.model.sockets import InFlight
from benthic.parallel.collectives import start_gather, start_reduce_scatter
from benthic.parallel.divided import OwnExperts
from benthic.parallel.exchange_wire import pack_choice, unpack_choice

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Arrived
    from benthic.parallel.mesh import Group
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard


class Moving(NamedTuple):
    """A collective that was started, what it reads and must stay, and what rows and ids are in it."""

    work: dist.Work
    sent: Tensor
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class GatheredExperts(OwnExperts):
    """The `exchange` socket of a rank that has tokens of its own and `held` experts from `first` on.

    Every rank of `group` makes the same calls in the same order. `rows` says how many rows each rank has;
    empty: as many as this one.
    """

    group: Group
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig, shard: Shard, group: Group) -> GatheredExperts:
        """The socket of a rank for steps in which all have as many rows."""
        held = shard.experts(config)
        return cls(config.n_routed_experts, held.start, len(held), group)

    def padded(self, slot_T: Tensor) -> GatheredExperts:  # noqa: ARG002 (of this rank's rows alone)
        """Itself: of the rows that come from other ranks nobody knows which pad."""
        return self

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """Start sending rows, choices and weights to every rank, as bytes side by side: one collective."""
        choice = pack_choice(expert_TK, weight_TK).view(torch.uint8)
        sent = torch.cat((x_TD.contiguous().view(torch.uint8), choice), dim=1)
        if self.rows:
            sent = sent.repeat(self.group.size, 1)
            received = sent.new_empty((sum(self.rows), sent.shape[1]))
            work = self._start_exchange(received, sent, home=False)
        else:
            received = sent.new_empty((len(sent) * self.group.size, sent.shape[1]))
            work = start_gather(received, sent, self.group)
        return InFlight((received,), Moving(work, sent, x_TD.shape[1], x_TD.dtype))

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Wait for the rows of all ranks, and copy each to each of its experts here."""
        moving: Moving = flight.handle
        moving.work.wait()
        (received,) = flight.tensors
        bytes_of_row = moving.width * moving.dtype.itemsize
        x_TD = received[:, :bytes_of_row].contiguous().view(moving.dtype)
        choice = received[:, bytes_of_row:].contiguous().view(torch.int32)
        expert_TK, weight_TK = unpack_choice(choice)
        return super().finish_dispatch(super().start_dispatch(x_TD, expert_TK, weight_TK))

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """Sum what this rank's experts add to each row, and start sending the sums home."""
        sent = ops.unpermute(rows_RD, arrived.handle, arrived.weight)
        if self.rows:
            own, size = self.rows[self.group.index], self.group.size
            received = sent.new_empty((own * size, sent.shape[1]))
            work = self._start_exchange(received, sent, home=True)
        else:
            received = sent.new_empty((len(sent) // self.group.size, sent.shape[1]))
            work = start_reduce_scatter(received, sent, self.group)
        return InFlight((received, *beside), Moving(work, sent, sent.shape[1], sent.dtype))

    def finish_combine(self, flight: InFlight) -> Tensor:
        """Wait for the sums of this rank's rows and add them in the order of ranks, then to those beside."""
        moving: Moving = flight.handle
        moving.work.wait()
        received, *others = flight.tensors
        beside = tuple(others)
        if not self.rows:
            return ops.added(received, beside)
        parts_NTD = received.view(self.group.size, -1, moving.width)
        return ops.added(parts_NTD.sum(0, dtype=wide(moving.dtype)).to(moving.dtype), beside)

    def _start_exchange(self, received: Tensor, sent: Tensor, *, home: bool) -> dist.Work:
        """Own rows to everybody and everybody's here, or the other way."""
        mine, theirs = [self.rows[self.group.index]] * self.group.size, list(self.rows)
        into, out = (mine, theirs) if home else (theirs, mine)
        work: dist.Work = dist.all_to_all_single(
            received, sent, into, out, group=self.group.handle, async_op=True
        )
        return work
