# mypy: disable-error-code="assignment"
"""Triton kernels that move rows to experts and back without atomics, so results are deterministic.

One program a row (or a token); a row is read and written in one go, so all of them are bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import FEW_ROWS, early, wait_for_inputs
from benthic.kernels.reference.moe import Permuted, RowMaps, followed
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_counting_sort import sort_copies
from benthic.kernels.triton_e4m3 import empty_tiles
from benthic.kernels.triton_tiles import unit_stride


@remembered
@triton.jit
def _spread_rows(x_ptr, row_ptr, out_ptr, width, stride, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """rows[row[t, k]] = x[t]: a token is read once, where reading by copies reads it TOP_K times."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + token * stride + column, mask=column < width)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        tl.store(out_ptr + row * width + column, x, mask=column < width)


@remembered
@triton.jit
def _spread_tiles(
    values_ptr, scale_ptr, row_ptr, out_values_ptr, out_scale_ptr,
    width, stride, tiles, scale_stride, tile_stride, out_tile_stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The same for row tiles: values as bytes, and their scales; a negative row is skipped."""
    token = tl.program_id(0).to(tl.int64)
    column, tile = tl.arange(0, WIDTH), tl.arange(0, TILES)
    values = tl.load(values_ptr + token * stride + column, mask=column < width)
    scale = tl.load(scale_ptr + token * scale_stride + tile * tile_stride, mask=tile < tiles)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        tl.store(out_values_ptr + row * width + column, values, mask=column < tl.where(row >= 0, width, 0))
        at = row + tile.to(tl.int64) * out_tile_stride
        tl.store(out_scale_ptr + at, scale, mask=tile < tl.where(row >= 0, tiles, 0))


@remembered
@triton.jit
def _gather_copies(
    x_ptr, copy_ptr, ends_ptr, out_ptr, width, stride, last,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """rows[r] = x[token of r] for rows before the last expert's end."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(ends_ptr + last):
        token = tl.load(copy_ptr + row) // TOP_K
        column = tl.arange(0, WIDTH)
        x = tl.load(x_ptr + token * stride + column, mask=column < width)
        tl.store(out_ptr + row * width + column, x, mask=column < width)


@remembered
@triton.jit
def _sum_rows(
    rows_ptr, weight_ptr, row_ptr, out_ptr, beside1_ptr, beside2_ptr, width, stride,
    WEIGHTED: tl.constexpr, BESIDE: tl.constexpr, TOP_K: tl.constexpr, FEW: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order, of weight[t, k] * rows[row[t, k]], added to BESIDE tensors.

    A program takes some columns of a token. With `FEW` it looks for the rows that are there; else it asks for
    all at once.
    """
    wait_for_inputs(PDL)
    parts = tl.cdiv(width, WIDTH)
    token = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * WIDTH + tl.arange(0, WIDTH)
    at, kept = token * width + column, column < width
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    sources = rows_ptr, weight_ptr, row_ptr, token, column, width, stride
    if FEW:
        acc = sum_of_few_rows(*sources, WEIGHTED, TOP_K, WIDTH)
    else:
        acc = sum_of_rows(*sources, WEIGHTED, TOP_K, WIDTH)
    tl.store(out_ptr + at, _home(acc, beside1_ptr, beside2_ptr, at, kept, dtype, BESIDE), mask=kept)


@remembered
@triton.jit
def _sum_and_norm(
    rows_ptr, weight_ptr, row_ptr, norm_ptr, normed_ptr, out_ptr, beside1_ptr, beside2_ptr,
    width, stride, eps,
    BESIDE: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All columns of a token, as `_sum_rows`, and their norm; its weight is there before the rows are."""
    column = tl.arange(0, WIDTH)
    kept = column < width
    norm = tl.load(norm_ptr + column, mask=kept, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    acc = sum_of_rows(rows_ptr, weight_ptr, row_ptr, token, column, width, stride, True, TOP_K, WIDTH)
    at = token * width + column
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = _home(acc, beside1_ptr, beside2_ptr, at, kept, dtype, BESIDE)
    tl.store(out_ptr + at, out, mask=kept)
    x = tl.where(kept, out.to(tl.float32), 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(normed_ptr + at, (x * rstd * norm).to(dtype), mask=kept)


@triton.jit
def _home(acc, beside1_ptr, beside2_ptr, at, kept, dtype: tl.constexpr, BESIDE: tl.constexpr):
    """A sum of rows added to BESIDE tensors; every sum is rounded, as by kernels of their own."""
    if BESIDE > 0:
        beside = tl.load(beside1_ptr + at, mask=kept, other=0.0).to(tl.float32)
        if BESIDE > 1:
            beside += tl.load(beside2_ptr + at, mask=kept, other=0.0).to(tl.float32)
            beside = beside.to(dtype).to(tl.float32)
        acc = beside + acc.to(dtype).to(tl.float32)
    return acc.to(dtype)


@triton.jit
def sum_of_rows(
    rows_ptr, weight_ptr, row_ptr, token, column, width, stride,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The float32 sum of one token, in the order of k; a negative row is skipped."""
    acc = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        kept = column < tl.where(row >= 0, width, 0)
        value = tl.load(rows_ptr + row * stride + column, mask=kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
        acc += value
    return acc


@triton.jit
def sum_of_few_rows(
    rows_ptr, weight_ptr, row_ptr, token, column, width, stride,
    WEIGHTED: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As `sum_of_rows`, and the same bits: rows that are there are read in pairs, the others cost nothing."""
    acc = tl.zeros([WIDTH], tl.float32)
    row_ptr += token * TOP_K
    weight_ptr += token * TOP_K
    place, count = _places(row_ptr, TOP_K)
    for j in range(0, count, 2):
        k_0, k_1 = _copy_at(place, j), _copy_at(place, j + 1)
        row_0, row_1 = tl.load(row_ptr + k_0), tl.load(row_ptr + k_1)
        kept = column < tl.where(j + 1 < count, width, 0)
        value_0 = tl.load(rows_ptr + row_0 * stride + column, mask=column < width, other=0.0).to(tl.float32)
        value_1 = tl.load(rows_ptr + row_1 * stride + column, mask=kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            value_0 *= tl.load(weight_ptr + k_0).to(tl.float32)
            value_1 *= tl.load(weight_ptr + k_1).to(tl.float32)
        acc += value_0
        acc += value_1
    return acc


@triton.jit
def _places(row_ptr, TOP_K: tl.constexpr):
    """Where each copy of a token stands among those that have a row (-1: it has none), and how many have."""
    k = tl.arange(0, triton.next_power_of_2(TOP_K))
    here = tl.load(row_ptr + k, mask=k < TOP_K, other=-1) >= 0
    before = tl.cumsum(here.to(tl.int32), axis=0)
    return tl.where(here, before - 1, -1), tl.max(before, axis=0)


@triton.jit
def _copy_at(place, j):
    """The copy that stands at place j; 0 if none does."""
    return tl.sum(tl.where(place == j, tl.arange(0, place.shape[0]), 0), axis=0)


@remembered
@triton.jit
def _sum_rows_backward(
    rows_ptr, weight_ptr, row_ptr, dout_ptr, drows_ptr, dweight_ptr, width, stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """drows[row[t, k]] = weight[t, k] * dout[t]; dweight[t, k] = dout[t] . rows[row[t, k]]. Each row once.

    Only rows that are there take a turn; the gradient of another's weight is 0.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    row_ptr += token * TOP_K
    weight_ptr += token * TOP_K
    dweight_ptr += token * TOP_K
    dout = tl.load(dout_ptr + token * width + column, mask=column < width, other=0.0).to(tl.float32)
    place, count = _places(row_ptr, TOP_K)
    k = tl.arange(0, place.shape[0])
    tl.store(dweight_ptr + k, tl.zeros_like(k).to(tl.float32), mask=(place < 0) & (k < TOP_K))
    for j in range(count):
        own = _copy_at(place, j)
        row, weight = tl.load(row_ptr + own), tl.load(weight_ptr + own).to(tl.float32)
        value = tl.load(rows_ptr + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        drow = (weight * dout).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + row * width + column, drow, mask=column < width)
        tl.store(dweight_ptr + own, tl.sum(dout * value, axis=0))


def permute(x_TD, expert_TK, num_experts, slot_T=None):
    """See `benthic.kernels.ops.permute`."""
    ends_E, maps = row_maps(followed(expert_TK, slot_T), num_experts)
    return Permuted(_Gather.apply(x_TD, maps.row_TK), ends_E, maps)


def spread_tiles(tiles, row_AK, rows):
    """See `benthic.kernels.ops.spread_fp8`."""
    values, scale = unit_stride(tiles.values), tiles.scale
    (tokens, top_k), width = row_AK.shape, values.shape[1]
    out = empty_tiles(rows, width, values.device)
    if tokens and width:
        padded = next_power_of_2(width)
        _spread_tiles[(tokens,)](
            values.view(torch.uint8), scale, row_AK.contiguous(), out.values.view(torch.uint8), out.scale,
            width, values.stride(0), scale.shape[1], *scale.stride(), out.scale.stride(1),
            TOP_K=top_k, WIDTH=padded, TILES=next_power_of_2(scale.shape[1]),
            num_warps=_warps(padded),
        )  # fmt: skip
    return out


def row_maps(expert_TK, num_experts):
    """See `benthic.kernels.reference.moe.row_maps`: a counting sort, stable, without atomics."""
    ends_E, row_TK, copy_R = sort_copies(expert_TK.to(torch.int32), first=0, experts=num_experts)
    return ends_E, RowMaps(row_TK, copy_R)


def unpermute(rows_RD, maps, weight_TK, beside=()):
    """See `benthic.kernels.ops.unpermute`."""
    return _WeightedSum.apply(rows_RD, weight_TK, maps.row_TK, *beside)


def unpermute_norm(rows_RD, maps, weight_TK, beside, norm_D, eps):
    """See `benthic.kernels.ops.unpermute_norm`."""
    rows_RD, row_TK = unit_stride(rows_RD), maps.row_TK.contiguous()
    (tokens, top_k), width = row_TK.shape, rows_RD.shape[1]
    normed_TD, out_TD = (
        torch.empty(tokens, width, dtype=rows_RD.dtype, device=rows_RD.device) for _ in range(2)
    )
    padded, beside = next_power_of_2(width), [each.contiguous() for each in beside]
    if tokens:
        _sum_and_norm[(tokens,)](
            rows_RD, weight_TK.contiguous(), row_TK, norm_D.contiguous(), normed_TD, out_TD,
            *beside, *[out_TD] * (2 - len(beside)), width, rows_RD.stride(0), eps,
            BESIDE=len(beside), TOP_K=top_k, WIDTH=padded, num_warps=min(16, max(1, padded // 128)),
            **early(out_TD.device, tokens),
        )  # fmt: skip
    return normed_TD, out_TD


def gather_copies(x_AD, copy_R, ends_E, top_k):
    """See `benthic.kernels.ops.gather_copies`."""
    x_AD = unit_stride(x_AD)
    rows, width = copy_R.shape[0], x_AD.shape[1]
    out = torch.empty(rows, width, dtype=x_AD.dtype, device=x_AD.device)
    if out.numel():
        padded = next_power_of_2(width)
        _gather_copies[(rows,)](
            x_AD, copy_R, ends_E, out, width, x_AD.stride(0), ends_E.shape[0] - 1,
            TOP_K=top_k, WIDTH=padded, num_warps=_warps(padded), **early(out.device, rows),
        )  # fmt: skip
    return out


def sum_copies(rows_RD, row_AK, weight_AK):
    """See `benthic.kernels.ops.sum_copies`."""
    return _summed(unit_stride(rows_RD), weight_AK, row_AK, few=row_AK.shape[0] > FEW_ROWS)


def sum_copies_backward(dout_AD, rows_RD, row_AK, weight_AK):
    """See `benthic.kernels.ops.sum_copies_backward`."""
    rows_RD = unit_stride(rows_RD)
    width, padded = rows_RD.shape[1], next_power_of_2(rows_RD.shape[1])
    drows = torch.empty(rows_RD.shape, dtype=rows_RD.dtype, device=rows_RD.device)
    dweight = torch.empty(weight_AK.shape, dtype=weight_AK.dtype, device=rows_RD.device)
    if dweight.numel():
        _sum_rows_backward[(row_AK.shape[0],)](
            rows_RD, weight_AK, row_AK, dout_AD.contiguous(), drows, dweight, width, rows_RD.stride(0),
            TOP_K=row_AK.shape[1], WIDTH=padded, num_warps=_warps(padded),
        )  # fmt: skip
    return drows, dweight


def _warps(padded):
    return min(16, max(1, padded // 512))


class _Gather(torch.autograd.Function):
    """rows[r] = x[token of r]; dx[t] = sum over k of drows[row[t, k]]."""

    @staticmethod
    def forward(ctx, x_TD, row_TK):
        """Save where the copies went."""
        ctx.save_for_backward(row_TK)
        x_TD = unit_stride(x_TD)
        width, padded = x_TD.shape[1], next_power_of_2(x_TD.shape[1])
        out = torch.empty(row_TK.numel(), width, dtype=x_TD.dtype, device=x_TD.device)
        if out.numel():
            _spread_rows[(row_TK.shape[0],)](
                x_TD, row_TK, out, width, x_TD.stride(0),
                TOP_K=row_TK.shape[1], WIDTH=padded, num_warps=_warps(padded),
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, drows_RD):
        """Sum the gradients of a token's copies."""
        (row_TK,) = ctx.saved_tensors
        return _summed(unit_stride(drows_RD), None, row_TK), None


def _summed(rows_RD, weight_TK, row_TK, beside=(), *, few=False):
    (tokens, top_k), width = row_TK.shape, rows_RD.shape[1]
    out = torch.empty(tokens, width, dtype=rows_RD.dtype, device=rows_RD.device)
    part = min(1024, next_power_of_2(width))
    if out.numel():
        _sum_rows[(tokens * cdiv(width, part),)](
            rows_RD, row_TK if weight_TK is None else weight_TK, row_TK, out,
            *beside, *[out] * (2 - len(beside)), width, rows_RD.stride(0),
            WEIGHTED=weight_TK is not None, BESIDE=len(beside), TOP_K=top_k, FEW=few,
            WIDTH=part, num_warps=_warps(part), **early(out.device, tokens),
        )  # fmt: skip
    return out


class _WeightedSum(torch.autograd.Function):
    """out[t] = beside[t] + sum over k of weight[t, k] * rows[row[t, k]]."""

    @staticmethod
    def forward(ctx, rows_RD, weight_TK, row_TK, *beside):
        """Save rows and weights."""
        rows_RD, weight_TK, row_TK = unit_stride(rows_RD), weight_TK.contiguous(), row_TK.contiguous()
        ctx.save_for_backward(rows_RD, weight_TK, row_TK)
        ctx.beside = len(beside)
        return _summed(rows_RD, weight_TK, row_TK, [each.contiguous() for each in beside])

    @staticmethod
    def backward(ctx, dout_TD):
        """Gradients of rows and weights, in one pass."""
        rows_RD, weight_TK, row_TK = ctx.saved_tensors
        return *sum_copies_backward(dout_TD, rows_RD, row_TK, weight_TK), None, *[dout_TD] * ctx.beside
