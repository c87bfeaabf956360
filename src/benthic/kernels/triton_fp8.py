"""Triton kernels of the FP8 formats: one pass finds a tile's largest magnitude, scales and stores it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.reference.fp8_linear import TILE, Fp8, padded_rows
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import row_block, scaled, tile_scale
from benthic.kernels.triton_tiles import find_tile, groups, unit_stride


@remembered
@triton.jit(do_not_specialize=["rows"])
def _quantise_rows(
    x_ptr, values_ptr, scale_ptr, rows, columns, stride, scale_stride, tile_stride,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TILE_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One scale per row and `TILE_N` columns."""
    wait_for_inputs(PDL)
    tiles = tl.cdiv(columns, TILE_N)
    tile = tl.program_id(0) % tiles  # neighbours lie side by side in memory
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, TILE)
    column = tile * TILE_N + within
    mask = (row < rows)[:, None] & ((column < columns) & (within < TILE_N))[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(tl.abs(x), axis=1), POWER_OF_TWO)
    values = scaled(x, scale[:, None])
    tl.store(values_ptr + row[:, None] * columns + column[None, :], values.to(tl.float8e4nv), mask=mask)
    at = row * scale_stride + tile.to(tl.int64) * tile_stride
    tl.store(scale_ptr + at, scale, mask=row < rows)


@remembered
@triton.jit
def _quantise_blocks(
    x_ptr, values_ptr, scale_ptr, rows, columns, tiles, stride,
    POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One scale per `BLOCK x BLOCK` block."""
    within = tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64) * BLOCK + within
    column = tl.program_id(0) * BLOCK + within
    mask = ((row < rows) & (within < BLOCK))[:, None] & ((column < columns) & (within < BLOCK))[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tile_scale(tl.max(tl.max(tl.abs(x), axis=1), axis=0), POWER_OF_TWO)
    values = scaled(x, scale)
    tl.store(values_ptr + row[:, None] * columns + column[None, :], values.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + tl.program_id(1) * tiles + tl.program_id(0), scale)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _quantise_columns(
    x_ptr, in_scale_ptr, values_ptr, scale_ptr, ends_ptr,
    rows, experts, columns, in_stride, in_tile_stride, padded_dim, stride,
    RETILE: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXPERTS: tl.constexpr,
    TILE_R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One scale per column and `TILE_R` rows of one expert; written transposed, so rows are contiguous.

    With `RETILE`, x holds E4M3 values with one scale per row and 128 columns.
    """
    tile = tl.program_id(0)
    expert, start, end = find_tile(ends_ptr, tile, rows, experts, TILE_R, EXPERTS)
    within = tl.arange(0, TILE_R)
    row = (start + within).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # the rows past the last expert belong to nobody: their tiles are zeros
    row_kept, column_kept = row < tl.where(expert < experts, end, start), column < columns
    mask = row_kept[:, None] & column_kept[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if RETILE:
        at = row * in_stride + (tl.program_id(1) * COLUMNS // 128).to(tl.int64) * in_tile_stride
        x *= tl.load(in_scale_ptr + at, mask=row_kept, other=0.0)[:, None]
    scale = tile_scale(tl.max(tl.abs(x), axis=0), POWER_OF_TWO)
    values = scaled(x, scale[None, :])
    at = column.to(tl.int64)[:, None] * padded_dim + tile * TILE_R + within[None, :]
    tl.store(values_ptr + at, tl.trans(values).to(tl.float8e4nv), mask=column_kept[:, None])
    tl.store(scale_ptr + tile.to(tl.int64) * columns + column, scale, mask=column_kept)


@remembered
@triton.jit(do_not_specialize=["rows"])
def _dequantise(
    values_ptr, scale_ptr, out_ptr, rows, columns, stride, scale_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows of one column of tiles, with one scale a row."""
    tiles = tl.cdiv(columns, TILE_N)
    tile = tl.program_id(0) % tiles  # neighbours lie side by side in memory
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, TILE)
    column = tile * TILE_N + within
    mask = (row < rows)[:, None] & ((column < columns) & (within < TILE_N))[None, :]
    scale = tl.load(scale_ptr + row // TILE_M * scale_stride + tile, mask=row < rows, other=0.0)
    values = tl.load(values_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
    out = values.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def quantise(x_MN, tile_m, tile_n, *, power_of_two, by_column=False):
    """See `benthic.kernels.reference.fp8.quantise`; tiles are one row high or square."""
    if x_MN.stride(1) != 1:
        x_MN = x_MN.contiguous()
    rows, columns = x_MN.shape
    tiles_m, tiles_n = cdiv(rows, tile_m), cdiv(columns, tile_n)
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x_MN.device)
    strides = (1, tiles_m) if by_column else (tiles_n, 1)
    scale = torch.empty_strided((tiles_m, tiles_n), strides, dtype=torch.float32, device=x_MN.device)
    tile = next_power_of_2(tile_n)
    if rows and tile_m == 1:
        block, warps = row_block(rows)
        _quantise_rows[(tiles_n * cdiv(rows, block),)](
            x_MN, values, scale, rows, columns, x_MN.stride(0), *strides,
            POWER_OF_TWO=power_of_two, ROWS=block, TILE=tile, TILE_N=tile_n, num_warps=warps,
            **early(x_MN.device, rows),
        )  # fmt: skip
    elif rows:
        _quantise_blocks[(tiles_n, tiles_m)](
            x_MN, values, scale, rows, columns, tiles_n, x_MN.stride(0),
            POWER_OF_TWO=power_of_two, TILE=tile, BLOCK=tile_n, num_warps=8,
        )  # fmt: skip
    return values, scale


def dequantise(values_MN, scale, tile_m, tile_n, *, dtype):
    """See `benthic.kernels.reference.fp8.dequantise`."""
    values_MN, scale = unit_stride(values_MN), unit_stride(scale)
    rows, columns = values_MN.shape
    out = torch.empty(rows, columns, dtype=dtype, device=values_MN.device)
    if out.numel():
        _dequantise[(cdiv(rows, 32) * scale.shape[1],)](
            values_MN, scale, out, rows, columns, values_MN.stride(0), scale.stride(0),
            TILE_M=tile_m, TILE_N=tile_n, ROWS=32, TILE=next_power_of_2(tile_n), num_warps=4,
        )  # fmt: skip
    return out


def quantise_weight(weight, *, power_of_two):
    """See `benthic.kernels.ops.quantise_fp8_weight`; experts of whole tiles are one tall matrix."""
    *experts, outer, inner = weight.shape
    if experts and outer % TILE:
        parts = [quantise(matrix, TILE, TILE, power_of_two=power_of_two) for matrix in weight]
        return Fp8(torch.stack([v for v, _ in parts]), torch.stack([s for _, s in parts]))
    values, scale = quantise(weight.reshape(-1, inner), TILE, TILE, power_of_two=power_of_two)
    return Fp8(values.view(weight.shape), scale.view(*experts, -1, scale.shape[1]))


def quantise_columns(x_RI, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.quantise_fp8_columns`."""
    x_RI = x_RI if x_RI.stride(1) == 1 else x_RI.contiguous()
    return _cut(x_RI, None, ends_E, power_of_two=power_of_two)


def retile(rows, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.retile_fp8`."""
    return _cut(rows.values, rows.scale, ends_E, power_of_two=power_of_two)


def _cut(x_RI, scale, ends_E, *, power_of_two):
    rows, columns = x_RI.shape
    experts = 1 if ends_E is None else ends_E.shape[0]
    padded = padded_rows(rows, experts)
    size = (columns, padded // TILE)
    values = torch.empty(columns, padded, dtype=torch.float8_e4m3fn, device=x_RI.device)
    out_scale = torch.empty_strided(size, (1, columns), dtype=torch.float32, device=x_RI.device)
    if padded:
        width = 64  # divides 128, so that a program reads one column of scales
        _quantise_columns[(padded // TILE, cdiv(columns, width))](
            x_RI, out_scale if scale is None else scale, values, out_scale,
            values if ends_E is None else ends_E,
            rows, experts, columns, *((0, 0) if scale is None else scale.stride()), padded, x_RI.stride(0),
            RETILE=scale is not None, POWER_OF_TWO=power_of_two, EXPERTS=groups(ends_E),
            TILE_R=TILE, COLUMNS=width, num_warps=4,
        )  # fmt: skip
    return Fp8(values, out_scale)
