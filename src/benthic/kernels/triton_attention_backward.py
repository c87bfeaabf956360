"""Flash attention backward: scores are computed again from the log-sum-exp; two kernels, no atomics.

    D_i = dO_i . O_i,  P = exp(S scale - LSE),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - D),
    dQ = scale dS K,  dK = scale dS^T Q

One kernel owns a tile of keys and walks over the queries that see it (dK, dV), the other owns a tile of
queries and walks over its keys (dQ). The scores are computed twice, 7 products instead of 5; in exchange
every sum has one order, so gradients are the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import advance, load_rows

LOG2E = tl.constexpr(1.4426950408889634)


@remembered
@triton.jit(do_not_specialize=["tokens"])
def row_dots(
    out_ptr, dout_ptr, delta_ptr, tokens, stride_dt, stride_dh,
    HEADS: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta[h, t] = out[t, h] . dout[t, h]."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, value = tl.program_id(1), tl.arange(0, V_PAD)
    mask = (token < tokens)[:, None] & (value < V)[None, :]
    out = tl.load(out_ptr + (token[:, None] * HEADS + head) * V + value[None, :], mask=mask, other=0.0)
    dout = tl.load(
        dout_ptr + token[:, None] * stride_dt + head * stride_dh + value[None, :], mask=mask, other=0.0
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens + token, delta, mask=token < tokens)


@triton.jit
def _queries(
    dk_1, dk_2, dv, k_1, k_2, v, q_at, dout_at, lse_at, delta_at, stride_q, stride_d,
    column, first, last, queries, offset, scale,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what the queries `first .. last` of one head contribute."""
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    for block in range(first, last, BLOCK_M):
        row = block + tl.arange(0, BLOCK_M)
        kept = row < queries
        q_block, dout_block = advance(q_at, block, stride_q), advance(dout_at, block, stride_d)
        q_1 = load_rows(q_block, stride_q, dim_1, kept, D, D_1, BLOCK_M)
        s_t = tl.dot(k_1, tl.trans(q_1), input_precision=PRECISION)
        q_2 = q_1
        if D_2 > 0:
            q_2 = load_rows(q_block, stride_q, dim_2, kept, D, D_1 + D_2, BLOCK_M)
            s_t = tl.dot(k_2, tl.trans(q_2), s_t, input_precision=PRECISION)
        # Rows past the end have lse = +inf, so their weights are 2^-inf = 0.
        lse = tl.load(lse_at + row, mask=kept, other=float("inf")) * LOG2E
        p_t = tl.exp2(s_t * (scale * LOG2E) - lse[None, :])
        if DIAGONAL:
            p_t = tl.where(column[:, None] <= (row + offset)[None, :], p_t, 0.0)
        dout = load_rows(dout_block, stride_d, value, kept, V, V_PAD, BLOCK_M)
        dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(delta_at + row, mask=kept, other=0.0)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q_1.dtype)
        dk_1 = tl.dot(ds_t, q_1, dk_1, input_precision=PRECISION)
        if D_2 > 0:
            dk_2 = tl.dot(ds_t, q_2, dk_2, input_precision=PRECISION)
    return dk_1, dk_2, dv


@triton.jit(do_not_specialize=["tokens"])
def _keys_and_values(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, starts_q_ptr, starts_k_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, tokens, scale,
    KEY_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr,
    V: tl.constexpr, V_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k = tl.load(starts_q_ptr + sequence), tl.load(starts_k_ptr + sequence)
    queries = tl.load(starts_q_ptr + sequence + 1) - start_q
    keys = tl.load(starts_k_ptr + sequence + 1) - start_k
    start = tl.program_id(0) * BLOCK_N
    if start >= keys:
        return
    column = start + tl.arange(0, BLOCK_N)
    kept = column < keys
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    mask_1, mask_v = kept[:, None] & (dim_1 < D)[None, :], kept[:, None] & (value < V)[None, :]
    mask_2 = kept[:, None] & (dim_2 < D)[None, :]
    token = (start_k + column).to(tl.int64)[:, None]
    k_at = k_ptr + token * stride_kt + key_head * stride_kh
    k_1 = tl.load(k_at + dim_1[None, :], mask=mask_1, other=0.0)
    k_2 = k_1
    if D_2 > 0:
        k_2 = tl.load(k_at + dim_2[None, :], mask=mask_2, other=0.0)
    v = tl.load(v_ptr + token * stride_vt + key_head * stride_vh + value[None, :], mask=mask_v, other=0.0)
    dk_1 = tl.zeros([BLOCK_N, D_1], tl.float32)
    dk_2 = tl.zeros([BLOCK_N, max(D_2, 16)], tl.float32)
    dv = tl.zeros([BLOCK_N, V_PAD], tl.float32)
    offset, first, clear = keys - queries, 0, 0
    if CAUSAL:  # queries before `first` see none of these keys; from `clear` on they see them all
        first = tl.maximum(start - offset, 0)
        clear = tl.minimum(first + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M, tl.maximum(queries, first))
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        q_at = q_ptr + start_q.to(tl.int64) * stride_qt + head * stride_qh
        dout_at = dout_ptr + start_q.to(tl.int64) * stride_dt + head * stride_dh
        per_row = head * tokens.to(tl.int64) + start_q
        if CAUSAL:
            dk_1, dk_2, dv = _queries(
                dk_1, dk_2, dv, k_1, k_2, v, q_at, dout_at, lse_ptr + per_row, delta_ptr + per_row,
                stride_qt, stride_dt, column, first, clear, queries, offset, scale,
                D, D_1, D_2, V, V_PAD, BLOCK_M, True, PRECISION,
            )  # fmt: skip
        dk_1, dk_2, dv = _queries(
            dk_1, dk_2, dv, k_1, k_2, v, q_at, dout_at, lse_ptr + per_row, delta_ptr + per_row,
            stride_qt, stride_dt, column, clear, queries, queries, offset, scale,
            D, D_1, D_2, V, V_PAD, BLOCK_M, False, PRECISION,
        )  # fmt: skip
    dk_at = dk_ptr + (token * KEY_HEADS + key_head) * D
    tl.store(dk_at + dim_1[None, :], (dk_1 * scale).to(dk_ptr.dtype.element_ty), mask=mask_1)
    if D_2 > 0:
        tl.store(dk_at + dim_2[None, :], (dk_2 * scale).to(dk_ptr.dtype.element_ty), mask=mask_2)
    dv_at = dv_ptr + (token * KEY_HEADS + key_head) * V
    tl.store(dv_at + value[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _keys(
    dq_1, dq_2, q_1, q_2, dout, lse, delta, k_at, v_at, stride_k, stride_v,
    row, first, last, keys, offset, scale,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dQ what the keys `first .. last` contribute."""
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    for block in range(first, last, BLOCK_N):
        column = block + tl.arange(0, BLOCK_N)
        kept = column < keys if MASKED else column >= 0
        k_block, v_block = advance(k_at, block, stride_k), advance(v_at, block, stride_v)
        k_1 = load_rows(k_block, stride_k, dim_1, kept, D, D_1, BLOCK_N)
        s = tl.dot(q_1, tl.trans(k_1), input_precision=PRECISION)
        k_2 = k_1
        if D_2 > 0:
            k_2 = load_rows(k_block, stride_k, dim_2, kept, D, D_1 + D_2, BLOCK_N)
            s = tl.dot(q_2, tl.trans(k_2), s, input_precision=PRECISION)
        v = load_rows(v_block, stride_v, value, kept, V, V_PAD, BLOCK_N)
        p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
        if MASKED:
            seen = kept[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= (row + offset)[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k_1.dtype)
        dq_1 = tl.dot(ds, k_1, dq_1, input_precision=PRECISION)
        if D_2 > 0:
            dq_2 = tl.dot(ds, k_2, dq_2, input_precision=PRECISION)
    return dq_1, dq_2


@triton.jit(do_not_specialize=["tokens"])
def _query_gradient(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, starts_q_ptr, starts_k_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, tokens, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr,
    V: tl.constexpr, V_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k = tl.load(starts_q_ptr + sequence), tl.load(starts_k_ptr + sequence)
    queries = tl.load(starts_q_ptr + sequence + 1) - start_q
    keys = tl.load(starts_k_ptr + sequence + 1) - start_k
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    if tile * BLOCK_M >= queries:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = row < queries
    dim_1, dim_2, value = tl.arange(0, D_1), D_1 + tl.arange(0, max(D_2, 16)), tl.arange(0, V_PAD)
    mask_1, mask_v = kept[:, None] & (dim_1 < D)[None, :], kept[:, None] & (value < V)[None, :]
    mask_2 = kept[:, None] & (dim_2 < D)[None, :]
    token = (start_q + row).to(tl.int64)[:, None]
    q_at = q_ptr + token * stride_qt + head * stride_qh
    q_1 = tl.load(q_at + dim_1[None, :], mask=mask_1, other=0.0)
    q_2 = q_1
    if D_2 > 0:
        q_2 = tl.load(q_at + dim_2[None, :], mask=mask_2, other=0.0)
    dout = tl.load(dout_ptr + token * stride_dt + head * stride_dh + value[None, :], mask=mask_v, other=0.0)
    per_row = head * tokens.to(tl.int64) + start_q + row
    lse = tl.load(lse_ptr + per_row, mask=kept, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key has no gradient
    delta = tl.load(delta_ptr + per_row, mask=kept, other=0.0)
    k_at = k_ptr + start_k.to(tl.int64) * stride_kt + (head // GROUPS) * stride_kh
    v_at = v_ptr + start_k.to(tl.int64) * stride_vt + (head // GROUPS) * stride_vh
    offset = keys - queries
    whole, end = keys // BLOCK_N * BLOCK_N, keys
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum((tile + 1) * BLOCK_M + offset, 0))
        whole = tl.minimum(whole, tl.maximum(tile * BLOCK_M + offset + 1, 0) // BLOCK_N * BLOCK_N)
    dq_1 = tl.zeros([BLOCK_M, D_1], tl.float32)
    dq_2 = tl.zeros([BLOCK_M, max(D_2, 16)], tl.float32)
    dq_1, dq_2 = _keys(
        dq_1, dq_2, q_1, q_2, dout, lse, delta, k_at, v_at, stride_kt, stride_vt,
        row, 0, whole, keys, offset, scale,
        D, D_1, D_2, V, V_PAD, BLOCK_N, False, CAUSAL, PRECISION,
    )  # fmt: skip
    dq_1, dq_2 = _keys(
        dq_1, dq_2, q_1, q_2, dout, lse, delta, k_at, v_at, stride_kt, stride_vt,
        row, whole, end, keys, offset, scale,
        D, D_1, D_2, V, V_PAD, BLOCK_N, True, CAUSAL, PRECISION,
    )  # fmt: skip
    dq_at = dq_ptr + (token * HEADS + head) * D
    tl.store(dq_at + dim_1[None, :], (dq_1 * scale).to(dq_ptr.dtype.element_ty), mask=mask_1)
    if D_2 > 0:
        tl.store(dq_at + dim_2[None, :], (dq_2 * scale).to(dq_ptr.dtype.element_ty), mask=mask_2)


def keep(ctx, saved, settings):
    """What a forward pass gives, `(out_THv, lse_TH)`, after noting what the backward pass reads.

    `saved` is queries, keys, values, out, the log-sum-exp [H, T] and both starts; `settings` the longest
    lengths, the scale and whether the mask is causal.
    """
    ctx.save_for_backward(*saved)
    ctx.settings = settings
    out_THv, lse_TH = saved[3], saved[4].t()
    ctx.mark_non_differentiable(lse_TH)
    ctx.set_materialize_grads(False)  # nor is a gradient of it made up
    return out_THv, lse_TH


def gradients(ctx, dout_THv):
    """Those of queries, keys and values, and None for the six others that a forward pass takes."""
    if dout_THv is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: a second look is an error under activation checkpointing
    widths = (*split_width(saved[0].shape[-1]), pad_value(saved[2].shape[-1]))
    return *backward(dout_THv, *saved, *ctx.settings, widths), None, None, None, None, None, None


def split_width(width):
    """One or two powers of two that cover a head: 192 -> (128, 64), 44 -> (32, 16), 64 -> (64, 0)."""
    padded = next_power_of_2(max(width, 16))
    if width in (padded, *range(1, 17)):
        return padded, 0
    half = padded // 2
    rest = next_power_of_2(max(width - half, 16))
    return (half, rest) if rest < half else (padded, 0)


def pad_value(width):
    """The power of two, at least 16, that covers a value head."""
    return next_power_of_2(max(width, 16))


def backward(
    dout_THv, q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k,
    max_q, max_k, scale, causal, widths,
):  # fmt: skip
    """Gradients `(dq, dk, dv)`; `widths = (d_1, d_2, v_pad)` as the forward split them."""
    if dout_THv.stride(-1) != 1:
        dout_THv = dout_THv.contiguous()
    tokens, heads, width = q_THd.shape
    key_heads, value = v_THv.shape[1:]
    d_1, d_2, v_pad = widths
    sequences = cu_seqlens_q.shape[0] - 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THd, k_THd, v_THv))
    delta_HT = torch.empty_like(lse_HT)
    if tokens == 0 or k_THd.shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    row_dots[(cdiv(tokens, 64), heads)](
        out_THv, dout_THv, delta_HT, tokens, dout_THv.stride(0), dout_THv.stride(1),
        HEADS=heads, V=value, V_PAD=v_pad, BLOCK_M=64,
    )  # fmt: skip
    strides = [x.stride(dim) for x in (q_THd, k_THd, v_THv, dout_THv) for dim in (0, 1)]
    shape = {"GROUPS": heads // key_heads, "D": width, "D_1": d_1, "D_2": d_2, "V": value, "V_PAD": v_pad}
    operands = (q_THd, k_THd, v_THv, dout_THv, lse_HT, delta_HT)
    block_m, block_n, warps, stages = key_tiles(q_THd.dtype, d_1 + d_2)
    _keys_and_values[(cdiv(max_k, block_n), key_heads, sequences)](
        *operands, dk, dv, cu_seqlens_q, cu_seqlens_k, *strides, tokens, scale,
        KEY_HEADS=key_heads, **shape, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, PRECISION="ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = query_tiles(q_THd.dtype, d_1 + d_2)
    _query_gradient[(cdiv(max_q, block_m), heads, sequences)](
        *operands, dq, cu_seqlens_q, cu_seqlens_k, *strides, tokens, scale,
        HEADS=heads, **shape, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, PRECISION="ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv


def key_tiles(dtype, width):
    """`(block_m, block_n, warps, stages)` of the dK, dV kernel: sizes that do not spill on sm_90."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if width > 128:
        return 32, 64, 8, 2
    return (32, 128, 8, 2) if width > 64 else (64, 128, 8, 2)


def query_tiles(dtype, width):
    """`(block_m, block_n, warps, stages)` of the dQ kernel: sizes that do not spill on sm_90."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    return (128, 32, 8, 2) if width > 128 else (128, 64, 8, 2)
