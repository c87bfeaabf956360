"""Triton kernels of rotary embedding: queries alone, with their key, or with the latent's norm as well.

The last of them also writes keys and latents into the paged cache, if it is told where.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, row_tile
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import stored


@remembered
@triton.jit(do_not_specialize=["tokens", "queries"])
def _rotate(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    tokens, heads, half, stride_query, stride_head, stride_key, sign, queries,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first `queries` programs rotate queries, the others, if there are any, keys."""
    program = tl.program_id(0)
    if program < queries:
        _rotate_tile(
            query_ptr, cos_ptr, sin_ptr, query_out_ptr,
            program.to(tl.int64) * ROWS, tokens * heads, heads, half, stride_query, stride_head, sign,
            None, None, 0, 0, ROWS, HALF,
        )  # fmt: skip
    else:
        _rotate_tile(
            key_ptr, cos_ptr, sin_ptr, key_out_ptr,
            (program - queries).to(tl.int64) * ROWS, tokens, 1, half, stride_key, 0, sign,
            None, None, 0, 0, ROWS, HALF,
        )  # fmt: skip


@triton.jit
def _rotate_tile(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    first, rows, heads, half, stride_t, stride_h, sign,
    cache_ptr, slot_ptr, stride_slot, column_0,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """To `out`, to the slots of a cache from `column_0` on, or to both: either may be None."""
    row = first + tl.arange(0, ROWS)
    if cache_ptr is not None:
        slot = tl.load(slot_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    token, head = row // heads, row % heads
    column = tl.arange(0, HALF)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    angle = token[:, None] * half + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0) * sign
    place = (token * stride_t + head * stride_h)[:, None] + column[None, :]
    x_1 = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    y_1 = (x_1 * cos - x_2 * sin).to(x_ptr.dtype.element_ty)
    y_2 = (x_2 * cos + x_1 * sin).to(x_ptr.dtype.element_ty)
    if out_ptr is not None:
        place = row[:, None] * (2 * half) + column[None, :]
        tl.store(out_ptr + place, y_1, mask=mask)
        tl.store(out_ptr + place + half, y_2, mask=mask)
    if cache_ptr is not None:
        place = (slot * stride_slot + column_0)[:, None] + column[None, :]
        mask = mask & (slot >= 0)[:, None]
        tl.store(cache_ptr + place, stored(y_1, cache_ptr), mask=mask)
        tl.store(cache_ptr + place + half, stored(y_2, cache_ptr), mask=mask)


@triton.jit(do_not_specialize=["tokens", "norms", "queries"])
def _rotate_and_norm(
    query_ptr, key_ptr, latent_ptr, weight_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr, latent_out_ptr,
    cache_ptr, slot_ptr, stride_slot,
    tokens, heads, half, width, stride_query, stride_head, stride_key, stride_latent, eps, norms, queries,
    ROWS: tl.constexpr, HALF: tl.constexpr, NORM_ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first `norms` programs normalise latents, `queries` more rotate queries, the others keys.

    Tiles are those of kernels of their own, so the bits are too. With a cache, keys and latents are written
    to their slots, and to their outputs only where these are not None.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    if program < norms:
        row = program.to(tl.int64) * NORM_ROWS + tl.arange(0, NORM_ROWS)
        if cache_ptr is not None:
            slot = tl.load(slot_ptr + row, mask=row < tokens, other=-1).to(tl.int64)
        column = tl.arange(0, WIDTH)
        mask = (row < tokens)[:, None] & (column < width)[None, :]
        place = row[:, None] * stride_latent + column[None, :]
        x = tl.load(latent_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        out = (x * rstd[:, None] * weight[None, :]).to(latent_ptr.dtype.element_ty)
        if latent_out_ptr is not None:
            tl.store(latent_out_ptr + row[:, None] * width + column[None, :], out, mask=mask)
        if cache_ptr is not None:
            place = (slot * stride_slot)[:, None] + column[None, :]
            # As many columns a thread as it loads: with 16 of E4M3 the sum above would have another order.
            place = tl.max_contiguous(place, [1, 128 // latent_ptr.dtype.element_ty.primitive_bitwidth])
            tl.store(cache_ptr + place, stored(out, cache_ptr), mask=mask & (slot >= 0)[:, None])
    elif program < norms + queries:
        first = (program - norms).to(tl.int64) * ROWS
        _rotate_tile(
            query_ptr, cos_ptr, sin_ptr, query_out_ptr,
            first, tokens * heads, heads, half, stride_query, stride_head, 1.0, None, None, 0, 0, ROWS, HALF,
        )  # fmt: skip
    else:
        first = (program - norms - queries).to(tl.int64) * ROWS
        _rotate_tile(
            key_ptr, cos_ptr, sin_ptr, key_out_ptr,
            first, tokens, 1, half, stride_key, 0, 1.0, cache_ptr, slot_ptr, stride_slot, width, ROWS, HALF,
        )  # fmt: skip


def rope(x, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope`."""
    return _Rope.apply(x, None, cos_Tr2.contiguous(), sin_Tr2.contiguous())[0]


def rope_both(q_rope_THr, k_rope_Tr, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope_both`."""
    return _Rope.apply(q_rope_THr, k_rope_Tr, cos_Tr2.contiguous(), sin_Tr2.contiguous())


def rope_and_norm(q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2, into=None):
    """See `benthic.kernels.ops.rope_and_norm`, and `rope_norm_store` where `into` has slots."""
    query, key, latent = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_rope_THr, k_rope_Tr, latent_TC)
    )
    tokens, heads, rope_dim = query.shape
    returned = 0 if into is not None and into.alone else tokens
    outs = [
        torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device)
        for x, count in ((query, tokens), (key, returned), (latent, returned))
    ]
    pages = (None, None, 0) if into is None else (into.cache_PBW, into.slot_T, into.cache_PBW.stride(1))
    rows, half_padded, _ = row_tile(rope_dim // 2, 2048)
    norm_rows, padded, warps = row_tile(latent.shape[1], 4096)
    programs = [cdiv(*each) for each in ((tokens, norm_rows), (tokens * heads, rows), (tokens, rows))]
    if tokens:
        _rotate_and_norm[(sum(programs),)](
            query, key, latent, weight_C, cos_Tr2.contiguous(), sin_Tr2.contiguous(),
            *(x if len(x) else None for x in outs), *pages,
            tokens, heads, rope_dim // 2, latent.shape[1],
            query.stride(0), query.stride(1), key.stride(0), latent.stride(0), eps, *programs[:2],
            ROWS=rows, HALF=half_padded, NORM_ROWS=norm_rows, WIDTH=padded, num_warps=warps,
            **early(latent.device, tokens),
        )  # fmt: skip
    return tuple(outs)


class _Rope(torch.autograd.Function):
    """Rotations of queries and of a key, or of queries alone; gradients are rotated back."""

    @staticmethod
    def forward(ctx, query, key, cos_Tr2, sin_Tr2):
        """Save the angles."""
        ctx.save_for_backward(cos_Tr2, sin_Tr2)
        ctx.set_materialize_grads(False)
        return _rotated(query, key, cos_Tr2, sin_Tr2, sign=1.0)

    @staticmethod
    def backward(ctx, dquery, dkey):
        """Gradients of both."""
        if dquery is None:
            return None, _rotated(dkey, None, *ctx.saved_tensors, sign=-1.0)[0], None, None
        return *_rotated(dquery, dkey, *ctx.saved_tensors, sign=-1.0), None, None


def _rotated(query, key, cos_Tr2, sin_Tr2, *, sign):
    """Queries [T, H, r] or [T, r], and a key [T, r] or None."""
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key) if x is not None]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    query, other = given[0], given[-1]  # where there is no key, no program reads it
    tokens, half = query.shape[0], query.shape[-1] // 2
    heads, stride_head = (query.shape[1], query.stride(1)) if query.dim() == 3 else (1, 0)
    rows, padded, warps = row_tile(half, 2048)
    queries, keys = cdiv(tokens * heads, rows), 0 if key is None else cdiv(tokens, rows)
    if queries + keys:
        _rotate[(queries + keys,)](
            query, other, cos_Tr2, sin_Tr2, outs[0], outs[-1],
            tokens, heads, half, query.stride(0), stride_head, other.stride(0), sign, queries,
            ROWS=rows, HALF=padded, num_warps=warps,
        )  # fmt: skip
    return outs[0], None if key is None else outs[1]
