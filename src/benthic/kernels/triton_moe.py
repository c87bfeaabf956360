"""Triton kernels of the experts' product: forward, input gradient and weight gradient over sorted rows.

The number of rows of each expert stays on the device: every program finds its expert and its rows from the
running ends, so nothing waits for the host and a CUDA graph can hold the launch. The grid is the largest
number of tiles that any distribution of R rows over E experts can need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from benthic.kernels.grouped_mm import GroupedMm
from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.reference.moe import squares_of
from benthic.kernels.triton_tiles import find_tile, precision


@triton.jit(do_not_specialize=["rows"])
def _rows_times_experts(
    x_ptr, weight_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, stride_x, stride_e, stride_n, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k x[r, k] * weight[expert of r, n, k]; rows past the last end are zeros."""
    expert, start, end = find_tile(ends_ptr, tl.program_id(1), rows, experts, BLOCK_M, EXPERTS)
    if expert > experts:
        return
    row = start + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_kept, column_kept = row < end, column < n_dim
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if expert < experts:
        k = tl.arange(0, BLOCK_K)
        x_at = x_ptr + row.to(tl.int64)[:, None] * stride_x + k[None, :]
        weight_at = weight_ptr + expert.to(tl.int64) * stride_e
        weight_at += column[None, :] * stride_n + k[:, None] * stride_k
        for k_start in range(0, k_dim, BLOCK_K):
            k_kept = k < k_dim - k_start
            x = tl.load(x_at, mask=row_kept[:, None] & k_kept[None, :], other=0.0)
            weight = tl.load(weight_at, mask=k_kept[:, None] & column_kept[None, :], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
            x_at += BLOCK_K
            weight_at += BLOCK_K * stride_k
    out_at = out_ptr + row.to(tl.int64)[:, None] * n_dim + column[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_kept[:, None] & column_kept[None, :])


@triton.jit
def _expert_gradient(
    dy_ptr, x_ptr, dweight_ptr, ends_ptr,
    o_dim, i_dim, stride_dy, stride_x,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[e, o, i] = sum over the rows r of expert e of dy[r, o] * x[r, i], or with ADD: += that."""
    expert = tl.program_id(2)
    start = 0
    if expert > 0:
        start = tl.load(ends_ptr + expert - 1)
    end = tl.load(ends_ptr + expert)
    if ADD and start == end:
        return
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_kept, i_kept = o < o_dim, i < i_dim
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        kept = row < end
        row_at = row.to(tl.int64)
        dy = tl.load(
            dy_ptr + row_at[None, :] * stride_dy + o[:, None], mask=o_kept[:, None] & kept[None, :], other=0.0
        )
        x = tl.load(
            x_ptr + row_at[:, None] * stride_x + i[None, :], mask=kept[:, None] & i_kept[None, :], other=0.0
        )
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    base = dweight_ptr + expert.to(tl.int64) * o_dim * i_dim
    if ADD:
        # half after half: the sum's tile beside the whole accumulator takes too many registers
        halves = tl.permute(tl.reshape(acc, [BLOCK_O, 2, BLOCK_I // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I // 2)
        _add_tile(base, left, o, i, o_dim, i_dim)
        _add_tile(base, right, o, i + BLOCK_I // 2, o_dim, i_dim)
    else:
        at = base + o[:, None] * i_dim + i[None, :]
        tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=o_kept[:, None] & i_kept[None, :])


@triton.jit
def _add_tile(base, tile, o, i, o_dim, i_dim):
    at = base + o[:, None] * i_dim + i[None, :]
    mask = (o < o_dim)[:, None] & (i < i_dim)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + tile, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _zero_rows(out_ptr, ends_ptr, rows, width, experts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Zero the rows past the last end; programs before it read one number and stop."""
    end = tl.load(ends_ptr + experts - 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if (tl.program_id(0) + 1) * ROWS > end:
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            mask = ((row >= end) & (row < rows))[:, None] & (column < width)[None, :]
            zeros = tl.zeros([ROWS, WIDTH], out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * width + column[None, :], zeros, mask=mask)


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`."""
    return _Grouped.apply(x_RI, weight_EOI, ends_E)


def grouped_mm(x_RI, weight_EOI, ends_E):
    """The library's grouped product, with a kernel that clears the rows it leaves unwritten."""
    return GroupedMm.apply(x_RI, weight_EOI, ends_E, _library_product)


def _library_product(x_RK, weight_ENK, ends_E):
    return zero_tail(F.grouped_mm(x_RK, weight_ENK.transpose(1, 2), offs=ends_E), ends_E)


def zero_tail(rows_RD, ends_E):
    """Zero the rows past `ends[-1]` in place, without reading the others or waiting for the host."""
    rows, width = rows_RD.shape
    if rows:
        _zero_rows[(cdiv(rows, 32),)](rows_RD, ends_E, rows, width, ends_E.shape[0], ROWS=32, WIDTH=128)
    return rows_RD


class _Grouped(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, expert by expert."""

    @staticmethod
    def forward(ctx, x_RI, weight_EOI, ends_E):
        """Save the operands."""
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        return _multiply(x_RI, weight_EOI.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx, dy_RO):
        """Gradients of rows and weights."""
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        dx_RI = _multiply(dy_RO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        dweight_EOI = None
        if ctx.needs_input_grad[1]:
            dweight_EOI = grouped_weight_gradient(dy_RO, x_RI, ends_E, dtype=weight_EOI.dtype)
        return dx_RI, dweight_EOI, None


def _multiply(x_RK, weight_EKN, ends_E):
    """`out[r] = x[r] @ weight[expert of r]`, where the weight may be a transposed view."""
    if x_RK.stride(1) != 1:
        x_RK = x_RK.contiguous()
    rows, k_dim = x_RK.shape
    experts, _, n_dim = weight_EKN.shape
    out_RN = torch.empty(rows, n_dim, dtype=x_RK.dtype, device=x_RK.device)
    block_m, block_n, block_k, warps, stages = tiles(x_RK.dtype, rows // max(experts, 1))
    grid = (cdiv(n_dim, block_n), rows // block_m + experts + 1)
    if rows:
        _rows_times_experts[grid](
            x_RK, weight_EKN, out_RN, ends_E,
            rows, experts, n_dim, k_dim, x_RK.stride(0),
            weight_EKN.stride(0), weight_EKN.stride(2), weight_EKN.stride(1),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            EXPERTS=next_power_of_2(experts + 2), PRECISION=precision(x_RK.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_RN


def grouped_weight_gradient(dy_RO, x_RI, ends_E, *, dtype):
    """See `benthic.kernels.ops.weight_gradient`."""
    out = torch.empty(ends_E.shape[0], dy_RO.shape[1], x_RI.shape[1], dtype=dtype, device=x_RI.device)
    _experts_gradients(out, dy_RO, x_RI, ends_E, add=False)
    return out


def add_grouped_weight_gradient(into, dy_RO, x_RI, ends_E, *, fresh, squares=False):
    """See `benthic.kernels.ops.add_weight_gradient`."""
    _experts_gradients(into, dy_RO, x_RI, ends_E, add=not fresh)
    return squares_of(into) if squares else None


def _experts_gradients(out, dy_RO, x_RI, ends_E, *, add):
    dy_RO, x_RI = (x if x.stride(1) == 1 else x.contiguous() for x in (dy_RO, x_RI))
    experts, o_dim, i_dim = out.shape
    block_o, block_i, block_r, warps, stages = tiles(x_RI.dtype, o_dim)
    _expert_gradient[(cdiv(i_dim, block_i), cdiv(o_dim, block_o), experts)](
        dy_RO, x_RI, out, ends_E, o_dim, i_dim, dy_RO.stride(0), x_RI.stride(0), ADD=add,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=block_r, PRECISION=precision(x_RI.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def tiles(dtype, rows):
    """`(block_m, block_n, block_k, warps, stages)` for about `rows` rows a group.

    128 x 128 x 64 with 8 warps does not spill on sm_90; float32 has no tensor cores here and takes small
    tiles.
    """
    if dtype == torch.float32:
        return 32, 32, 32, 4, 2
    if rows <= 32:
        return 16, 128, 64, 4, 4
    if rows <= 96:
        return 64, 128, 64, 4, 4
    return 128, 128, 64, 8, 3
