"""Triton kernels of the row-wise ops: RMSNorm with an optional residual, SwiGLU, rotary embedding.

All are bound by memory: each reads its inputs once, computes in float32 and writes its outputs once. A
program takes a tile of whole rows (norms) or of rows and columns (SwiGLU).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered

# The norm's backward fills a multiprocessor's registers with 16 warps, and one of Hopper's 132 has 57 to 86
# KB of rows of 7,168 on their way: bandwidth times latency is 40. Each program sums its rows' weight
# gradients, so their count fixes the order of that sum: a constant keeps it the same on every device.
_WARPS = 16 * 132
_STAGED_BYTES = 96 << 10
_STAGES = 3


@remembered
@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, rstd_ptr,
    rows, width, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        # The norm is that of the sum as it is stored, so round first.
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * width + column[None, :], total, mask=mask)
        x = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    out = x * rstd[:, None] * weight[None, :]
    tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dtotal_ptr, dx_ptr, dweight_ptr,
    rows, width, x_stride,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """While a tile is summed, the `STAGES - 1` tiles after it are on their way to shared memory."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x_hat = x * rstd[:, None]
        weighted = dy * weight[None, :]
        mean = tl.sum(weighted * x_hat, axis=1) / width
        dx = (weighted - x_hat * mean[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * x_hat
    tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)


@remembered
@triton.jit(do_not_specialize=["parts"])
def _sum_columns(part_ptr, sum_ptr, parts, width, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([PARTS, WIDTH], tl.float32)
    for first in tl.range(0, parts, PARTS, num_stages=3):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < width)[None, :]
        total += tl.load(part_ptr + part[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty), mask=column < width)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _swiglu_forward(
    gate_up_ptr, out_ptr, rows, width, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * stride + column[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(
    gate_up_ptr, dy_ptr, dgate_up_ptr, rows, width, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * stride + column[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    place = row[:, None] * (2 * width) + column[None, :]
    tl.store(dgate_up_ptr + place, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_up_ptr + place + width, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    rows, heads, half, stride_t, stride_h, sign,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    _rotate_tile(
        x_ptr, cos_ptr, sin_ptr, out_ptr, first, rows, heads, half, stride_t, stride_h, sign, ROWS, HALF
    )


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


def rms_norm(x, weight_D, eps):
    """See `benthic.kernels.ops.rms_norm`."""
    return _Norm.apply(x, None, weight_D, eps, False)[0]


def add_rms_norm(x, residual, weight_D, eps):
    """See `benthic.kernels.ops.add_rms_norm`."""
    return _Norm.apply(x, residual, weight_D, eps, True)


def swiglu(gate_up):
    """See `benthic.kernels.ops.swiglu`."""
    return _SwiGlu.apply(gate_up)


def rope(x, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope`."""
    return _Rope.apply(x, cos_Tr2.contiguous(), sin_Tr2.contiguous())


def rope_and_norm(q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2):
    """See `benthic.kernels.ops.rope_and_norm`."""
    query, key, latent = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_rope_THr, k_rope_Tr, latent_TC)
    )
    tokens, heads, rope_dim = query.shape
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, latent)]
    rows, half_padded, _ = tile(rope_dim // 2, 2048)
    norm_rows, padded, warps = tile(latent.shape[1], 4096)
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


def as_rows(x):
    """View x as `[rows, width]` with unit stride along a row, copying only when no such view exists."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tile(width, elements):
    """`(rows, padded width, warps)` of a tile of about `elements` elements that holds whole rows."""
    padded = next_power_of_2(width)
    rows = max(1, elements // padded)
    return rows, padded, min(16, max(4, rows * padded // 1024))


def backward_tile(width, itemsize):
    """`(rows, padded width, warps, stages)` of the norm's backward; `itemsize` is of all that is loaded."""
    rows, padded, _ = tile(width, 2048)
    stages = 1 + _STAGED_BYTES // (rows * padded * itemsize)
    return rows, padded, min(16, max(4, padded // 512)), min(_STAGES, stages)


def _column_sums(parts_PD, like_D):
    """Of float32 parts, in the dtype of `like_D`; always in one order."""
    parts, width = parts_PD.shape
    sums_D = torch.empty_like(like_D, memory_format=torch.contiguous_format)
    _sum_columns[(cdiv(width, 16),)](parts_PD, sums_D, parts, width, PARTS=128, WIDTH=16, num_warps=4)
    return sums_D


class _Norm(torch.autograd.Function):
    """RMSNorm of x, or of x + residual; the second output, if asked for, is what was normalised."""

    @staticmethod
    def forward(ctx, x, residual, weight_D, eps, both):
        """Save the normalised rows' input and reciprocal root mean squares."""
        rows_RD, width = as_rows(x), x.shape[-1]
        rows = rows_RD.shape[0]
        other = rows_RD if residual is None else as_rows(residual)
        out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        total = rows_RD if residual is None else torch.empty_like(out)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        block, padded, warps = tile(width, 4096)
        if rows:
            _norm_forward[(cdiv(rows, block),)](
                rows_RD, other, weight_D, out, total, rstd,
                rows, width, rows_RD.stride(0), other.stride(0), eps,
                HAS_RESIDUAL=residual is not None, ROWS=block, WIDTH=padded, num_warps=warps,
                **early(x.device, rows),
            )  # fmt: skip
        ctx.save_for_backward(total, weight_D, rstd)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        shaped = out if x.dim() == 2 else out.view(x.shape)
        if residual is None:
            return shaped, x if both else None
        return shaped, total if x.dim() == 2 else total.view(x.shape)

    @staticmethod
    def backward(ctx, dy, dtotal):
        """Gradients of x, of the residual (the same) and of the weight."""
        total, weight_D, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, (dtotal if ctx.has_residual else None), None, None, None
        rows, width = total.shape
        dy = dy.contiguous()
        has_dtotal = dtotal is not None
        dtotal = dtotal.contiguous() if has_dtotal else dy
        dx = torch.empty_like(dy)
        block, padded, warps, stages = backward_tile(width, dy.element_size() * (2 + has_dtotal))
        programs = min(_WARPS // warps, cdiv(rows, block))
        partial = torch.empty(programs, width, dtype=torch.float32, device=dy.device)
        if rows:
            _norm_backward[(programs,)](
                total, weight_D, rstd, dy, dtotal, dx, partial,
                rows, width, total.stride(0),
                HAS_DTOTAL=has_dtotal, ROWS=block, WIDTH=padded, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        dweight_D = _column_sums(partial, weight_D)
        return dx, (dx if ctx.has_residual else None), dweight_D, None, None


class _SwiGlu(torch.autograd.Function):
    """Gated unit of two halves; the input alone is saved."""

    @staticmethod
    def forward(ctx, gate_up):
        """Save the input."""
        ctx.save_for_backward(gate_up)
        rows_RF2 = as_rows(gate_up)
        rows, width = rows_RF2.shape[0], gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            grid, block, padded = _swiglu_tiles(rows, width)
            _swiglu_forward[grid](
                rows_RF2, out, rows, width, rows_RF2.stride(0), ROWS=block, WIDTH=padded, num_warps=4,
                **early(out.device, rows),
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, dy):
        """Gradient of both halves."""
        (gate_up,) = ctx.saved_tensors
        rows_RF2, dy = as_rows(gate_up), dy.contiguous()
        rows, width = rows_RF2.shape[0], gate_up.shape[-1] // 2
        out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            grid, block, padded = _swiglu_tiles(rows, width)
            _swiglu_backward[grid](
                rows_RF2, dy, out, rows, width, rows_RF2.stride(0), ROWS=block, WIDTH=padded, num_warps=4
            )
        return out


def _swiglu_tiles(rows, width):
    padded = min(1024, next_power_of_2(width))
    block = max(1, 2048 // padded)
    return (cdiv(rows, block), cdiv(width, padded)), block, padded


class _Rope(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos_Tr2, sin_Tr2):
        """Save the angles."""
        ctx.save_for_backward(cos_Tr2, sin_Tr2)
        return _rotated(x, cos_Tr2, sin_Tr2, sign=1.0)

    @staticmethod
    def backward(ctx, dy):
        """Gradient of x."""
        return _rotated(dy, *ctx.saved_tensors, sign=-1.0), None, None


def _rotated(x, cos_Tr2, sin_Tr2, *, sign):
    if x.stride(-1) != 1:
        x = x.contiguous()
    heads = x.shape[1] if x.dim() == 3 else 1
    rows, half = x.shape[0] * heads, x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, padded, warps = tile(half, 2048)
    if rows:
        _rotate[(cdiv(rows, block),)](
            x, cos_Tr2, sin_Tr2, out,
            rows, heads, half, x.stride(0), x.stride(1) if x.dim() == 3 else 0, sign,
            ROWS=block, HALF=padded, num_warps=warps,
        )  # fmt: skip
    return out
