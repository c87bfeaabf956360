"""Definitions of the ops whose rows do not feel each other: one row at a time, so nothing else can matter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels.reference.attention import mla_decode


def linear_by_row(x_TI: Tensor, weight_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`W x_t`, row after row; operands are widened to a `dtype` that is wider than theirs."""
    wide = torch.promote_types(x_TI.dtype, dtype)
    out_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0], dtype=dtype)
    weight_OI = weight_OI.to(wide)
    for t in range(x_TI.shape[0]):
        out_TO[t] = F.linear(x_TI[t].to(wide, copy=True), weight_OI)
    return out_TO


def heads_linear_by_row(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """`W_h x_th`, every head with a matrix of its own."""
    heads = [
        linear_by_row(x_THI[:, head], weight_HOI[head], dtype=x_THI.dtype)
        for head in range(weight_HOI.shape[0])
    ]
    return torch.stack(heads, dim=1)


def grouped_linear_by_row(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`W_e x_r` for the rows of each expert; rows past `ends_E[-1]` are zeros."""
    out_RO, start = x_RI.new_zeros(x_RI.shape[0], weight_EOI.shape[1]), 0
    for expert, end in enumerate(ends_E.tolist()):
        out_RO[start:end] = linear_by_row(x_RI[start:end], weight_EOI[expert], dtype=x_RI.dtype)
        start = end
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
    """`mla_decode` of one query at a time."""
    table_TP = block_table_SP[sequence_T.long()]
    context_T = context_T.clamp(min=0)
    queries = q_latent_THC.unsqueeze(1), q_rope_THr.unsqueeze(1)
    return mla_decode(*queries, cache_PBW, table_TP, context_T, scale=scale).squeeze(1)
