"""The exchange between GPUs of one host: rows are written into peers' memory, and waited for there.

The host waits only where it asks how many rows came (`Size.exact_rows`), as a trainer does, and then for the
rows alone, not for what else was launched; and not at all while there is `room` for a known number.

What writes into peers' memory runs on a stream of its own, from an event of the computing stream on; the
computing stream waits for it where it opens the mailbox, and nowhere else. Nothing waits for ever: all ranks
start and finish transfers in one order, and each wait is for something earlier in that order. A full mailbox
is awaited where a transfer is finished, and every rank fills it where it started that transfer; where rows
are counted it is awaited behind the own push already, and the others push there too. A free one is awaited
where a transfer is started, and every rank freed it where it finished the transfer before in that mailbox.
Both streams launch in that order and wait for earlier events alone, so the first wait that is not over has
all that it needs. That holds for any number of mailboxes, for pairs of microbatches (all ranks alternate
alike) and for recomputed phases, which read kept arrivals and start nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from benthic.errors import BackendError, ConfigError, ShapeError
from benthic.kernels import ops, triton_exchange
from benthic.parallel import exchange_trip
from benthic.parallel.exchange import experts_per_rank
from benthic.parallel.exchange_memory import Mailboxes, PeerMemory, mailboxes
from benthic.parallel.exchange_routes import Arrivals, Room, arrivals
from benthic.parallel.exchange_stream import push_stream
from benthic.parallel.exchange_trip import Here, Trip, check_choice
from benthic.parallel.exchange_wire import Wire, pack_choice, unpack_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from benthic.model.sockets import Arrived, InFlight
    from benthic.parallel.exchange_memory import Mailbox
    from benthic.parallel.exchange_size import Size
    from benthic.parallel.exchange_stream import Inputs, Pushed

    Part = tuple[Tensor, Tensor | None]


class NvlinkExchange:
    """Expert parallelism between GPUs that can write each other's memory.

    Rank i holds experts `[i E / n, (i + 1) E / n)`. Same results as `AllToAllExchange`, bit for bit, forward
    and backward. Token t of rank s has slot (s, t) at every rank, so nothing is counted before rows are
    sent; where a token's copies lie among the rows of the experts is found out on the device at arrival.
    One copy of a row travels to each rank; it is copied to each of its experts there, at the speed of local
    memory, which also empties the mailbox. Rows are written by kernels, or all of them by copy engines
    (`Size.copies`). Calls come from one stream, or from streams that wait for each other.
    Cost: `in_flight * n * max_tokens` rows of memory each way.

    Attributes:
        room: for how many rows arriving tokens are laid out, instead of asking; None: as `size` says.
        counted: rows of each dispatch since `begin`, in the order in which they started; 0 if nobody asked.

    Raises:
        ConfigError: experts do not divide by ranks, a row is not a whole number of words, or the memory is
            too small.
    """

    room: Room | None = None

    def __init__(self, memory: PeerMemory, size: Size) -> None:
        self.size, self.rank, self.ranks = size, memory.rank, memory.ranks
        self.per_rank = experts_per_rank(size.n_routed_experts, memory.ranks)
        self.wire = Wire(size.fp8)
        self.copies = size.copied(memory.ranks)
        self.stream = push_stream(memory.words.device)
        self.counted: list[int] = []
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

    def begin(self) -> None:
        """A step begins: its dispatches are numbered from 0."""
        self.counted.clear()
        if self.room is not None:
            self.room.over.zero_()

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
    """A transfer in a mailbox, which is None when it is over; `here` are its tokens if they were kept.

    `count` is how many rows arrive for the experts here, once the host has waited; whoever counted them has
    awaited the mailbox. `number`: of a dispatch in its step.
    """

    def __init__(
        self,
        box: Mailbox,
        pushed: Pushed,
        *,
        dweight: bool = False,
        count: Tensor | None = None,
        number: int = 0,
    ) -> None:
        self.box: Mailbox | None = box
        self.dweight = dweight
        self.here: Here | None = None
        self.number = number
        self._pushed = pushed
        self._count = count

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
        self._pushed.join()
        if self._count is None:
            self.box.await_full()
        return self.box

    def rows(self, most: int) -> int:
        """How many rows there are, `most` where nobody counted; the host waits for the number."""
        if self._count is None:
            return most
        self._pushed.wait()
        return int(self._count)


class _Sums(NamedTuple):
    """What goes home: each arrived token's copies are summed with their weights."""

    rows_RD: Tensor
    row_AK: Tensor
    weight_AK: Tensor | None
    dweight_AK: Tensor | None

    def of(self, peer: int, max_tokens: int) -> _Sums:
        """Those of one rank's tokens."""
        slots = slice(peer * max_tokens, (peer + 1) * max_tokens)
        weight_AK, dweight_AK = (None if each is None else each[slots] for each in self[2:])
        return _Sums(self.rows_RD, self.row_AK[slots], weight_AK, dweight_AK)

    def summed(self) -> Part:
        """Sums, and the weights' gradients beside them, in words."""
        sums = ops.sum_copies(self.rows_RD, self.row_AK, self.weight_AK)
        return sums.view(torch.int32), None if self.dweight_AK is None else self.dweight_AK.view(torch.int32)


class _NvlinkTrip(Trip[_Moving]):
    """One dispatch and its combine through mailboxes."""

    def __init__(self, exchange: NvlinkExchange, expert_TK: Tensor) -> None:
        self._exchange = exchange
        self._expert_TK = expert_TK

    def send_out(self, x_TD: Tensor, weight_TK: Tensor | None = None) -> _Moving:
        """Wait until the peers have read their mailboxes; write rows, and in the forward pass choices."""
        exchange = self._exchange
        box = exchange.out.take()
        rows_TW = exchange.wire.pack(x_TD).view(torch.int32)
        number, count = len(exchange.counted), None
        if weight_TK is not None:
            exchange.counted.append(0)
            if exchange.size.exact_rows and exchange.room is None:
                count = self._uncounted(box)
        if exchange.copies:
            side = None if weight_TK is None else self._choices(weight_TK)
            box.put(exchange.rank, None, side)  # first, since the other stream counts it
            pushed = self._copied(box, lambda _: (rows_TW, side), count)
            box.put(exchange.rank, rows_TW, None)
            return _Moving(box, pushed, count=count, number=number)
        inputs = (rows_TW, self._expert_TK, weight_TK)
        push = functools.partial(
            triton_exchange.push_tokens,
            *inputs,
            box.tables,
            rank=exchange.rank,
            max_tokens=exchange.size.max_tokens,
            per_rank=exchange.per_rank,
        )
        return _Moving(box, self._pushed(box, push, inputs, count), count=count, number=number)

    def receive(self, moving: _Moving) -> Here:
        """Wait; sort copies by local expert."""
        if moving.here is not None:
            return moving.here
        box = moving.opened()
        expert_AK, weight_AK = unpack_choice(box.side)
        here = Here(self._rows(box), self._sorted(expert_AK, moving), weight_AK)
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
        """Sum and write in one kernel, or sum for each rank and copy."""
        exchange, most = self._exchange, self._exchange.size.max_tokens
        box = exchange.home.take()
        whole = _Sums(
            rows_RD.contiguous(), row_AK, weight_AK, None if dweight_AK is None else dweight_AK.contiguous()
        )
        push = functools.partial(triton_exchange.push_sums, rank=exchange.rank, max_tokens=most)
        if exchange.copies:
            pushed = self._copied(box, lambda peer: whole.of(peer, most).summed())
            rows, side = (table[exchange.rank : exchange.rank + 1] for table in box.tables)
            push(*whole.of(exchange.rank, most), (rows, side))
        else:
            pushed = self._pushed(box, lambda: push(*whole, box.tables), whole)
        return _Moving(box, pushed, dweight=dweight_AK is not None)

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

    def _pushed(
        self, box: Mailbox, write: Callable[[], None], inputs: Inputs, count: Tensor | None = None
    ) -> Pushed:
        """Write into every rank's mailbox between its flags; await and count what comes."""
        rank, experts = self._exchange.rank, self._exchange.per_rank

        def push() -> None:
            box.await_free()
            write()
            box.raise_full()
            if count is not None:
                box.await_full()
                here = triton_exchange.count_copies(box.side, first=rank * experts, experts=experts)
                count.copy_(here, non_blocking=True)

        return self._exchange.stream(push, inputs)

    def _copied(self, box: Mailbox, part: Callable[[int], Part], count: Tensor | None = None) -> Pushed:
        """Copy each other rank's part, beginning with the rank after this one.

        This rank's own part is written on the computing stream, which has read that mailbox before.
        """
        rank, ranks = self._exchange.rank, self._exchange.ranks
        parts = {peer: part(peer) for peer in ((rank + far) % ranks for far in range(1, ranks))}

        def write() -> None:
            for peer, sent in parts.items():
                box.put(peer, *sent)

        return self._pushed(box, write, tuple(tensor for sent in parts.values() for tensor in sent), count)

    def _uncounted(self, box: Mailbox) -> Tensor:
        """Where the number of rows will be: memory of the host, if the device is a GPU."""
        gpu = box.side.is_cuda
        return torch.empty((), dtype=torch.int32, device="cpu" if gpu else box.side.device, pin_memory=gpu)

    def _choices(self, weight_TK: Tensor) -> Tensor:
        """Choices and weights as they lie in a mailbox, expert -1 for tokens that this rank does not have."""
        expert_TK, missing = self._expert_TK, self._exchange.size.max_tokens - len(weight_TK)
        if missing:
            rows = (0, 0, 0, missing)
            expert_TK, weight_TK = pad(expert_TK, rows, value=-1), pad(weight_TK, rows)
        return pack_choice(expert_TK, weight_TK)

    def _rows(self, box: Mailbox) -> Tensor:
        """What is in a mailbox of the way out, in the rows' dtype; slots without a token hold anything."""
        size = self._exchange.size
        wire = box.rows_in(torch.uint8 if size.fp8 else size.dtype)
        return self._exchange.wire.unpack(wire, size.hidden_size, size.dtype)

    def _sorted(self, expert_AK: Tensor, moving: _Moving) -> Arrivals:
        """Where each copy lies among the experts' rows."""
        exchange, experts = self._exchange, self._exchange.per_rank
        most = expert_AK.shape[0] * min(exchange.size.top_k, experts)
        found = arrivals(expert_AK, first=exchange.rank * experts, experts=experts, rows=most)
        if exchange.room is not None:
            return found.within(exchange.room.rows[moving.number], exchange.room.over)
        rows = exchange.counted[moving.number] = moving.rows(most)
        return found._replace(copy_R=found.copy_R[:rows])
