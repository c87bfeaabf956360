"""Triton kernels of rotary embedding: queries alone, with their key, or with the latent's norm as well."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, row_tile
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered


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
            ROWS, HALF,
        )  # fmt: skip
    else:
        _rotate_tile(
            key_ptr, cos_ptr, sin_ptr, key_out_ptr,
            (program - queries).to(tl.int64) * ROWS, tokens, 1, half, stride_key, 0, sign, ROWS, HALF,
        )  # fmt: skip


@triton.jit
def _rotate_tile(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    first, rows, heads, half, stride_t, stride_h, sign,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    column = tl.arange(0, HALF)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    angle = token[:, None] * half + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0) * sign
    place = (token * stride_t + head * stride_h)[:, None] + column[None, :]
    x_1 = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * (2 * half) + column[None, :]
    tl.store(out_ptr + place, (x_1 * cos - x_2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + place + half, (x_2 * cos + x_1 * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "norms", "queries"])
def _rotate_and_norm(
    query_ptr, key_ptr, latent_ptr, weight_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr, latent_out_ptr,
    tokens, heads, half, width, stride_query, stride_head, stride_key, stride_latent, eps, norms, queries,
    ROWS: tl.constexpr, HALF: tl.constexpr, NORM_ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first `norms` programs normalise latents, `queries` more rotate queries, the others keys.

    Tiles are those of kernels of their own, so the bits are too.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    if program < norms:
        row = program.to(tl.int64) * NORM_ROWS + tl.arange(0, NORM_ROWS)
        column = tl.arange(0, WIDTH)
        mask = (row < tokens)[:, None] & (column < width)[None, :]
        place = row[:, None] * stride_latent + column[None, :]
        x = tl.load(latent_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        out = (x * rstd[:, None] * weight[None, :]).to(latent_out_ptr.dtype.element_ty)
        tl.store(latent_out_ptr + row[:, None] * width + column[None, :], out, mask=mask)
    elif program < norms + queries:
        first = (program - norms).to(tl.int64) * ROWS
        _rotate_tile(
            query_ptr, cos_ptr, sin_ptr, query_out_ptr,
            first, tokens * heads, heads, half, stride_query, stride_head, 1.0, ROWS, HALF,
        )  # fmt: skip
    else:
        first = (program - norms - queries).to(tl.int64) * ROWS
        _rotate_tile(
            key_ptr, cos_ptr, sin_ptr, key_out_ptr,
            first, tokens, 1, half, stride_key, 0, 1.0, ROWS, HALF,
        )  # fmt: skip


def rope(x, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope`."""
    return _Rope.apply(x, None, cos_Tr2.contiguous(), sin_Tr2.contiguous())[0]


def rope_both(q_rope_THr, k_rope_Tr, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope_both`."""
    return _Rope.apply(q_rope_THr, k_rope_Tr, cos_Tr2.contiguous(), sin_Tr2.contiguous())


def rope_and_norm(q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope_and_norm`."""
    query, key, latent = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_rope_THr, k_rope_Tr, latent_TC)
    )
    tokens, heads, rope_dim = query.shape
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, latent)]
    rows, half_padded, _ = row_tile(rope_dim // 2, 2048)
    norm_rows, padded, warps = row_tile(latent.shape[1], 4096)
    programs = [cdiv(*each) for each in ((tokens, norm_rows), (tokens * heads, rows), (tokens, rows))]
    if tokens:
        _rotate_and_norm[(sum(programs),)](
            query, key, latent, weight_C, cos_Tr2.contiguous(), sin_Tr2.contiguous(), *outs,
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
