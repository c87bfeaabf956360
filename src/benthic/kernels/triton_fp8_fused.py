# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels that quantise to E4M3 what they have just computed, or read: SwiGLU, RMSNorm, both tilings.

Each is bound by memory and saves the passes in which a wide tensor is written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.reference.fp8_linear import TILE, padded_rows
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import empty_tiles, row_block, scaled, tile_scale
from benthic.kernels.triton_tiles import find_tile, groups


@remembered
@triton.jit(do_not_specialize=["rows"])
def _quantise_both(
    x_ptr, row_values_ptr, row_scale_ptr, column_words_ptr, column_scale_ptr, ends_ptr,
    rows, experts, columns, word_dim, stride,
    row_scale_stride, row_tile_stride, column_scale_stride, column_tile_stride,
    POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A square of one expert's rows, read once: a scale for each of its rows and one for each of its columns.

    A thread holds four rows of a column, so columns are turned round as words of four values.
    """
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    expert, start, end = find_tile(ends_ptr, tile, rows, experts, TILE, EXPERTS)
    row, within = start + 4 * tl.arange(0, TILE // 4), tl.arange(0, TILE)
    column = column_tile * TILE + within
    x_ptr += column_tile * TILE
    row_values_ptr += column_tile * TILE
    left = columns - column_tile * TILE
    x_0 = _rows_of(x_ptr, row, end, left, stride, TILE)
    x_1 = _rows_of(x_ptr, row + 1, end, left, stride, TILE)
    x_2 = _rows_of(x_ptr, row + 2, end, left, stride, TILE)
    x_3 = _rows_of(x_ptr, row + 3, end, left, stride, TILE)
    where = row_values_ptr, columns, end, left
    scale_0 = _store_rows(x_0, row, *where, POWER_OF_TWO, TILE)
    scale_1 = _store_rows(x_1, row + 1, *where, POWER_OF_TWO, TILE)
    scale_2 = _store_rows(x_2, row + 2, *where, POWER_OF_TWO, TILE)
    scale_3 = _store_rows(x_3, row + 3, *where, POWER_OF_TWO, TILE)
    scale = tl.reshape(tl.join(tl.join(scale_0, scale_2), tl.join(scale_1, scale_3)), (TILE,))
    at = (start + within).to(tl.int64) * row_scale_stride + column_tile.to(tl.int64) * row_tile_stride
    tl.store(row_scale_ptr + at, scale, mask=start + within < end)
    # the rows past the last expert belong to nobody: in columns they are zeros
    owned = expert < experts
    amax = tl.maximum(tl.maximum(tl.abs(x_0), tl.abs(x_1)), tl.maximum(tl.abs(x_2), tl.abs(x_3)))
    scale = tile_scale(tl.where(owned, tl.max(amax, axis=0), 0.0), POWER_OF_TWO)
    word = _bytes(x_0, scale) | (_bytes(x_1, scale) << 8)
    word |= (_bytes(x_2, scale) << 16) | (_bytes(x_3, scale) << 24)
    words = tl.trans(tl.where(owned, word, 0))
    kept, place = column < tl.where(tile < word_dim // (TILE // 4), columns, 0), column.to(tl.int64)
    at = place[:, None] * word_dim + tile * (TILE // 4) + tl.arange(0, TILE // 4)[None, :]
    tl.store(column_words_ptr + at, words, mask=kept[:, None])
    at = place * column_scale_stride + tile.to(tl.int64) * column_tile_stride
    tl.store(column_scale_ptr + at, scale, mask=kept)


@triton.jit
def _rows_of(x_ptr, row, end, left, stride, TILE: tl.constexpr):
    """Some rows of a square, zero from `end` and past the `left` columns."""
    within = tl.arange(0, TILE)
    at = row.to(tl.int64)[:, None] * stride + within[None, :]
    mask = (row < end)[:, None] & (within < left)[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(
    x, row, values_ptr, columns, end, left, POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store some rows of a square and return their scales."""
    scale = tile_scale(tl.max(tl.abs(x), axis=1), POWER_OF_TWO)
    within = tl.arange(0, TILE)
    at = row.to(tl.int64)[:, None] * columns + within[None, :]
    mask = (row < end)[:, None] & (within < left)[None, :]
    tl.store(values_ptr + at, scaled(x, scale[:, None]).to(tl.float8e4nv), mask=mask)
    return scale


@triton.jit
def _bytes(x, scale):
    """Values of columns as the lowest bytes of words."""
    return scaled(x, scale[None, :]).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _swiglu_rows(
    gate_up_ptr, values_ptr, scale_ptr, rows, width, stride, scale_stride, tile_stride,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One scale per row and `TILE` columns of `silu(gate) * up`, rounded first as the wide one is stored."""
    wait_for_inputs(PDL)
    tiles = tl.cdiv(width, TILE)
    tile = tl.program_id(0) % tiles  # neighbours lie side by side in memory
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * stride + column[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + width, mask=mask, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale = tile_scale(tl.max(tl.abs(out), axis=1), POWER_OF_TWO)
    values = scaled(out, scale[:, None]).to(tl.float8e4nv)
    tl.store(values_ptr + row[:, None] * width + column[None, :], values, mask=mask)
    at = row * scale_stride + tile.to(tl.int64) * tile_stride
    tl.store(scale_ptr + at, scale, mask=row < rows)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _norm_rows(
    x_ptr, residual_ptr, weight_ptr, total_ptr, values_ptr, scale_ptr,
    rows, width, tiles, x_stride, residual_stride, scale_stride, tile_stride, eps,
    HAS_RESIDUAL: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whole rows normalised, rounded as the wide ones are stored, then cut into tiles."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * width + column[None, :], total, mask=mask)
        x = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    out = (x * rstd[:, None] * weight[None, :]).to(x_ptr.dtype.element_ty).to(tl.float32)
    cut = tl.reshape(out, (ROWS, WIDTH // TILE, TILE))
    scale = tile_scale(tl.max(tl.abs(cut), axis=2), POWER_OF_TWO)
    # stored in three dims, so that the norm's own loads lie as in the plain norm: its sum then has that order
    tile, within = tl.arange(0, WIDTH // TILE), tl.arange(0, TILE)
    column = tile[:, None] * TILE + within[None, :]
    at = row[:, None, None] * width + column[None, :, :]
    at = tl.max_contiguous(values_ptr + at, (1, 1, 8))  # or Triton turns values round to store 16 at a time
    values = scaled(cut, scale[:, :, None]).to(tl.float8e4nv)
    kept = (row < rows)[:, None]
    tl.store(at, values, mask=kept[:, :, None] & (column < width)[None, :, :])
    at = row[:, None] * scale_stride + tile[None, :].to(tl.int64) * tile_stride
    tl.store(scale_ptr + at, scale, mask=kept & (tile < tiles)[None, :])


def quantise_both(x_RI, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.quantise_fp8_both`."""
    x_RI = x_RI if x_RI.stride(1) == 1 else x_RI.contiguous()
    rows, columns = x_RI.shape
    device = x_RI.device
    experts = 1 if ends_E is None else ends_E.shape[0]
    padded = padded_rows(rows, experts)
    by_row, by_column = (
        empty_tiles(outer, inner, device) for outer, inner in ((rows, columns), (columns, padded))
    )
    if padded:
        # one tile more than columns have room for: the rows past the last expert may begin in it
        _quantise_both[(padded // TILE + 1, by_row.scale.shape[1])](
            x_RI, *by_row, by_column.values.view(torch.int32), by_column.scale,
            x_RI if ends_E is None else ends_E, rows, experts, columns, padded // 4, x_RI.stride(0),
            *by_row.scale.stride(), *by_column.scale.stride(),
            POWER_OF_TWO=power_of_two, EXPERTS=groups(ends_E),
            TILE=TILE, num_warps=4,
        )  # fmt: skip
    return by_row, by_column


def swiglu(gate_up_RF2, *, power_of_two):
    """See `benthic.kernels.ops.swiglu_fp8`."""
    gate_up_RF2 = gate_up_RF2 if gate_up_RF2.stride(1) == 1 else gate_up_RF2.contiguous()
    rows, width = gate_up_RF2.shape[0], gate_up_RF2.shape[1] // 2
    out = empty_tiles(rows, width, gate_up_RF2.device)
    if rows:
        block, warps = row_block(rows)
        _swiglu_rows[(out.scale.shape[1] * cdiv(rows, block),)](
            gate_up_RF2, *out, rows, width, gate_up_RF2.stride(0), *out.scale.stride(),
            POWER_OF_TWO=power_of_two, ROWS=block, TILE=TILE, num_warps=warps,
            **early(gate_up_RF2.device, rows),
        )  # fmt: skip
    return out


def rms_norm(x_RD, weight_D, eps, *, power_of_two):
    """See `benthic.kernels.ops.rms_norm_fp8`."""
    return _norm(x_RD, None, weight_D, eps, power_of_two=power_of_two)[0]


def add_rms_norm(x_RD, residual_RD, weight_D, eps, *, power_of_two):
    """See `benthic.kernels.ops.add_rms_norm_fp8`."""
    return _norm(x_RD, residual_RD, weight_D, eps, power_of_two=power_of_two)


def _norm(x_RD, residual_RD, weight_D, eps, *, power_of_two):
    x_RD = x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()
    other = x_RD if residual_RD is None else residual_RD
    other = other if other.stride(1) == 1 else other.contiguous()
    rows, width = x_RD.shape
    out = empty_tiles(rows, width, x_RD.device)
    total = x_RD if residual_RD is None else torch.empty_like(out.values, dtype=x_RD.dtype)
    block, padded, warps = norm_tile(width)
    if rows:
        _norm_rows[(cdiv(rows, block),)](
            x_RD, other, weight_D, total, *out,
            rows, width, out.scale.shape[1], x_RD.stride(0), other.stride(0), *out.scale.stride(), eps,
            HAS_RESIDUAL=residual_RD is not None, POWER_OF_TWO=power_of_two,
            ROWS=block, WIDTH=padded, TILE=TILE, num_warps=warps, **early(x_RD.device, rows),
        )  # fmt: skip
    return out, total


def norm_tile(width):
    """`(rows, padded width, warps)`: those of the plain norm, whose sums then have the same order."""
    padded = max(TILE, next_power_of_2(width))
    rows = max(1, 4096 // padded)
    return rows, padded, min(16, max(4, rows * padded // 1024))
