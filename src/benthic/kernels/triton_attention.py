"""Flash attention forward: packed sequences, online softmax, no score matrix.

One program holds a tile of queries of one head and one sequence and walks over its keys from the left:
blocks that every query of the tile sees, then the blocks that the causal diagonal or the end of the
sequence cuts. Softmax works in base 2. A head of 192 dims is two products, 128 + 64, because tiles are
powers of two.

    m' = max(m, max_j s_j), l' = l 2^(m - m') + sum_j 2^(s_j - m'), o' = o 2^(m - m') + sum_j 2^(s_j - m') v_j
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.triton_attention_backward import gradients, keep, pad_value, split_width
from benthic.kernels.triton_tiles import advance, load_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _walk(
    acc, m, total, q_1, q_2, k_at, v_at, stride_k, stride_v,
    row, first, last, keys, offset, scale,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the keys `first .. last`, in blocks; `MASKED` blocks may be cut by the diagonal or the end."""
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    for block in range(first, last, BLOCK_N):
        column = block + tl.arange(0, BLOCK_N)
        kept = column < keys if MASKED else column >= 0
        k_block, v_block = advance(k_at, block, stride_k), advance(v_at, block, stride_v)
        k_1 = load_rows(k_block, stride_k, dim_1, kept, D, D_1, BLOCK_N)
        s = tl.dot(q_1, tl.trans(k_1), input_precision=PRECISION)
        if D_2 > 0:
            k_2 = load_rows(k_block, stride_k, dim_2, kept, D, D_1 + D_2, BLOCK_N)
            s = tl.dot(q_2, tl.trans(k_2), s, input_precision=PRECISION)
        v = load_rows(v_block, stride_v, value, kept, V, V_PAD, BLOCK_N)
        s *= scale
        if MASKED:
            seen = kept[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= (row + offset)[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has seen no key keeps m = -inf; subtract 0 there, so that its weights are 2^-inf = 0.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, tokens, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr,
    V: tl.constexpr, V_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k = tl.load(starts_q_ptr + sequence), tl.load(starts_k_ptr + sequence)
    queries = tl.load(starts_q_ptr + sequence + 1) - start_q
    keys = tl.load(starts_k_ptr + sequence + 1) - start_k
    # Causal tiles at the end of a sequence meet the most keys: start them first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    if tile * BLOCK_M >= queries:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = row < queries
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    q_at = advance(q_ptr, start_q + tile * BLOCK_M, stride_qt) + head * stride_qh
    q_1 = load_rows(q_at, stride_qt, dim_1, kept, D, D_1, BLOCK_M)
    q_2 = q_1
    if D_2 > 0:
        q_2 = load_rows(q_at, stride_qt, dim_2, kept, D, D_1 + D_2, BLOCK_M)
    k_at = advance(k_ptr, start_k, stride_kt) + (head // GROUPS) * stride_kh
    v_at = advance(v_ptr, start_k, stride_vt) + (head // GROUPS) * stride_vh
    offset = keys - queries
    whole, end = keys // BLOCK_N * BLOCK_N, keys
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum((tile + 1) * BLOCK_M + offset, 0))
        whole = tl.minimum(whole, tl.maximum(tile * BLOCK_M + offset + 1, 0) // BLOCK_N * BLOCK_N)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, m, total = _walk(
        acc, m, total, q_1, q_2, k_at, v_at, stride_kt, stride_vt,
        row, 0, whole, keys, offset, scale * LOG2E,
        D, D_1, D_2, V, V_PAD, BLOCK_N, False, CAUSAL, PRECISION,
    )  # fmt: skip
    acc, m, total = _walk(
        acc, m, total, q_1, q_2, k_at, v_at, stride_kt, stride_vt,
        row, whole, end, keys, offset, scale * LOG2E,
        D, D_1, D_2, V, V_PAD, BLOCK_N, True, CAUSAL, PRECISION,
    )  # fmt: skip
    blind = total == 0.0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    token = (start_q + row).to(tl.int64)
    out_at = out_ptr + (token[:, None] * HEADS + head) * V + value[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=kept[:, None] & (value < V)[None, :])
    lse = tl.where(blind, float("-inf"), m * LN2 + tl.log(tl.where(blind, 1.0, total)))
    tl.store(lse_ptr + head.to(tl.int64) * tokens + token, lse, mask=kept)


def attention(
    q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, scale, causal, lists=None
):
    """See `benthic.kernels.ops.attention`; returns `(out_THv, lse_TH)`."""
    del lists  # its grid has a place for every tile of the longest sequence
    return _Attention.apply(
        q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal
    )


class _Attention(torch.autograd.Function):
    """Attention that keeps only its output and the log-sum-exp of each row; scores are computed again."""

    @staticmethod
    def forward(ctx, q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal):
        """Save the operands, the output and the log-sum-exp."""
        q_THd, k_THd, v_THv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THd, k_THd, v_THv))
        tokens, heads, width = q_THd.shape
        value = v_THv.shape[-1]
        out_THv = torch.empty(tokens, heads, value, dtype=q_THd.dtype, device=q_THd.device)
        lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THd.device)
        d_1, d_2 = split_width(width)
        block_m, block_n, warps, stages = forward_tiles(q_THd.dtype, d_1 + d_2)
        grid = (cdiv(max_q, block_m), heads, cu_seqlens_q.shape[0] - 1)
        if tokens and max_q:
            _forward[grid](
                q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k,
                q_THd.stride(0), q_THd.stride(1), k_THd.stride(0), k_THd.stride(1),
                v_THv.stride(0), v_THv.stride(1), tokens, scale,
                HEADS=heads, GROUPS=heads // k_THd.shape[1], D=width, D_1=d_1, D_2=d_2,
                V=value, V_PAD=pad_value(value), BLOCK_M=block_m, BLOCK_N=block_n,
                CAUSAL=causal, PRECISION="ieee", num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return keep(
            ctx,
            (q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k),
            (max_q, max_k, scale, causal),
        )

    @staticmethod
    def backward(ctx, dout_THv, _dlse):
        """Gradients of queries, keys and values."""
        return gradients(ctx, dout_THv)


def forward_tiles(dtype, width):
    """`(block_m, block_n, warps, stages)`: sizes that do not spill on sm_90 (checked by compiling)."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if width > 64 else (64, 32, 4, 2)
    if width > 128:
        return 128, 64, 8, 2
    return 128, 64, 8, 3
