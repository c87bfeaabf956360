# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Flash attention for Hopper in Gluon: shapes, descriptors and autograd around its kernels.

The mathematics is that of `triton_attention`. The forward pass is `gluon_attention_forward`, the backward
pass `gluon_attention_backward`.
"""

from __future__ import annotations

import math

import torch

from benthic.kernels.gluon_attention_backward import gradients
from benthic.kernels.gluon_attention_forward import attention_forward
from benthic.kernels.gluon_tiles import loadable, rows_of
from benthic.kernels.triton_attention_backward import keep, split_width
from benthic.kernels.triton_pack_tiles import grid_of
from benthic.kernels.triton_tiles import multiprocessors

QUERIES = 128
KEYS = 128
STAGES = 2
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


def attention(
    q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, scale, causal, lists
):
    """See `benthic.kernels.ops.attention`; returns `(out_THv, lse_TH)`."""
    return _Attention.apply(
        q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, lists
    )


def attention_of_parts(
    q_nope_THn, q_rope_THr, k_nope_THn, k_rope_Tr, v_THv, cu_seqlens_q, cu_seqlens_k,
    *, max_seqlen_q, max_seqlen_k, scale, lists,
):  # fmt: skip
    """See `benthic.kernels.ops.attention_of_parts`."""
    del max_seqlen_k  # the grid is of queries
    queries = loadable(q_nope_THn), loadable(q_rope_THr)
    keys = loadable(k_nope_THn), loadable(k_rope_Tr.unsqueeze(1)).expand(-1, k_nope_THn.shape[1], -1)
    widths, starts = (q_nope_THn.shape[-1], q_rope_THr.shape[-1]), (cu_seqlens_q, cu_seqlens_k)
    return _attended(
        queries, keys, loadable(v_THv), starts, widths, max_seqlen_q, scale, lists, causal=True, apart=True
    )[0]


def _attended(queries, keys, v_THv, starts, widths, max_q, scale, lists, *, causal, apart):
    """Output and log-sum-exp [H, T]; `queries` and `keys` are two tensors `apart`, or one twice."""
    (q_1, q_2), (k_1, k_2), (d_1, d_2) = queries, keys, widths
    (tokens, heads, _), value = q_1.shape, v_THv.shape[-1]
    out_THv = torch.empty(tokens, heads, value, dtype=q_1.dtype, device=q_1.device)
    lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_1.device)
    if k_1.shape[0] == 0:  # a descriptor wants something to describe
        out_THv.zero_()
        lse_HT.fill_(-torch.inf)
    elif tokens and max_q:
        grid, (tiles, together, is_list) = grid_of(
            starts[0], tokens, max_q, QUERIES, heads, last_first=causal, lists=lists
        )
        total = math.prod(grid)
        programs = min(total, multiprocessors(q_1.device))
        counter = torch.zeros(1, dtype=torch.int32, device=q_1.device) if total > programs else starts[0]
        attention_forward[(programs,)](
            rows_of(q_1, 64, d_1), rows_of(q_2, 64, d_2 or d_1), rows_of(k_1, KEYS, d_1),
            rows_of(k_2, KEYS, d_2 or d_1), rows_of(v_THv, KEYS, value),
            out_THv, lse_HT, *starts, tiles, counter,
            q_1.stride(1), q_2.stride(1), k_1.stride(1), k_2.stride(1), v_THv.stride(1),
            tokens, grid[1], total, scale,
            HEADS=heads, GROUPS=heads // k_1.shape[1], D_1=d_1, D_2=d_2, V=value, BLOCK_M=QUERIES,
            BLOCK_N=KEYS, STAGES=STAGES, CAUSAL=causal, APART=apart, TOGETHER=together, LISTED=is_list,
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS,
        )  # fmt: skip
    return out_THv, lse_HT


class _Attention(torch.autograd.Function):
    """Attention that keeps only its output and the log-sum-exp of each row; scores are computed again."""

    @staticmethod
    def forward(ctx, q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, lists):
        """Save the operands, the output and the log-sum-exp."""
        q_THd, k_THd, v_THv = (loadable(x) for x in (q_THd, k_THd, v_THv))
        starts = cu_seqlens_q, cu_seqlens_k
        out_THv, lse_HT = _attended(
            (q_THd, q_THd), (k_THd, k_THd), v_THv, starts, split_width(q_THd.shape[-1]), max_q, scale, lists,
            causal=causal, apart=False,
        )  # fmt: skip
        return keep(
            ctx,
            (q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k),
            (max_q, max_k, scale, causal, lists),
        )

    @staticmethod
    def backward(ctx, dout_THv, _dlse):
        """Gradients of queries, keys and values."""
        return gradients(ctx, dout_THv)
