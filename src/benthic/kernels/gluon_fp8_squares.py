# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Squares of 128 x 128 quantised to E4M3 in columns, or in rows and columns, for Hopper in Gluon.

Such kernels are bound by memory only if they have few instructions: at a copy's rate a multiprocessor has
some 3,600 cycles for a square of bfloat16 that is stored twice. So TMA brings squares to shared memory, from
where they are read twice, for the largest magnitudes and for the values. A scale is computed by one thread
and goes to the others through shared memory. Columns are turned round as words of four values, which the
conversion to E4M3 puts together.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from benthic.kernels.gluon_fp8_parts import (
    PLAIN,
    STAGED,
    TILE,
    clear_from,
    larger,
    largest_of_columns,
    largest_of_fours,
    largest_of_rows,
    store_row_values,
    wide,
    words_of,
)
from benthic.kernels.gluon_fp8_tiles import expert_of
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars, rows_loadable, take_context
from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import padded_rows
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import empty_tiles, inverse_of, tile_scale
from benthic.kernels.triton_tiles import multiprocessors

PART = gl.constexpr(32)
"""Rows of a square that are in registers at once, and words of a column."""
PARTS = gl.constexpr(gl.BlockedLayout([4, 8], [2, 16], [4, 1], [1, 0]))
"""A thread has four rows of eight columns."""
ROWS = gl.constexpr(gl.SliceLayout(1, PARTS))
COLUMNS = gl.constexpr(gl.SliceLayout(0, PARTS))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""A thread has one row, or one column."""
TURNED = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
ROW_AMAX = gl.constexpr(0)
ROW_SCALE = gl.constexpr(128)
ROW_INVERSE = gl.constexpr(256)
COLUMN_SCALE = gl.constexpr(384)
COLUMN_INVERSE = gl.constexpr(512)
"""Where each of these begins in shared memory."""
PROGRAMS, REGISTERS = 4, 128
"""Programs of a multiprocessor, as many as its shared memory holds, and registers of a thread."""


@gluon.jit
def _fetch(x, square, bar, at, place, n_tiles, squares):
    """Have a square brought, if there is one; returns its first row and its tile of columns."""
    row, column_tile = place[2] + (at - place[1]) // n_tiles * TILE, at % n_tiles
    mbarrier.expect(bar, x.block_type.nbytes, pred=at < squares)
    load(x, [row, column_tile * TILE], bar, square, pred=at < squares)
    return row, column_tile


@gluon.jit
def _largest(square, numbers, BOTH: gl.constexpr):
    """The largest magnitude of each column; those of rows go to shared memory."""
    amax = square.slice(0, PART).load(PARTS)
    if BOTH:
        numbers.slice(ROW_AMAX, PART).store(largest_of_rows(amax))
    for first in gl.static_range(PART, TILE, PART):
        x = square.slice(first, PART).load(PARTS)
        if BOTH:
            numbers.slice(ROW_AMAX + first, PART).store(largest_of_rows(x))
        amax = larger(amax, x)
    return largest_of_columns(largest_of_fours(amax), LINE)


@remembered
@gluon.jit(do_not_specialize=["rows", "squares"])
def _quantise_squares(
    x, row_values_ptr, row_scale_ptr, column_words_ptr, column_scale_ptr, ends_ptr,
    rows, experts, column_dim, word_dim, n_tiles, squares,
    row_tile_stride, column_tile_stride,
    HAS_ENDS: gl.constexpr, BOTH: gl.constexpr, POWER_OF_TWO: gl.constexpr,
):  # fmt: skip
    """Every so manieth square in columns and, with `BOTH`, in rows."""
    square = gl.allocate_shared_memory(x.dtype, [TILE, TILE], x.layout)
    staged = gl.allocate_shared_memory(gl.int32, [TILE, PART], STAGED)
    numbers = gl.allocate_shared_memory(gl.float32, [8 * TILE], PLAIN)
    bar = new_bars(1, 1).index(0)
    fence_async_shared()
    meet()
    end = rows
    if HAS_ENDS:
        end = gl.load(ends_ptr)
    line = gl.arange(0, TILE, layout=LINE)
    at, phase = gl.program_id(0), 0
    place = expert_of(at, (0, 0, 0, end), ends_ptr, rows, experts, n_tiles, TILE)
    row, column_tile = _fetch(x, square, bar, at, place, n_tiles, squares)
    while at < squares:
        owned, height = place[0] < experts, place[3] - row
        tile, column = at // n_tiles, column_tile * TILE
        width = gl.where(tile < word_dim // PART, column_dim - column, 0)
        mbarrier.wait(bar, phase)
        phase ^= 1
        if height < TILE:
            clear_from(square, height, PARTS, PART)
        meet()
        amax = _largest(square, numbers, BOTH)
        scale = tile_scale(gl.where(owned, amax, 0.0), POWER_OF_TWO)
        numbers.slice(COLUMN_SCALE, TILE).store(scale)
        numbers.slice(COLUMN_INVERSE, TILE).store(inverse_of(scale))
        scale_at = column_scale_ptr + tile.to(gl.int64) * column_tile_stride + column
        gl.store(scale_at + line, scale, mask=line < width)
        if BOTH:
            meet()
            scale = tile_scale(numbers.slice(ROW_AMAX, TILE).load(LINE), POWER_OF_TWO)
            numbers.slice(ROW_SCALE, TILE).store(scale)
            numbers.slice(ROW_INVERSE, TILE).store(inverse_of(scale))
            scale_at = row_scale_ptr + column_tile.to(gl.int64) * row_tile_stride + row
            gl.store(scale_at + line, scale, mask=line < height)
        meet()
        by = numbers.slice(COLUMN_SCALE, TILE).load(COLUMNS)
        inverse = numbers.slice(COLUMN_INVERSE, TILE).load(COLUMNS)
        values_ptr = row_values_ptr + row.to(gl.int64) * column_dim + column
        for first in gl.static_range(0, TILE, PART):
            part = wide(square.slice(first, PART).load(PARTS))
            if BOTH:
                row_by = numbers.slice(ROW_SCALE + first, PART).load(ROWS)
                row_inverse = numbers.slice(ROW_INVERSE + first, PART).load(ROWS)
                store_row_values(
                    part, row_by, row_inverse, values_ptr, first, column_dim, height, column_dim - column
                )
            words = words_of(part, by, inverse)
            staged.slice(first // 4, PART // 4, dim=1).store(words.permute((1, 0)))
        meet()
        if place[0] >= experts:
            staged.store(gl.zeros([TILE, PART], gl.int32, layout=TURNED))
            meet()
        at += gl.num_programs(0)
        place = expert_of(at, place, ends_ptr, rows, experts, n_tiles, TILE)
        row, column_tile = _fetch(x, square, bar, at, place, n_tiles, squares)
        out = gl.arange(0, TILE, layout=gl.SliceLayout(1, TURNED))
        word = gl.arange(0, PART, layout=gl.SliceLayout(0, TURNED))
        words_at = column_words_ptr + column.to(gl.int64) * word_dim + tile * PART
        gl.store(
            words_at + ((out * word_dim)[:, None] + word[None, :]), staged.load(TURNED),
            mask=(out < width)[:, None],
        )  # fmt: skip


def quantise_both(x_RI, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.quantise_fp8_both`."""
    by_row = empty_tiles(*x_RI.shape, x_RI.device)
    return by_row, _walk(x_RI, ends_E, by_row, power_of_two=power_of_two)


def quantise_columns(x_RI, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.quantise_fp8_columns`."""
    return _walk(x_RI, ends_E, None, power_of_two=power_of_two)


def _walk(x_RI, ends_E, by_row, *, power_of_two):
    x_RI = rows_loadable(x_RI)
    rows, columns = x_RI.shape
    experts, n_tiles = 1 if ends_E is None else ends_E.shape[0], cdiv(columns, TILE.value)
    padded = padded_rows(rows, experts)
    by_column = empty_tiles(columns, padded, x_RI.device)
    words = by_column.values.view(torch.int32)
    # one tile more than columns have room for: the rows past the last expert may begin in it
    squares = (padded // TILE.value + (by_row is not None)) * n_tiles
    if rows and columns:
        take_context(x_RI.device)
        to = by_column if by_row is None else by_row
        _quantise_squares[(min(PROGRAMS * multiprocessors(x_RI.device), squares),)](
            blocks_of(x_RI, TILE.value, TILE.value), to.values, to.scale, words, by_column.scale,
            words if ends_E is None else ends_E,
            rows, experts, columns, padded // 4, n_tiles, squares,
            to.scale.stride(1), by_column.scale.stride(1),
            HAS_ENDS=ends_E is not None, BOTH=by_row is not None, POWER_OF_TWO=power_of_two,
            num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    return by_column
