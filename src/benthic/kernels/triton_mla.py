"""Paged absorbed MLA decode with split contexts, and writing the cache.

A decode step reads every cached token once and multiplies it with all heads' queries: rows of the products
are query-head pairs, the latent is key and value at once. One sequence rarely fills a GPU, so its context
is cut into splits; each leaves its normalised output and log-sum-exp, and a second kernel combines them:

    out = sum_s 2^(lse_s - lse) out_s,  lse = log2 sum_s 2^lse_s
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.triton_e4m3 import stored
from benthic.kernels.triton_tiles import multiprocessors

LOG2E = tl.constexpr(1.4426950408889634)
_COPY_CHUNK = 8192
_SPLIT_TARGET = 2  # programs a multiprocessor: enough to hide the latency of page loads


@triton.jit
def _load(base, place, dim, kept, WIDTH: tl.constexpr, END: tl.constexpr):
    """Columns `dim` of the tokens at `place`; those not `kept`, and columns from WIDTH on, read as zero."""
    at = base + place[:, None] + dim[None, :]
    if END > WIDTH:
        tile = tl.load(at, mask=kept[:, None] & (dim < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=kept[:, None], other=0.0)
    return tile


@triton.jit(do_not_specialize=["splits"])
def _decode(
    q_latent_ptr, q_rope_ptr, cache_ptr, table_ptr, context_ptr, out_ptr, lse_ptr,
    stride_qs, stride_qq, stride_qh, stride_rs, stride_rq, stride_rh, stride_page, stride_token, stride_table,
    queries, heads, splits, scale,
    C: tl.constexpr, C_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, split = tl.program_id(1), tl.program_id(2)
    rows = queries * heads
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    query, head = row // heads, row % heads
    row_kept = row < rows
    context = tl.load(context_ptr + sequence)
    latent, rope = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    mask_c = row_kept[:, None] & (latent < C)[None, :]
    at = sequence * stride_qs + query * stride_qq + head * stride_qh
    q_latent = tl.load(q_latent_ptr + at[:, None] + latent[None, :], mask=mask_c, other=0.0)
    at = sequence * stride_rs + query * stride_rq + head * stride_rh
    q_rope = tl.load(
        q_rope_ptr + at[:, None] + rope[None, :], mask=row_kept[:, None] & (rope < R)[None, :], other=0.0
    )
    visible = context - (queries - 1 - query)  # tokens that each row sees
    share = tl.cdiv(tl.cdiv(context, splits), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, context)
    acc = tl.zeros([BLOCK_H, C_PAD], tl.float32)
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for block in range(first, last, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        kept = token < context
        page = tl.load(table_ptr + sequence * stride_table + token // PAGE, mask=kept, other=0).to(tl.int64)
        place = page * stride_page + (token % PAGE) * stride_token
        key = _load(cache_ptr, place, latent, kept, C, C_PAD).to(q_latent.dtype)
        key_rope = _load(cache_ptr + C, place, rope, kept, R, R_PAD).to(q_rope.dtype)
        s = tl.dot(q_latent, tl.trans(key), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(key_rope), s, input_precision=PRECISION) * (scale * LOG2E)
        s = tl.where(token[None, :] < visible[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(key.dtype), key, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    blind = total == 0.0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    place = (sequence * rows + row).to(tl.int64) * splits + split
    tl.store(out_ptr + place[:, None] * C + latent[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_c)
    lse = tl.where(blind, float("-inf"), m + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse_ptr + place, lse, mask=row_kept)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    part_ptr, lse_ptr, out_ptr, splits, C: tl.constexpr, C_PAD: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One program a row: weigh the splits' outputs by their share of the softmax denominator."""
    row = tl.program_id(0).to(tl.int64)
    split, latent = tl.arange(0, SPLITS), tl.arange(0, C_PAD)
    lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    most = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight, axis=0)
    acc = tl.zeros([C_PAD], tl.float32)
    for index in range(splits):
        share = tl.sum(tl.where(split == index, weight, 0.0), axis=0)
        acc += share * tl.load(part_ptr + (row * splits + index) * C + latent, mask=latent < C, other=0.0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * C + latent, out.to(out_ptr.dtype.element_ty), mask=latent < C)


@triton.jit(do_not_specialize=["tokens"])
def _store(
    cache_ptr, latent_ptr, rope_ptr, slot_ptr, tokens, stride_slot, stride_latent, stride_rope,
    C: tl.constexpr, C_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """cache[slot[t]] = latent[t], rope[t]; tokens with slot -1 are skipped."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    latent, rope = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    mask = (slot >= 0)[:, None] & (latent < C)[None, :]
    x = tl.load(latent_ptr + token[:, None] * stride_latent + latent[None, :], mask=mask)
    place = cache_ptr + (slot * stride_slot)[:, None]
    tl.store(place + latent[None, :], stored(x, cache_ptr), mask=mask)
    mask = (slot >= 0)[:, None] & (rope < R)[None, :]
    x = tl.load(rope_ptr + token[:, None] * stride_rope + rope[None, :], mask=mask)
    tl.store(place + C + rope[None, :], stored(x, cache_ptr), mask=mask)


@triton.jit(do_not_specialize=["source_stride", "target_stride"])
def _copy(
    source_ptr, target_ptr, from_ptr, to_ptr, source_stride, target_stride, size, CHUNK: tl.constexpr
):  # fmt: skip
    """One chunk of one block of one layer; strides in blocks of `size` elements."""
    block, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    came = tl.load(from_ptr + block)
    source = (layer * source_stride + came) * size
    target = (layer * target_stride + tl.load(to_ptr + block)) * size
    copied = place < tl.where(came >= 0, size, 0)
    value = tl.load(source_ptr + source + place, mask=copied)
    tl.store(target_ptr + target + place, value, mask=copied)


def mla_decode(q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, *, scale, splits=None):
    """See `benthic.kernels.ops.mla_decode`.

    `splits` is the number of parts of every context; by default it follows from shapes alone (sequences,
    heads, width of the block table), never from the contexts, so a CUDA graph can hold the launch.
    """
    q_latent_SQHC, q_rope_SQHr = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent_SQHC, q_rope_SQHr)
    )
    sequences, queries, heads, latent = q_latent_SQHC.shape
    rope, rows, page = q_rope_SQHr.shape[3], queries * heads, cache_PBW.shape[1]
    out = torch.empty(q_latent_SQHC.shape, dtype=q_latent_SQHC.dtype, device=cache_PBW.device)
    if out.numel() == 0:
        return out
    fp8_cache = cache_PBW.dtype == torch.float8_e4m3fn
    block_h, block_n, warps, stages = tiles(q_latent_SQHC.dtype, rows, fp8_cache=fp8_cache)
    row_blocks = cdiv(rows, block_h)
    if splits is None:
        splits = split_count(cache_PBW.device, sequences * row_blocks, block_table_SP.shape[1] * page)
    lse = torch.empty(sequences * rows * splits, dtype=torch.float32, device=out.device)
    part = out if splits == 1 else torch.empty(lse.shape[0], latent, dtype=torch.float32, device=out.device)
    latent_pad = next_power_of_2(max(latent, 16))
    _decode[(row_blocks, sequences, splits)](
        q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, part, lse,
        *q_latent_SQHC.stride()[:3], *q_rope_SQHr.stride()[:3], *cache_PBW.stride()[:2],
        block_table_SP.stride(0), queries, heads, splits, scale,
        C=latent, C_PAD=latent_pad, R=rope, R_PAD=next_power_of_2(max(rope, 16)), PAGE=page,
        BLOCK_H=block_h, BLOCK_N=block_n, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(sequences * rows,)](
            part, lse, out, splits, C=latent, C_PAD=latent_pad, SPLITS=next_power_of_2(splits)
        )
    return out


def tiles(dtype, rows, *, fp8_cache=False):
    """`(block_h, block_n, warps, stages)` for `rows` query-head pairs of a sequence.

    Widening FP8 pages takes registers: 64 rows spill then.
    """
    if dtype == torch.float32:
        return 16, 16, 4, 1
    if fp8_cache and rows > 16:
        return 32, 32, 8, 2
    if rows <= 32:
        return (16 if rows <= 16 else 32), 64, 8, 2
    return 64, 16, 8, 2


def split_count(device, programs, longest):
    """Parts to cut contexts into: about two programs a multiprocessor, at least 256 tokens each."""
    wanted = cdiv(_SPLIT_TARGET * multiprocessors(device), programs)
    return max(1, min(wanted, cdiv(longest, 256), 64))


def store_latent(cache_PBW, latent_TC, rope_Tr, slot_T):
    """See `benthic.kernels.ops.store_latent`."""
    latent_TC, rope_Tr = (x if x.stride(-1) == 1 else x.contiguous() for x in (latent_TC, rope_Tr))
    tokens, latent = latent_TC.shape
    rope = rope_Tr.shape[1]
    if tokens:
        _store[(cdiv(tokens, 4),)](
            cache_PBW, latent_TC, rope_Tr, slot_T, tokens, cache_PBW.stride(1),
            latent_TC.stride(0), rope_Tr.stride(0),
            C=latent, C_PAD=next_power_of_2(latent),
            R=rope, R_PAD=next_power_of_2(rope), ROWS=4, **early(latent_TC.device, tokens),
        )  # fmt: skip


def copy_blocks(source_LPBW, from_R, target_LPBW, to_R):
    """See `benthic.kernels.ops.copy_blocks`."""
    if target_LPBW.element_size() == 1:
        source_LPBW, target_LPBW = source_LPBW.view(torch.uint8), target_LPBW.view(torch.uint8)
    layers, pages, block, width = target_LPBW.shape
    size, count = block * width, to_R.shape[0]
    if size and count and layers:
        _copy[(count, layers, cdiv(size, _COPY_CHUNK))](
            source_LPBW, target_LPBW, from_R, to_R, source_LPBW.shape[1], pages, size,
            CHUNK=_COPY_CHUNK, num_warps=8,
        )  # fmt: skip
