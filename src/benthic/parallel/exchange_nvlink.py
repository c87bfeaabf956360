"""The exchange between GPUs of one host: kernels write rows into peers' memory, and wait there for theirs.

The host waits only where it asks how many rows came (`Size.exact_rows`), as a trainer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.errors import BackendError, ConfigError, ShapeError
from benthic.kernels import ops, triton_exchange
from benthic.parallel import exchange_trip
from benthic.parallel.exchange import experts_per_rank
from benthic.parallel.exchange_memory import Mailboxes, PeerMemory, Shape, mailboxes, words_needed
from benthic.parallel.exchange_routes import Arrivals, arrivals
from benthic.parallel.exchange_trip import Here, Trip, check_choice
from benthic.parallel.exchange_wire import Wire, unpack_choice

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from benthic.model.sockets import Arrived, InFlight
    from benthic.parallel.exchange_memory import Mailbox


@dataclass(frozen=True, kw_only=True)
class Size:
    """What an exchange has room for.

    Attributes:
        n_routed_experts: of all ranks together.
        top_k: experts of a token.
        hidden_size: elements of a row.
        dtype: of a row.
        max_tokens: of one rank in one dispatch. Up to 256, kernels cut rows into parts to fill the GPU.
        fp8: send tokens, and in backward the gradient of the output, as E4M3 with 1 x 128 scales.
        in_flight: dispatches (and combines) that may be started before the first of them is finished.
        exact_rows: ask the device how many rows arrived, so that nothing after it works on spare ones; the
            host then waits once a dispatch, and no CUDA graph can capture it. Without, there is a row for
            every copy that could arrive.
        keep_arrivals: copy arrived tokens out of the mailbox, so that `finish_dispatch` can run again when
            the experts' phase is recomputed.
    """

    n_routed_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    max_tokens: int
    fp8: bool = False
    in_flight: int = 1
    exact_rows: bool = False
    keep_arrivals: bool = False

    def kinds(self, ranks: int) -> list[Shape]:
        """The mailboxes of the way out and of the way home.

        Raises:
            ConfigError: a row is not a whole number of words.
        """
        row = self.hidden_size * self.dtype.itemsize
        out = self.hidden_size + 4 * -(-self.hidden_size // 128) if self.fp8 else row
        if row % 4 or out % 4:
            msg = (
                f"rows of {self.hidden_size} x {self.dtype} take {row} bytes ({out} on the way out), which "
                "are not whole words of 4. Use a hidden_size that is a multiple of 4."
            )
            raise ConfigError(msg)
        slots = ranks * self.max_tokens
        return [Shape(slots, out // 4, 2 * self.top_k), Shape(slots, row // 4, self.top_k)]

    def words(self, ranks: int) -> int:
        """Words of memory that each rank shares with the others."""
        return words_needed(self.kinds(ranks), ranks, self.in_flight)


class NvlinkExchange:
    """Expert parallelism between GPUs that can write each other's memory.

    Rank i holds experts `[i E / n, (i + 1) E / n)`. Same results as `AllToAllExchange`, bit for bit, forward
    and backward. Token t of rank s has slot (s, t) at every rank, so nothing is counted before rows are
    sent; where a token's copies lie among the rows of the experts is found out on the device at arrival.
    One copy of a row travels to each rank; it is copied to each of its experts there, at the speed of local
    memory, which also empties the mailbox. Cost: `in_flight * n * max_tokens` rows of memory each way.

    Raises:
        ConfigError: experts do not divide by ranks, a row is not a whole number of words, or the memory is
            too small.
    """

    def __init__(self, memory: PeerMemory, size: Size) -> None:
        self.size, self.rank, self.ranks = size, memory.rank, memory.ranks
        self.per_rank = experts_per_rank(size.n_routed_experts, memory.ranks)
        self.wire = Wire(size.fp8)
        if memory.words.numel() < size.words(memory.ranks):
            msg = (
                f"the exchange needs {size.words(memory.ranks)} words of peer memory, but "
                f"{memory.words.numel()} were given"
            )
            raise ConfigError(msg)
        out, home = mailboxes(memory, size.kinds(memory.ranks), size.in_flight)
        self.out, self.home = Mailboxes("out", out), Mailboxes("home", home)

    @classmethod
    def on(cls, group: ProcessGroup, size: Size, device: torch.device) -> NvlinkExchange:
        """The exchange of a group of GPUs of one host; a collective call that allocates the memory."""
        return cls(PeerMemory.symmetric(group, size.words(group.size()), device), size)

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """Write rows and weights into the memory of the ranks of each token's experts."""
        check_choice(x_TD, expert_TK, weight_TK)
        self._check(x_TD, expert_TK)
        trip = _NvlinkTrip(self, expert_TK.to(torch.int32).contiguous())
        with torch.no_grad():
            moving = trip.send_out(x_TD, weight_TK.contiguous())
        return exchange_trip.start_dispatch(trip, moving, x_TD, weight_TK)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Wait on the device, and copy each token that arrived to each of its experts here."""
        return exchange_trip.finish_dispatch(flight)

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """Write the weighed sum of each token's copies here into the memory of its own rank."""
        return exchange_trip.start_combine(rows_RD, arrived, beside)

    def finish_combine(self, flight: InFlight) -> Tensor:
        """Wait on the device and add the sums up in the order of ranks."""
        return exchange_trip.finish_combine(flight)

    def _check(self, x_TD: Tensor, expert_TK: Tensor) -> None:
        size = self.size
        tokens, width = x_TD.shape
        if (width, x_TD.dtype, expert_TK.shape[1]) != (size.hidden_size, size.dtype, size.top_k):
            msg = (
                f"dispatch: rows of {width} x {x_TD.dtype} with top_k={expert_TK.shape[1]}, but the exchange "
                f"was built for {size.hidden_size} x {size.dtype} with top_k={size.top_k}"
            )
            raise ShapeError(msg)
        if tokens > size.max_tokens:
            msg = f"dispatch: {tokens} tokens, but max_tokens={size.max_tokens}. Build a larger exchange."
            raise ShapeError(msg)


class _Moving:
    """A transfer in a mailbox, which is None when it is over; `here` are its tokens if they were kept."""

    def __init__(self, box: Mailbox, *, dweight: bool = False) -> None:
        self.box: Mailbox | None = box
        self.dweight = dweight
        self.here: Here | None = None

    def opened(self) -> Mailbox:
        """The mailbox, full.

        Raises:
            BackendError: the transfer is over.
        """
        if self.box is None:
            msg = (
                "this dispatch was finished before and its mailbox is in use again. To recompute the "
                "experts' phase, build the exchange with keep_arrivals=True."
            )
            raise BackendError(msg)
        self.box.await_full()
        return self.box


class _NvlinkTrip(Trip[_Moving]):
    """One dispatch and its combine through mailboxes."""

    def __init__(self, exchange: NvlinkExchange, expert_TK: Tensor) -> None:
        self._exchange = exchange
        self._expert_TK = expert_TK

    def send_out(self, x_TD: Tensor, weight_TK: Tensor | None = None) -> _Moving:
        """Wait until the peers have read their mailboxes; write rows, and in the forward pass choices."""
        exchange = self._exchange
        box = exchange.out.take()
        box.await_free()
        triton_exchange.push_tokens(
            exchange.wire.pack(x_TD).view(torch.int32),
            self._expert_TK,
            weight_TK,
            box.tables,
            rank=exchange.rank,
            max_tokens=exchange.size.max_tokens,
            per_rank=exchange.per_rank,
        )
        box.raise_full()
        return _Moving(box)

    def receive(self, moving: _Moving) -> Here:
        """Wait; sort copies by local expert."""
        if moving.here is not None:
            return moving.here
        box = moving.opened()
        expert_AK, weight_AK = unpack_choice(box.side)
        here = Here(self._rows(box), self._sorted(expert_AK), weight_AK)
        if self._exchange.size.keep_arrivals:
            moving.here = here._replace(x_AD=here.x_AD.clone())
        return here

    def receive_gradient(self, moving: _Moving) -> Tensor:
        """Wait."""
        return self._rows(moving.opened())

    def release(self, moving: _Moving) -> None:
        """Tell the peers that the mailbox may be written again."""
        if moving.box is not None:
            moving.box.raise_free()
            self._exchange.out.give(moving.box)
            moving.box = None

    def send_home(
        self, rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor | None, dweight_AK: Tensor | None
    ) -> _Moving:
        """Sum and write in one kernel."""
        exchange = self._exchange
        box = exchange.home.take()
        box.await_free()
        triton_exchange.push_sums(
            rows_RD.contiguous(),
            row_AK,
            weight_AK,
            None if dweight_AK is None else dweight_AK.contiguous(),
            box.tables,
            rank=exchange.rank,
            max_tokens=exchange.size.max_tokens,
        )
        box.raise_full()
        return _Moving(box, dweight=dweight_AK is not None)

    def receive_home(self, moving: _Moving) -> tuple[Tensor, Tensor | None]:
        """Wait; sum over ranks; pick each weight's gradient from the rank of its expert."""
        size = self._exchange.size
        box = moving.opened()
        slot_Tn, dweight_TK = ops.home_slots(
            self._expert_TK,
            box.side_in(torch.float32) if moving.dweight else None,
            per_rank=self._exchange.per_rank,
            ranks=self._exchange.ranks,
            max_tokens=size.max_tokens,
        )
        out_TD = ops.sum_copies(box.rows_in(size.dtype), slot_Tn)
        box.raise_free()
        self._exchange.home.give(box)
        moving.box = None
        return out_TD, dweight_TK

    def _rows(self, box: Mailbox) -> Tensor:
        """What is in a mailbox of the way out, in the rows' dtype; slots without a token hold anything."""
        size = self._exchange.size
        wire = box.rows_in(torch.uint8 if size.fp8 else size.dtype)
        return self._exchange.wire.unpack(wire, size.hidden_size, size.dtype)

    def _sorted(self, expert_AK: Tensor) -> Arrivals:
        """Where each copy lies among the experts' rows."""
        exchange, size = self._exchange, self._exchange.size
        first, experts = exchange.rank * exchange.per_rank, exchange.per_rank
        rows = expert_AK.shape[0] * min(size.top_k, experts)
        found = arrivals(expert_AK, first=first, experts=experts, rows=rows)
        if size.exact_rows:
            return found._replace(copy_R=found.copy_R[: int(found.ends_E[-1])])
        return found
