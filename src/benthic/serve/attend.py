"""The `attend` socket for serving: queries meet the paged latent cache.

One step mixes two kinds of rows. Decode rows come first, `queries` for each sequence, and stay in the latent
space (absorbed form: one key head of width C + r for all query heads). Prefill rows follow and expand keys
and values (expanded form: 3.4 times fewer operations per query-key pair). Both read the same pages and give
the same numbers.

Shape suffixes: T rows of the step, S decode sequences, Q queries of each, P blocks of the longest context, M
context tokens of all prefill sequences; H heads, n nope, r rope, v value, C latent, W = C + r.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from benthic.kernels.ops import Slots, attention_of_parts, mla_decode
from benthic.kernels.tile_lists import TileLists

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.model.sockets import Attend, LatentUp
    from benthic.serve.cache import LatentCache


@dataclass(frozen=True)
class DecodeRows:
    """The step's first `S * queries` rows: sequences that add `queries` tokens to a context that is cached.

    `block_table_SP` int32, padded with any valid block; `context_S` int32 counts tokens including this
    step's.
    """

    queries: int
    block_table_SP: Tensor
    context_S: Tensor

    @property
    def rows(self) -> int:
        """How many rows of the step they take."""
        return self.block_table_SP.shape[0] * self.queries


@dataclass(frozen=True)
class PrefillRows:
    """The rest of the step's rows: chunks of prompts, packed.

    `cu_seqlens_q` and `cu_seqlens_k` int32 [sequences + 1] bound each sequence's rows and its context (which
    ends with those rows). `context_slot_M` int64 lists the slots of all contexts in order; None when every
    context is made of this step's rows alone, which then need not be read back. `block_table_SP` int32 is
    there for an attention that reads pages in place, see `benthic.serve.invariant`. `lists`
    belongs to the bounds and serves all layers.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    context_slot_M: Tensor | None
    block_table_SP: Tensor | None = None
    lists: TileLists = field(default_factory=TileLists, init=False, repr=False)


@dataclass(frozen=True)
class StepLayout:
    """Where one step's rows come from and go to: built once by the runner, read by every layer.

    `slot_T` int64: where each row's latent is written. `border_1` int64 [1] is there where the host does not
    know how many rows decode: `decode` then has one query for each of the first rows, as if all of them
    decoded, and `prefill` has all rows, those that decode being its first sequence.
    """

    slot_T: Tensor
    decode: DecodeRows | None
    prefill: PrefillRows | None
    border_1: Tensor | None = None


MakeAttend: TypeAlias = "Callable[[LatentCache, StepLayout], Attend]"
"""Makes the `attend` socket of one step: `PagedAttend`, or `benthic.serve.invariant.InvariantAttend`."""


def rows_behind(
    position_S: Tensor, limit_S: Tensor, table_SP: Tensor, block: int
) -> tuple[Tensor, DecodeRows]:
    """Where a row of each sequence is written, and what it sees; nothing at or beyond `limit_S`."""
    inside_S = position_S < limit_S
    column_S1 = torch.where(inside_S, position_S // block, 0).unsqueeze(1)
    first_S = table_SP.gather(1, column_S1).squeeze(1).to(torch.int64) * block
    slot_S = torch.where(inside_S, first_S + position_S % block, -1)
    return slot_S, DecodeRows(1, table_SP, torch.minimum(position_S + 1, limit_S).to(torch.int32))


class PagedAttend:
    """Attention of one step against the cache (an `Attend` socket)."""

    def __init__(self, cache: LatentCache, layout: StepLayout) -> None:
        self._cache = cache
        self._layout = layout
        self._decoding_S11: Tensor | None = None
        if layout.border_1 is not None and layout.decode is not None:
            row_S = torch.arange(layout.decode.rows, device=layout.border_1.device)
            self._decoding_S11 = (row_S < layout.border_1).view(-1, 1, 1)

    def slots(self, layer: int) -> Slots:
        """This step's rows in the layer's pages; only prompts that are read for the first time need more."""
        prefill = self._layout.prefill
        alone = prefill is None or prefill.context_slot_M is not None
        return Slots(self._cache.layer(layer), self._layout.slot_T, alone)

    def __call__(
        self,
        q_nope_THn: Tensor,
        q_rope_THr: Tensor,
        latent_TC: Tensor,
        k_rope_Tr: Tensor,
        up: LatentUp,
        *,
        layer: int,
        scale: float,
    ) -> Tensor:
        """Attend to the pages, this step's rows among them; see `benthic.model.sockets.Attend`."""
        pages_PBW = self._cache.layer(layer)
        decode, prefill = self._layout.decode, self._layout.prefill
        if prefill is None:
            assert decode is not None  # noqa: S101 (the runner plans no step without rows)
            return _absorbed(q_nope_THn, q_rope_THr, up, pages_PBW, decode, scale=scale)
        first = 0 if decode is None or self._decoding_S11 is not None else decode.rows
        context = self._context(prefill, first, latent_TC, k_rope_Tr, layer)
        expanded_THv = _expanded(q_nope_THn[first:], q_rope_THr[first:], up, context, prefill, scale=scale)
        if decode is None:
            return expanded_THv
        rows = slice(decode.rows)
        absorbed_THv = _absorbed(q_nope_THn[rows], q_rope_THr[rows], up, pages_PBW, decode, scale=scale)
        if self._decoding_S11 is None:
            return torch.cat((absorbed_THv, expanded_THv))
        expanded_THv[rows] = torch.where(self._decoding_S11, absorbed_THv, expanded_THv[rows])
        return expanded_THv

    def _context(
        self,
        prefill: PrefillRows,
        first: int,
        latent_TC: Tensor,
        k_rope_Tr: Tensor,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Latents and rotated keys that the prefill rows, from `first` on, see: `(latent_MC, rope_Mr)`."""
        if prefill.context_slot_M is None:
            return latent_TC[first:], k_rope_Tr[first:]
        rows_MW = self._cache.read(layer, prefill.context_slot_M).to(latent_TC.dtype)
        latent_dim = latent_TC.shape[-1]
        return rows_MW[:, :latent_dim], rows_MW[:, latent_dim:]


def _absorbed(
    q_nope_THn: Tensor,
    q_rope_THr: Tensor,
    up: LatentUp,
    pages_PBW: Tensor,
    decode: DecodeRows,
    *,
    scale: float,
) -> Tensor:
    """Decode rows in the latent space: `out_THv`."""
    rows = decode.block_table_SP.shape[0]
    q_latent_THC = up.absorb_query(q_nope_THn)
    out_SQHC = mla_decode(
        q_latent_THC.unflatten(0, (rows, decode.queries)),
        q_rope_THr.unflatten(0, (rows, decode.queries)),
        pages_PBW,
        decode.block_table_SP,
        decode.context_S,
        scale=scale,
    )
    return up.absorb_value(out_SQHC.flatten(0, 1))


def _expanded(
    q_nope_THn: Tensor,
    q_rope_THr: Tensor,
    up: LatentUp,
    context: tuple[Tensor, Tensor],
    prefill: PrefillRows,
    *,
    scale: float,
) -> Tensor:
    """Prefill rows against expanded keys and values: `out_THv`."""
    latent_MC, rope_Mr = context
    k_nope_MHn, v_MHv = up.expand(latent_MC)
    return attention_of_parts(
        q_nope_THn,
        q_rope_THr,
        k_nope_MHn,
        rope_Mr,
        v_MHv,
        prefill.cu_seqlens_q,
        prefill.cu_seqlens_k,
        max_seqlen_q=prefill.max_seqlen_q,
        max_seqlen_k=prefill.max_seqlen_k,
        scale=scale,
        lists=prefill.lists,
    )
