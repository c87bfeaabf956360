"""The plain sockets: packed causal attention, all experts on this device, products in the tensors' dtype."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.tile_lists import TileLists
from benthic.model.sockets import Arrived, InFlight, LatentUp, LateSum, Linear, Sockets

if TYPE_CHECKING:
    from torch import Tensor


class PlainLinear(Linear):
    """Products in whatever dtype rows and weights have."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        return F.linear(x, weight)

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`."""
        return ops.grouped_linear(rows_RI, weight_EOI, ends_E)


plain_linear: Final = PlainLinear()


class Core(Protocol):
    """The attention itself, as `ops.attention` does it."""

    def __call__(  # noqa: PLR0913 (packed attention has five operands and its lengths)
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        max_seqlen_q: int,
        max_seqlen_k: int,
        scale: float,
        causal: bool = True,
        lists: TileLists | None = None,
    ) -> Tensor:
        """`softmax(q k^T * scale) v` within each sequence of a pack."""
        ...


@dataclass(frozen=True)
class PackedAttend:
    """Causal attention inside each of several packed sequences, with expanded keys and values.

    Shapes: cu_seqlens int32 [sequences + 1], where each sequence starts and the last ends; `max_seqlen` is
    the longest. `lists` belongs to them and serves all layers.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    core: Core = ops.attention
    lists: TileLists = field(default_factory=TileLists, kw_only=True, repr=False)

    def slots(self, layer: int) -> None:
        """Nothing is cached."""

    def __call__(
        self,
        q_nope_THn: Tensor,
        q_rope_THr: Tensor,
        latent_TC: Tensor,
        k_rope_Tr: Tensor,
        up: LatentUp,
        *,
        layer: int,  # noqa: ARG002 (nothing is cached, so the layer does not matter)
        scale: float,
    ) -> Tensor:
        """DeepSeek-V3 report eq. (10), every head with keys and values of its own."""
        starts, longest = self.cu_seqlens, self.max_seqlen
        lengths = Lengths(starts, starts, longest, longest, lists=self.lists)
        q_THnr = ops.join_head_dims(q_nope_THn, q_rope_THr)
        return attend_expanded(self.core, q_THnr, latent_TC, k_rope_Tr, up, lengths, scale=scale)


@dataclass(frozen=True)
class Lengths:
    """Where the queries and where the keys of each packed sequence start: int32 [sequences + 1].

    A sequence may have fewer queries than keys: they are then its last ones.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    lists: TileLists = field(default_factory=TileLists, kw_only=True, repr=False)


def attend_expanded(
    core: Core,
    q_THnr: Tensor,
    latent_TC: Tensor,
    k_rope_Tr: Tensor,
    up: LatentUp,
    lengths: Lengths,
    *,
    scale: float,
) -> Tensor:
    """Causal attention after expanding the latents: `out_THv`, one row for each query."""
    k_nope_THn, v_THv = up.expand(latent_TC)
    return core(
        q_THnr,
        ops.join_head_dims(k_nope_THn, k_rope_Tr),
        v_THv,
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        max_seqlen_q=lengths.max_seqlen_q,
        max_seqlen_k=lengths.max_seqlen_k,
        scale=scale,
        causal=True,
        lists=lengths.lists,
    )


@dataclass(frozen=True)
class LocalExchange:
    """All experts live here: rows are sorted by expert when they have arrived, and combine sorts them back.

    Nothing travels, so between dispatch and arrival there is one row a token, not one a copy. `slot_T` says
    which rows pad a batch, see `ops.permute`.
    """

    n_routed_experts: int
    slot_T: Tensor | None = field(default=None, kw_only=True)

    def padded(self, slot_T: Tensor) -> LocalExchange:
        """The same for a batch in which rows with a negative slot only pad."""
        return replace(self, slot_T=slot_T)

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """The rows stay where they are."""
        return InFlight((x_TD, weight_TK), expert_TK, at_home=True)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Copy every token to each of its experts."""
        x_TD, weight_TK = flight.tensors
        rows_RD, ends_E, maps = ops.permute(x_TD, flight.handle, self.n_routed_experts, slot_T=self.slot_T)
        return Arrived(rows_RD, ends_E, weight_TK, maps)

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """Nothing has to travel. Where autograd records, all is summed now: less is kept until combine."""
        if torch.is_grad_enabled():
            out_TD = ops.unpermute(rows_RD, arrived.handle, arrived.weight, beside)
            return InFlight((out_TD,), None, at_home=True)
        return InFlight((rows_RD, arrived.weight, *beside), arrived.handle)

    def finish_combine(self, flight: InFlight) -> Tensor:
        """Sum each token's rows with their weights, in a fixed order."""
        return flight.tensors[0] if flight.at_home else self.late(flight).summed()

    def late(self, flight: InFlight) -> LateSum:
        """The same for `Sockets.late`, where autograd does not record."""
        rows_RD, weight_TK, *beside = flight.tensors
        return LateSum(rows_RD, flight.handle, weight_TK, tuple(beside))


def packed_sockets(
    cu_seqlens: Tensor, max_seqlen: int, *, n_routed_experts: int, linear: Linear = plain_linear
) -> Sockets:
    """The sockets of one packed forward pass on one device."""
    return Sockets(PackedAttend(cu_seqlens, max_seqlen), LocalExchange(n_routed_experts), linear)
