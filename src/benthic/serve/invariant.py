"""Batch-invariant serving: a token's scores depend on its own context alone, bit for bit.

Products are those of `benthic.model.invariant`. Attention has one form for all rows: absorbed, one query at
a time, contexts cut at fixed places. So it makes no difference whether a token was a prompt's, was decoded,
was drafted, or is computed again after a preemption, nor how a prompt was chunked or how much of it was
cached (docs/adr/0018-batch-invariance.md).

Shape suffixes: as in `benthic.serve.attend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.errors import ConfigError
from benthic.kernels.native import build_refusal
from benthic.kernels.ops import Slots, mla_by_row
from benthic.model.invariant import InvariantLinear, make_invariant
from benthic.serve.columns import lay_out

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.block_scaled import Scales
    from benthic.model.network import DeepSeek
    from benthic.model.sockets import LatentUp
    from benthic.serve.attend import DecodeRows, PrefillRows, StepLayout
    from benthic.serve.cache import LatentCache


@dataclass(frozen=True)
class SingleQueries:
    """Rows of a step, each a query by itself; `sequence_T` and `context_T` int32, as in `mla_by_row`."""

    block_table_SP: Tensor
    sequence_T: Tensor
    context_T: Tensor

    @classmethod
    def of_decodes(cls, decode: DecodeRows) -> SingleQueries:
        """`queries` rows of each sequence, the last of which sees all of its context."""
        count, queries = decode.block_table_SP.shape[0], decode.queries
        if queries == 1:
            sequence_T = torch.arange(count, dtype=torch.int32, device=decode.context_S.device)
            return cls(decode.block_table_SP, sequence_T, decode.context_S)
        row_T = torch.arange(count * queries, dtype=torch.int32, device=decode.context_S.device)
        sequence_T = row_T // queries
        unseen_T = queries - 1 - row_T % queries
        return cls(decode.block_table_SP, sequence_T, decode.context_S.index_select(0, sequence_T) - unseen_T)

    @classmethod
    def of_prefills(cls, prefill: PrefillRows, rows: int) -> SingleQueries:
        """The last rows of every context; how many there are is on the device, hence `rows`."""
        assert prefill.block_table_SP is not None  # noqa: S101 (the step builder of this mode makes it)
        ends_S = prefill.cu_seqlens_q[1:]
        contexts_S = prefill.cu_seqlens_k.diff()
        row_T = torch.arange(rows, dtype=torch.int32, device=ends_S.device)
        sequence_T = torch.searchsorted(ends_S, row_T, right=True, out_int32=True)
        context_T = (contexts_S - ends_S).index_select(0, sequence_T) + row_T + 1
        return cls(prefill.block_table_SP, sequence_T, context_T)


class InvariantAttend:
    """Attention of one step against the cache (an `Attend` socket), the same for all its rows."""

    def __init__(self, cache: LatentCache, layout: StepLayout) -> None:
        self._cache = cache
        self._slot_T = layout.slot_T
        border = 0 if layout.decode is None else layout.decode.rows
        rows = layout.slot_T.shape[0] - border
        decodes = [] if layout.decode is None else [SingleQueries.of_decodes(layout.decode)]
        prefills = [] if layout.prefill is None else [SingleQueries.of_prefills(layout.prefill, rows)]
        self._queries = [*decodes, *prefills]

    def slots(self, layer: int) -> Slots:
        """This step's rows in the layer's pages, from which all is read."""
        return Slots(self._cache.layer(layer), self._slot_T, alone=True)

    def __call__(
        self,
        q_nope_THn: Tensor,
        q_rope_THr: Tensor,
        latent_TC: Tensor,  # noqa: ARG002 (read from the pages)
        k_rope_Tr: Tensor,  # noqa: ARG002 (read from the pages)
        up: LatentUp,
        *,
        layer: int,
        scale: float,
    ) -> Tensor:
        """Attend to the pages, this step's rows among them; see `benthic.model.sockets.Attend`."""
        pages_PBW = self._cache.layer(layer)
        q_latent_THC, first, outs = up.absorb_query(q_nope_THn), 0, []
        for some in self._queries:
            rows = slice(first, first + some.context_T.shape[0])
            queries = q_latent_THC[rows], q_rope_THr[rows]
            readers = some.block_table_SP, some.sequence_T, some.context_T
            outs.append(mla_by_row(*queries, pages_PBW, *readers, scale=scale))
            first = rows.stop
        return up.absorb_value(outs[0] if len(outs) == 1 else torch.cat(outs))


def invariant_linear(model: DeepSeek, scales: Scales | None) -> InvariantLinear:
    """Make a loaded model batch-invariant, in place; returns its `linear` socket.

    On a CPU the weights are laid out as the compiled products read them.

    Raises:
        ConfigError: weights are in FP8, or a CPU has no compiled products or weights of another dtype than
            float32.
    """
    weight = model.head_weight()
    if scales:
        msg = (
            f"batch_invariant = True multiplies no FP8 weights, but {len(scales)} of this model are; widen "
            'them with quantization = "none"'
        )
        raise ConfigError(msg)
    if weight.device.type == "cpu":
        if weight.dtype != torch.float32:
            msg = f'batch_invariant = True on a CPU takes float32, not {weight.dtype}; set dtype = "float32"'
            raise ConfigError(msg)
        refusal = build_refusal()
        if refusal is not None:
            msg = (
                f"batch_invariant = True on a CPU needs its compiled products, but 0 of 4 run here: {refusal}"
            )
            raise ConfigError(msg)
        lay_out(model)
    return make_invariant(model)
