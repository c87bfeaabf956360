"""Triton kernels of the row-wise ops: RMSNorm with an optional residual, SwiGLU.

All are bound by memory: each reads its inputs once, computes in float32 and writes its outputs once. A
program takes a tile of whole rows (norms) or of rows and columns (SwiGLU).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2, row_tile
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
def _weighted_swiglu_backward(
    gate_up_ptr, dy_ptr, row_weight_ptr, dgate_up_ptr, dweight_ptr,
    rows, width, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Whole rows, in parts of `WIDTH` columns: weights of rows come last, so that 1 leaves the plain bits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(row_weight_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * stride + column[None, :]
        gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)) * weight
        dup = dy * gate * sigmoid
        products += dup * up
        dup *= weight
        place = row[:, None] * (2 * width) + column[None, :]
        tl.store(dgate_up_ptr + place, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_up_ptr + place + width, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + row, tl.sum(products, axis=1), mask=row < rows)


def rms_norm(x, weight_D, eps):
    """See `benthic.kernels.ops.rms_norm`."""
    return _Norm.apply(x, None, weight_D, eps, False)[0]


def add_rms_norm(x, residual, weight_D, eps):
    """See `benthic.kernels.ops.add_rms_norm`."""
    return _Norm.apply(x, residual, weight_D, eps, True)


def swiglu(gate_up):
    """See `benthic.kernels.ops.swiglu`."""
    return _SwiGlu.apply(gate_up)


def swiglu_gradient(gate_up, dy):
    """See `benthic.kernels.ops.swiglu_gradient`."""
    rows_RF2, dy = as_rows(gate_up), dy.contiguous()
    rows, width = rows_RF2.shape[0], gate_up.shape[-1] // 2
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid, block, padded = _swiglu_tiles(rows, width)
        _swiglu_backward[grid](
            rows_RF2, dy, out, rows, width, rows_RF2.stride(0), ROWS=block, WIDTH=padded, num_warps=4
        )
    return out


def weighted_swiglu_gradient(gate_up_RF2, dy_RF, weight_R):
    """See `benthic.kernels.ops.weighted_swiglu_gradient`."""
    gate_up_RF2, dy_RF, weight_R = as_rows(gate_up_RF2), dy_RF.contiguous(), weight_R.contiguous()
    rows, width = dy_RF.shape
    out_RF2 = torch.empty(rows, 2 * width, dtype=gate_up_RF2.dtype, device=dy_RF.device)
    dweight_R = torch.empty(rows, dtype=torch.float32, device=dy_RF.device)
    if rows:
        block, padded = weighted_tile(width)
        _weighted_swiglu_backward[(cdiv(rows, block),)](
            gate_up_RF2, dy_RF, weight_R, out_RF2, dweight_R, rows, width, gate_up_RF2.stride(0),
            ROWS=block, WIDTH=padded, num_warps=4,
        )  # fmt: skip
    return out_RF2, dweight_R


def weighted_tile(width):
    """Rows of a program, and how many of their columns it computes at once."""
    padded = min(2048, next_power_of_2(width))
    return max(1, 2048 // padded), padded


def as_rows(x):
    """View x as `[rows, width]` with unit stride along a row, copying only when no such view exists."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def backward_tile(width, itemsize):
    """`(rows, padded width, warps, stages)` of the norm's backward; `itemsize` is of all that is loaded."""
    rows, padded, _ = row_tile(width, 2048)
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
        block, padded, warps = row_tile(width, 4096)
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
        return swiglu_gradient(*ctx.saved_tensors, dy)


def _swiglu_tiles(rows, width):
    padded = min(1024, next_power_of_2(width))
    block = max(1, 2048 // padded)
    return (cdiv(rows, block), cdiv(width, padded)), block, padded
