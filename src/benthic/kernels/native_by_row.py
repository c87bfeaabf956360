"""Products and attention by row through the library of `native_c`: float32 on a CPU, for inference.

Every sum there runs over its inner dim in order whatever the tile, so rows do not feel each other. Weights
whose outputs do not lie side by side are copied first: a server lays its largest ones out once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels.native import library

if TYPE_CHECKING:
    from torch import Tensor


def linear_by_row(x_TI: Tensor, weight_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `benthic.kernels.ops.linear_by_row`."""
    return heads_linear_by_row(x_TI.unsqueeze(1), weight_OI.unsqueeze(0)).squeeze(1).to(dtype)


def heads_linear_by_row(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """See `benthic.kernels.ops.heads_linear_by_row`."""
    weight_HOI = _side_by_side(weight_HOI)
    tokens, (heads, outer, inner) = x_THI.shape[0], weight_HOI.shape
    out_THO = torch.empty((tokens, heads, outer))
    library().bmm(
        x_THI.data_ptr(),
        x_THI.stride(1),
        x_THI.stride(0),
        x_THI.stride(2),
        weight_HOI.data_ptr(),
        weight_HOI.stride(0),
        weight_HOI.stride(2),
        out_THO.data_ptr(),
        out_THO.stride(1),
        out_THO.stride(0),
        heads,
        tokens,
        inner,
        outer,
    )
    return out_THO


def grouped_linear_by_row(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """See `benthic.kernels.ops.grouped_linear_by_row`."""
    x_RI, weight_EOI, ends_E = x_RI.contiguous(), _side_by_side(weight_EOI), ends_E.contiguous()
    experts, outer, inner = weight_EOI.shape
    out_RO = torch.empty((x_RI.shape[0], outer))
    library().grouped_linear(
        x_RI.data_ptr(),
        weight_EOI.data_ptr(),
        weight_EOI.stride(0),
        weight_EOI.stride(2),
        ends_E.data_ptr(),
        out_RO.data_ptr(),
        x_RI.shape[0],
        experts,
        inner,
        outer,
    )
    return out_RO


def mla_by_row(
    q_latent_THC: Tensor,
    q_rope_THr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    *,
    scale: float,
) -> Tensor:
    """See `benthic.kernels.ops.mla_by_row`: every query is a sequence of its own."""
    q_latent_THC, q_rope_THr = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent_THC, q_rope_THr)
    )
    table_TP = block_table_SP.to(torch.int32).index_select(0, sequence_T)
    context_T = context_T.to(torch.int32).clamp(min=0)
    tokens, heads, latent = q_latent_THC.shape
    out_THC = torch.empty((tokens, heads, latent))
    failed = library().mla_decode(
        q_latent_THC.data_ptr(),
        q_latent_THC.stride(0),
        q_latent_THC.stride(1),
        q_rope_THr.data_ptr(),
        q_rope_THr.stride(0),
        q_rope_THr.stride(1),
        cache_PBW.data_ptr(),
        table_TP.data_ptr(),
        table_TP.stride(0),
        context_T.data_ptr(),
        out_THC.data_ptr(),
        tokens,
        1,
        heads,
        cache_PBW.shape[2],
        latent,
        cache_PBW.shape[1],
        scale,
    )
    if failed:
        msg = f"mla_by_row: no memory for the scores of {tokens} contexts up to {int(context_T.max())} tokens"
        raise MemoryError(msg)
    return out_THC


def _side_by_side(weight_HOI: Tensor) -> Tensor:
    """The weights with their outputs side by side in memory: themselves, or a copy."""
    if weight_HOI.stride(1) == 1:
        return weight_HOI
    return weight_HOI.transpose(1, 2).contiguous().transpose(1, 2)
