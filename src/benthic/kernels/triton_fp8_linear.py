# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels of FP8 products: E4M3 tiles multiplied 128 of K at a time, scaled and added in float32.

`tl.dot` of FP8 does not promote partial sums by itself, so every chunk starts a new accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.reference.fp8_linear import TILE, by_column
from benthic.kernels.reference.moe import squares_of
from benthic.kernels.table import triton_interprets
from benthic.kernels.triton_tiles import find_tile, groups, product_of_chunk


@triton.jit(do_not_specialize=["rows"])
def _rows_times_blocks(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, k_tiles, n_tiles, x_scale_stride, x_tile_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum over chunks of K of (x[r, :] . weight[expert of r, n, :]) * their two scales."""
    expert, start, end = find_tile(ends_ptr, tl.program_id(1), rows, experts, BLOCK_M, EXPERTS)
    if expert > experts:
        return
    row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_kept, column_kept = row < end, column < n_dim
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if expert < experts:
        k = tl.arange(0, BLOCK_K)
        own = expert.to(tl.int64)
        x_at = x_ptr + row[:, None] * k_dim + k[None, :]
        weight_at = weight_ptr + (own * n_dim + column.to(tl.int64))[None, :] * k_dim + k[:, None]
        x_scale_at = x_scale_ptr + row * x_scale_stride
        weight_scale_at = weight_scale_ptr + (own * n_tiles + column // BLOCK_K) * k_tiles
        for chunk in range(k_tiles):
            k_kept = k < k_dim - chunk * BLOCK_K
            x = tl.load(x_at, mask=row_kept[:, None] & k_kept[None, :], other=0.0)
            weight = tl.load(weight_at, mask=k_kept[:, None] & column_kept[None, :], other=0.0)
            x_scale = tl.load(x_scale_at, mask=row_kept, other=0.0)
            weight_scale = tl.load(weight_scale_at + chunk, mask=column_kept, other=0.0)
            acc += product_of_chunk(x, weight, EMULATE) * x_scale[:, None] * weight_scale[None, :]
            x_at += BLOCK_K
            x_scale_at += x_tile_stride
            weight_at += BLOCK_K
    out_at = out_ptr + row[:, None] * n_dim + column[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_kept[:, None] & column_kept[None, :])


@triton.jit
def _tiles_of(ends_ptr, expert, experts, BLOCK_P: tl.constexpr, EXPERTS: tl.constexpr):
    """First tile and number of tiles of an expert's padded rows."""
    index = tl.arange(0, EXPERTS)
    end = tl.load(ends_ptr + index, mask=index < experts, other=0)
    start = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index < experts), other=0)
    tiles = tl.where(index < experts, (end - start + BLOCK_P - 1) // BLOCK_P, 0)
    return tl.sum(tl.where(index < expert, tiles, 0), axis=0), tl.sum(
        tl.where(index == expert, tiles, 0), axis=0
    )


@triton.jit
def _column_tiles(
    dy_ptr, dy_scale_ptr, x_ptr, x_scale_ptr, dweight_ptr, ends_ptr,
    experts, o_dim, i_dim, padded_dim, tiles,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
    EXPERTS: tl.constexpr, ADD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dweight[e, o, i] = sum over the tiles of expert e of (dy[o, :] . x[i, :]) * their two scales.

    With `ADD` that is added to what dweight holds.
    """
    expert = tl.program_id(2)
    first, count = 0, tiles
    if EXPERTS > 0:
        first, count = _tiles_of(ends_ptr, expert, experts, BLOCK_P, EXPERTS)
    o_first, i_first = (tl.program_id(1) * BLOCK_O).to(tl.int64), (tl.program_id(0) * BLOCK_I).to(tl.int64)
    o, i, p = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_P)
    o_kept, i_kept = o < o_dim - o_first, i < i_dim - i_first
    # offsets inside a tile stay 32 bits wide: with 64, registers spill
    dy_at = dy_ptr + o_first * padded_dim + first * BLOCK_P + o[:, None] * padded_dim + p[None, :]
    x_at = x_ptr + i_first * padded_dim + first * BLOCK_P + i[None, :] * padded_dim + p[:, None]
    dy_scale_at = dy_scale_ptr + o_first + first * o_dim + o
    x_scale_at = x_scale_ptr + i_first + first * i_dim + i
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for tile in range(count):
        dy = tl.load(dy_at + tile * BLOCK_P, mask=o_kept[:, None], other=0.0)
        x = tl.load(x_at + tile * BLOCK_P, mask=i_kept[None, :], other=0.0)
        dy_scale = tl.load(dy_scale_at + tile * o_dim, mask=o_kept, other=0.0)
        x_scale = tl.load(x_scale_at + tile * i_dim, mask=i_kept, other=0.0)
        acc += product_of_chunk(dy, x, EMULATE) * dy_scale[:, None] * x_scale[None, :]
    at = (
        dweight_ptr
        + (expert.to(tl.int64) * o_dim + o_first) * i_dim
        + i_first
        + o[:, None] * i_dim
        + i[None, :]
    )
    kept = o_kept[:, None] & i_kept[None, :]
    if ADD:
        acc += tl.load(at, mask=kept, other=0.0)
    tl.store(at, acc.to(dweight_ptr.dtype.element_ty), mask=kept)


def linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`; operands are made contiguous along K, as Hopper's FP8 wants."""
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    rows, k_dim = x.values.shape
    n_dim = values.shape[-2]
    experts = 1 if ends_E is None else ends_E.shape[0]
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=values.device)
    block_m, block_n, warps, stages = tiles(rows // experts)
    grid = (cdiv(n_dim, block_n), rows // block_m + experts + 1)
    if rows:
        _rows_times_blocks[grid](
            x.values, x.scale, values, scale, out_RN, values if ends_E is None else ends_E,
            rows, experts, n_dim, k_dim, scale.shape[-1], scale.shape[-2], *x.scale.stride(),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=TILE, EXPERTS=groups(ends_E),
            EMULATE=triton_interprets(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_RN


def weight_gradient(dy, x, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_weight_gradient`."""
    o_dim, i_dim = dy.values.shape[0], x.values.shape[0]
    shape = (o_dim, i_dim) if ends_E is None else (ends_E.shape[0], o_dim, i_dim)
    out = torch.empty(shape, dtype=dtype, device=x.values.device)
    _write_gradient(out, dy, x, ends_E, add=False)
    return out


def add_weight_gradient(into, dy, x, ends_E, *, fresh, squares=False):
    """See `benthic.kernels.ops.add_fp8_weight_gradient`."""
    _write_gradient(into, dy, x, ends_E, add=not fresh)
    return squares_of(into) if squares else None


def _write_gradient(out, dy, x, ends_E, *, add):
    (o_dim, padded), i_dim = dy.values.shape, x.values.shape[0]
    experts = 1 if ends_E is None else ends_E.shape[0]
    block_o, block_i, warps, stages = tiles(64)  # 128 x 128 spills: both operands bring a vector of scales
    _column_tiles[(cdiv(i_dim, block_i), cdiv(o_dim, block_o), experts)](
        dy.values, by_column(dy.scale), x.values, by_column(x.scale), out, out if ends_E is None else ends_E,
        experts, o_dim, i_dim, padded, padded // TILE,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_P=TILE,
        EXPERTS=0 if ends_E is None else next_power_of_2(experts),
        ADD=add, EMULATE=triton_interprets(), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def tiles(rows):
    """`(block_m, block_n, warps, stages)` for about `rows` rows a group; none of them spills on sm_90."""
    if rows <= 32:
        return 16, 128, 4, 4
    if rows <= 96:
        return 64, 128, 4, 4
    return 128, 128, 8, 3
