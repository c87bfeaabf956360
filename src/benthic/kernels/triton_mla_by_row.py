# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Paged absorbed MLA attention, one query a program: what it gives depends on its own context alone.

A context is cut at fixed places, every `CUT` tokens from its beginning, whatever the batch, the number of
queries and the width of the block table. A program takes one query's heads and one cut and leaves the cut's
normalised output and log-sum-exp, and goes on to another cut if there are more than programs; a second
kernel adds the cuts up in order:

    out = sum_s 2^(lse_s - max) out_s / sum_s 2^(lse_s - max)

No program holds two queries, so a query's neighbours are not even in the same registers. Prompts and decodes
take this one way: a token has the same bits whether it was a prompt's, was drafted, or is computed again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.triton_tiles import multiprocessors

CUT = 512
"""Tokens of a cut. Fewer would fill a GPU with fewer queries, and write more partial outputs for prompts."""
PART_BYTES = 256 << 20
"""Most memory for partial outputs; a call with more rows runs some of them after others."""
_PROGRAMS = 8  # a multiprocessor: enough to share out the longest context, few enough to idle cheaply
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _columns(base, place, dim, kept, WIDTH: tl.constexpr, END: tl.constexpr):
    """Columns `dim` of the tokens at `place`; those not `kept`, and columns from WIDTH on, read as zero."""
    mask = kept[:, None]
    if END > WIDTH:
        mask = mask & (dim < WIDTH)[None, :]
    return tl.load(base + place[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["cuts"])
def _attend(
    q_latent_ptr, q_rope_ptr, cache_ptr, table_ptr, sequence_ptr, context_ptr, part_ptr, lse_ptr,
    stride_qt, stride_qh, stride_rt, stride_rh, stride_page, stride_token, stride_table,
    heads, cuts, cut_size, scale,
    C: tl.constexpr, C_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some cuts of one query's context, for BLOCK_H of its heads."""
    blocks = tl.cdiv(heads, BLOCK_H)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    context = tl.load(context_ptr + row)
    head = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    head_kept = head < heads
    latent, rope = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    table_at = table_ptr + tl.load(sequence_ptr + row) * stride_table
    for first in range(tl.program_id(1) * cut_size, context, tl.num_programs(1) * cut_size):
        q_latent = _columns(q_latent_ptr + row * stride_qt, head * stride_qh, latent, head_kept, C, C_PAD)
        q_rope = _columns(q_rope_ptr + row * stride_rt, head * stride_rh, rope, head_kept, R, R_PAD)
        last = tl.minimum(first + cut_size, context)
        acc = tl.zeros([BLOCK_H, C_PAD], tl.float32)
        m = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        for block in range(first, last, BLOCK_N):
            token = block + tl.arange(0, BLOCK_N)
            kept = token < last
            page = tl.load(table_at + token // PAGE, mask=kept, other=0).to(tl.int64)
            place = page * stride_page + (token % PAGE) * stride_token
            key = _columns(cache_ptr, place, latent, kept, C, C_PAD).to(q_latent.dtype)
            key_rope = _columns(cache_ptr + C, place, rope, kept, R, R_PAD).to(q_rope.dtype)
            s = tl.dot(q_latent, tl.trans(key), input_precision=PRECISION)
            s = tl.dot(q_rope, tl.trans(key_rope), s, input_precision=PRECISION) * (scale * _LOG2E)
            s = tl.where(kept[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(key.dtype), key, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        place = (row * heads + head) * cuts + first // cut_size
        mask = head_kept[:, None] & (latent < C)[None, :]
        tl.store(part_ptr + place[:, None] * C + latent[None, :], acc / total[:, None], mask=mask)
        tl.store(lse_ptr + place, m + tl.log2(total), mask=head_kept)


@triton.jit(do_not_specialize=["cuts"])
def _add_up(
    part_ptr, lse_ptr, context_ptr, out_ptr, heads, cuts,
    C: tl.constexpr, C_PAD: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The cuts of one query and head, in order; zeros for one without a context."""
    place = tl.program_id(0).to(tl.int64)
    latent = tl.arange(0, C_PAD)
    count = tl.cdiv(tl.maximum(tl.load(context_ptr + place // heads), 0), CUT)
    most = tl.full([], float("-inf"), tl.float32)
    for cut in range(count):
        most = tl.maximum(most, tl.load(lse_ptr + place * cuts + cut))
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([C_PAD], tl.float32)
    for cut in range(count):
        weight = tl.exp2(tl.load(lse_ptr + place * cuts + cut) - most)
        total += weight
        acc += weight * tl.load(part_ptr + (place * cuts + cut) * C + latent, mask=latent < C, other=0.0)
    out = acc / tl.where(count == 0, 1.0, total)
    tl.store(out_ptr + place * C + latent, out.to(out_ptr.dtype.element_ty), mask=latent < C)


def mla_by_row(q_latent_THC, q_rope_THr, cache_PBW, block_table_SP, sequence_T, context_T, *, scale):
    """See `benthic.kernels.ops.mla_by_row`; launches follow from shapes, so a CUDA graph can hold them."""
    q_latent_THC, q_rope_THr = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent_THC, q_rope_THr)
    )
    tokens, heads, latent = q_latent_THC.shape
    out_THC = torch.empty(q_latent_THC.shape, dtype=q_latent_THC.dtype, device=cache_PBW.device)
    cuts = cdiv(block_table_SP.shape[1] * cache_PBW.shape[1], CUT)
    if out_THC.numel() == 0:
        return out_THC
    rows = min(tokens, max(1, PART_BYTES // (4 * heads * cuts * latent)))
    lse = torch.empty(rows * heads * cuts, dtype=torch.float32, device=out_THC.device)
    part = torch.empty(lse.shape[0], latent, dtype=torch.float32, device=out_THC.device)
    for first in range(0, tokens, rows):
        some = slice(first, min(first + rows, tokens))
        queries = q_latent_THC[some], q_rope_THr[some]
        _some_rows(out_THC[some], *queries, cache_PBW, block_table_SP, sequence_T[some], context_T[some],
                   part, lse, cuts, scale)  # fmt: skip
    return out_THC


def _some_rows(out, q_latent, q_rope, cache, table, sequence_T, context_T, part, lse, cuts, scale):
    rows, heads, latent = q_latent.shape
    rope, latent_pad = q_rope.shape[2], next_power_of_2(max(latent, 16))
    block_h, block_n, warps, stages = tiles(q_latent.dtype, fp8_cache=cache.dtype == torch.float8_e4m3fn)
    programs = rows * cdiv(heads, block_h)
    shares = max(1, min(cuts, cdiv(_PROGRAMS * multiprocessors(out.device), programs)))
    _attend[(programs, shares)](
        q_latent, q_rope, cache, table, sequence_T, context_T, part, lse,
        *q_latent.stride()[:2], *q_rope.stride()[:2], *cache.stride()[:2], table.stride(0),
        heads, cuts, CUT, scale,
        C=latent, C_PAD=latent_pad, R=rope, R_PAD=next_power_of_2(max(rope, 16)), PAGE=cache.shape[1],
        BLOCK_H=block_h, BLOCK_N=block_n, PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _add_up[(rows * heads,)](
        part, lse, context_T, out, heads, cuts, C=latent, C_PAD=latent_pad, CUT=CUT, num_warps=2
    )


def tiles(dtype, *, fp8_cache=False):
    """`(block_h, block_n, warps, stages)`: whatever the batch. More heads a program spill registers.

    For the same reason the cut's size is no constant of the kernel: loops would be unrolled.
    """
    if dtype == torch.float32:
        return 16, 16, 4, 1
    return (16, 32, 8, 2) if fp8_cache else (16, 64, 8, 2)
