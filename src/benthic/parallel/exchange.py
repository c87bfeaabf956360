"""The exchange over any process group: one copy of a token for each rank that holds some of its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benthic.errors import ConfigError
from benthic.kernels import ops
from benthic.parallel import exchange_trip
from benthic.parallel.exchange_routes import arrivals, choice, departures
from benthic.parallel.exchange_trip import Here, Trip, check_choice
from benthic.parallel.exchange_wire import Wire, pack_choice, unpack_choice

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Arrived, InFlight
    from benthic.parallel.exchange_routes import Choice


class AllToAllExchange:
    """Expert parallelism through `all_to_all_single`, on NCCL or gloo.

    Rank i of the group holds experts `[i E / n, (i + 1) E / n)`. A dispatch synchronises the host once, to
    learn how many rows come; combine and both backward passes never do. Cost: a token's row travels once to
    each rank of its experts and once back (DeepSeek-V3: 5.3 of 8 ranks, 7.3 of 32, by uniform routing).

    Args:
        group: the ranks that share the experts; None is the default group.
        n_routed_experts: of all ranks together.
        fp8: send tokens (and in backward the gradient of the output) as E4M3 with 1 x 128 scales; what comes
            home is never quantised (DeepSeek-V3 report section 3.3.3).

    Raises:
        ConfigError: the experts do not divide by the ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, n_routed_experts: int, *, fp8: bool = False) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.per_rank = experts_per_rank(n_routed_experts, self.ranks)
        self.wire = Wire(fp8)

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """Tell every rank how many rows it gets, wait for the same, and start sending rows and weights."""
        check_choice(x_TD, expert_TK, weight_TK)
        chosen = choice(expert_TK, per_rank=self.per_rank, ranks=self.ranks)
        trip = _AllToAllTrip(self, chosen, x_TD, self._counts(chosen))
        with torch.no_grad():
            moving = trip.send_out(x_TD, pack_choice(expert_TK, weight_TK))
        return exchange_trip.start_dispatch(trip, moving, x_TD, weight_TK)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Wait, and copy each token that arrived to each of its experts here."""
        return exchange_trip.finish_dispatch(flight)

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """Sum each token's copies here with their weights and start sending the sums home."""
        return exchange_trip.start_combine(rows_RD, arrived, beside)

    def finish_combine(self, flight: InFlight) -> Tensor:
        """Wait for the sums and add them up in the order of ranks."""
        return exchange_trip.finish_combine(flight)

    def _counts(self, chosen: Choice) -> list[list[list[int]]]:
        """Tokens and copies by rank, `[leaving, arriving]`: the one synchronisation of the host."""
        arriving_n2 = torch.empty_like(chosen.counts_n2)
        dist.all_to_all_single(arriving_n2, chosen.counts_n2, group=self.group)
        counts: list[list[list[int]]] = torch.stack((chosen.counts_n2, arriving_n2)).tolist()
        return counts


def experts_per_rank(n_routed_experts: int, ranks: int) -> int:
    """How many experts each rank holds.

    Raises:
        ConfigError: the experts do not divide by the ranks.
    """
    if n_routed_experts % ranks:
        msg = (
            f"{n_routed_experts} routed experts cannot be split evenly over the {ranks} ranks of the group. "
            "Set ep_degree to a divisor of n_routed_experts."
        )
        raise ConfigError(msg)
    return n_routed_experts // ranks


class Transfer:
    """Collectives that were started, and the buffers that they fill."""

    def __init__(self) -> None:
        self._works: list[dist.Work] = []
        self._sent: list[Tensor] = []
        self._received: list[Tensor] = []

    def add(self, rows: Tensor, splits: tuple[list[int], list[int]], group: dist.ProcessGroup | None) -> None:
        """Start sending the rows of a matrix, `splits` being how many go to and come from each rank."""
        leaving, arriving = splits
        received = rows.new_empty(sum(arriving), rows.shape[1])
        work = dist.all_to_all_single(received, rows, arriving, leaving, group=group, async_op=True)
        self._works.append(work)
        self._sent.append(rows)
        self._received.append(received)

    def wait(self) -> list[Tensor]:
        """What arrived; on a GPU the current stream waits, not the host. May be called again."""
        for work in self._works:
            work.wait()
        self._works.clear()
        self._sent.clear()
        for received in self._received:
            if received.is_cuda:  # the stream that started the transfer owns the memory
                received.record_stream(torch.cuda.current_stream())
        return self._received


class _AllToAllTrip(Trip[Transfer]):
    """One dispatch and its combine through `all_to_all_single`."""

    def __init__(
        self, exchange: AllToAllExchange, chosen: Choice, like_TD: Tensor, counts: list[list[list[int]]]
    ) -> None:
        self._exchange = exchange
        self._width, self._dtype = like_TD.shape[1], like_TD.dtype
        (leaving, _), (arriving, copies) = (
            [list(column) for column in zip(*side, strict=True)] for side in counts
        )
        self._out, self._home = (leaving, arriving), (arriving, leaving)
        self._rows = sum(copies)
        self._leaving = departures(chosen.goes_Tn, sum(leaving))
        self._rank_TK = chosen.rank_TK

    def send_out(self, x_TD: Tensor, choice_T2: Tensor | None = None) -> Transfer:
        """Gather by destination and send; `choice_T2` are experts and weights, in the forward direction."""
        moving = Transfer()
        for sent in (self._exchange.wire.pack(x_TD), choice_T2):
            if sent is not None:
                moving.add(sent.index_select(0, self._leaving.token_S), self._out, self._exchange.group)
        return moving

    def receive(self, moving: Transfer) -> Here:
        """Wait; sort copies by local expert."""
        wire, packed = moving.wait()
        expert_AK, weight_AK = unpack_choice(packed)
        first = self._exchange.rank * self._exchange.per_rank
        sorted_ = arrivals(expert_AK, first=first, experts=self._exchange.per_rank, rows=self._rows)
        return Here(self._exchange.wire.unpack(wire, self._width, self._dtype), sorted_, weight_AK)

    def receive_gradient(self, moving: Transfer) -> Tensor:
        """Wait."""
        (wire,) = moving.wait()
        return self._exchange.wire.unpack(wire, self._width, self._dtype)

    def release(self, moving: Transfer) -> None:
        """Nothing to do: every transfer has memory of its own."""

    def send_home(
        self, rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor | None, dweight_AK: Tensor | None
    ) -> Transfer:
        """Sum and send."""
        moving = Transfer()
        for sent in (ops.sum_copies(rows_RD, row_AK, weight_AK), dweight_AK):
            if sent is not None:
                moving.add(sent.contiguous(), self._home, self._exchange.group)
        return moving

    def receive_home(self, moving: Transfer) -> tuple[Tensor, Tensor | None]:
        """Wait; sum over ranks; pick each weight's gradient from the rank of its expert."""
        rows_SD, *rest = moving.wait()
        out_TD = ops.sum_copies(rows_SD, self._leaving.slot_Tn)
        if not rest:
            return out_TD, None
        slot_TK = self._leaving.slot_Tn.gather(1, self._rank_TK)
        return out_TD, rest[0][slot_TK, torch.arange(slot_TK.shape[1], device=slot_TK.device)]
