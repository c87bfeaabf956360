# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Rows in E4M3 with a scale for 128 columns, turned into columns with a scale for 128 rows, in Gluon.

At a copy's rate a multiprocessor has 1,750 cycles for a square of 128 x 128 values, 64 a thread here. So a
value is read from shared memory and multiplied with its row's scale once: products stay in registers while
columns' scales are found. A program meets three times a square. Squares come by TMA one ahead and leave by
TMA as words of four rows, which the conversion to E4M3 puts together.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benthic.kernels.gluon_fp8_parts import PLAIN, TILE, packed
from benthic.kernels.gluon_fp8_tiles import expert_of
from benthic.kernels.gluon_tiles import (
    blocks_of,
    layout_of,
    load,
    meet,
    new_bars,
    rows_loadable,
    take_context,
    unload,
)
from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import padded_rows
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import empty_tiles, inverse_of, quotient, tile_scale
from benthic.kernels.triton_tiles import multiprocessors

SQUARE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [16, 0]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [4, 0], [8, 0]],
        warp_bases=[[0, 64], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""A thread has eight columns of twice four rows: neither its loads of eight values nor its stores of a word
meet another lane's in a bank."""
ROWS = gl.constexpr(gl.SliceLayout(1, SQUARE))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SQUARE))
GROUPS = gl.constexpr(16)
"""Groups of eight rows, of which a thread has one."""
FOUND = gl.constexpr(gl.BlockedLayout([8, 1], [2, 16], [1, 8], [1, 0]))
"""Two lanes find a column's largest magnitude among those of the groups."""
FOUND_COLUMNS = gl.constexpr(gl.SliceLayout(0, FOUND))
LARGEST = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
STAGES = gl.constexpr(2)
"""Squares that are read at once, and those that are written."""
EIGHTH, WORDS = 16, 32
"""Columns that leave as one eighth of a square, and words of each."""
PROGRAMS, WARPS, REGISTERS = 2, 8, 128
"""Programs of a multiprocessor, as many as its registers allow, their warps, registers of a thread."""


@gluon.jit
def _values(square):
    """E4M3 values in float32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high, a, b;
        .reg .b32 pair;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 pair, low;
        mov.b32 {a, b}, pair;
        cvt.f32.f16 $0, a;
        cvt.f32.f16 $1, b;
        cvt.rn.f16x2.e4m3x2 pair, high;
        mov.b32 {a, b}, pair;
        cvt.f32.f16 $2, a;
        cvt.f32.f16 $3, b;
        }""",
        "=f,=f,=f,=f,r", [square.load(SQUARE)], dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _largest(x):
    """The largest magnitude of each column among the eight rows that a thread has: [groups, columns]."""
    x = gl.max(gl.abs(x).reshape([GROUPS // 4, 32 // GROUPS, 4, 4, TILE]), axis=3)
    return gl.max(x, axis=1).reshape([GROUPS, TILE])


@gluon.jit
def _quotients(x, numbers, POWER_OF_TWO: gl.constexpr):
    """`x` by its columns' scales, of which `numbers` are the inverses and the scales."""
    inverse = numbers.index(0).load(COLUMNS)[None, :]
    if POWER_OF_TWO:
        x *= inverse  # rounded to nearest as the quotient is: the inverse is exact
    else:
        x = quotient(x, numbers.index(1).load(COLUMNS)[None, :], inverse)
    return x


@gluon.jit
def _fetch(x, squares, bars, n, more, spot):
    """Have the square at a spot brought to where the `n`th stands, if there is `more`."""
    bar = bars.index(n % STAGES)
    mbarrier.expect(bar, x.block_type.nbytes, pred=more)
    load(x, [spot[0], spot[3] * TILE], bar, squares.index(n % STAGES), pred=more)


@gluon.jit
def _spot(tile, column_tile, place, experts):
    """First row, rows that an expert owns, tile and tile of columns of a square."""
    row = place[2] + (tile - place[1]) * TILE
    return row, gl.where(place[0] < experts, place[3] - row, 0), tile, column_tile


@gluon.jit
def _after(spot, place, ends_ptr, rows, experts, n_tiles):
    """The place and the spot of a program's next square."""
    column_tile = spot[3] + gl.num_programs(0) % n_tiles
    over = column_tile >= n_tiles
    tile = spot[2] + gl.num_programs(0) // n_tiles + gl.where(over, 1, 0)
    column_tile -= gl.where(over, n_tiles, 0)
    place = expert_of(tile, place, ends_ptr, rows, experts, 1, TILE)
    return place, _spot(tile, column_tile, place, experts)


@gluon.jit
def _row_scales(in_scale_ptr, spot, more, in_stride, in_tile_stride):
    """Scales of a square's rows."""
    line = gl.arange(0, TILE, layout=LINE)
    at = in_scale_ptr + spot[0].to(gl.int64) * in_stride + spot[3].to(gl.int64) * in_tile_stride
    return gl.load(at + line * in_stride, mask=line < gl.where(more, spot[1], 0), other=0.0)


@remembered
@gluon.jit(do_not_specialize=["rows", "squares"])
def _retile_squares(
    x, in_scale_ptr, out, column_scale_ptr, ends_ptr,
    rows, experts, column_dim, n_tiles, squares, in_stride, in_tile_stride, column_tile_stride,
    HAS_ENDS: gl.constexpr, POWER_OF_TWO: gl.constexpr,
):  # fmt: skip
    """Every so manieth square, one after another along the rows."""
    loaded = gl.allocate_shared_memory(x.dtype, [STAGES, TILE, TILE], x.layout)
    staged = gl.allocate_shared_memory(gl.int32, [STAGES, 8, 16, 32], out.layout)
    largest = gl.allocate_shared_memory(gl.float32, [GROUPS, TILE], LARGEST)
    row_scales = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], PLAIN)
    numbers = gl.allocate_shared_memory(gl.float32, [2, TILE], PLAIN)
    bars = new_bars(STAGES, 1)
    fence_async_shared()
    meet()
    end = rows
    if HAS_ENDS:
        end = gl.load(ends_ptr)
    at, n, step = gl.program_id(0), 0, gl.num_programs(0)
    place = expert_of(at // n_tiles, (0, 0, 0, end), ends_ptr, rows, experts, 1, TILE)
    spot = _spot(at // n_tiles, at % n_tiles, place, experts)
    _fetch(x, loaded, bars, 0, at < squares, spot)
    row_scales.index(0).store(_row_scales(in_scale_ptr, spot, at < squares, in_stride, in_tile_stride))
    place, after = _after(spot, place, ends_ptr, rows, experts, n_tiles)
    _fetch(x, loaded, bars, 1, at + step < squares, after)
    meet()
    row = gl.arange(0, TILE, layout=ROWS)
    line = gl.arange(0, TILE, layout=FOUND_COLUMNS)
    while at < squares:
        scales_after = _row_scales(in_scale_ptr, after, at + step < squares, in_stride, in_tile_stride)
        height, tile, column = spot[1], spot[2], spot[3] * TILE
        spot = after
        place, after = _after(spot, place, ends_ptr, rows, experts, n_tiles)
        mbarrier.wait(bars.index(n % STAGES), n // STAGES % 2)
        values = _values(loaded.index(n % STAGES)) * row_scales.index(n % STAGES).load(ROWS)[:, None]
        if height < TILE:
            values = gl.where((row < height)[:, None], values, 0.0)
        largest.store(_largest(values))
        meet()
        _fetch(x, loaded, bars, n, at + STAGES * step < squares, after)
        scale = tile_scale(gl.max(largest.load(FOUND), axis=0), POWER_OF_TWO)
        numbers.index(0).store(inverse_of(scale))
        if not POWER_OF_TWO:
            numbers.index(1).store(scale)
        scale_at = column_scale_ptr + tile.to(gl.int64) * column_tile_stride + column
        gl.store(scale_at + line, scale, mask=line < column_dim - column)
        tma.store_wait(STAGES - 1)
        meet()
        words = packed(_quotients(values, numbers, POWER_OF_TWO))
        staged.index(n % STAGES).store(words.reshape([32, 16, 8]).permute((2, 1, 0)))
        row_scales.index((n + 1) % STAGES).store(scales_after)
        fence_async_shared()
        meet()
        unload(out, [0, column // 8, tile * 32], staged.index(n % STAGES))
        at += step
        n += 1
    tma.store_wait(0)


def retile(rows, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.retile_fp8`."""
    x_RI = rows_loadable(rows.values)
    count, columns = x_RI.shape
    experts, n_tiles = 1 if ends_E is None else ends_E.shape[0], cdiv(columns, TILE.value)
    padded = padded_rows(count, experts)
    by_column = empty_tiles(columns, padded, x_RI.device)
    squares = padded // TILE.value * n_tiles
    if count and columns:
        take_context(x_RI.device)
        words = by_column.values.view(torch.int32)
        _retile_squares[(min(PROGRAMS * multiprocessors(x_RI.device), squares),)](
            blocks_of(x_RI, TILE.value, TILE.value), rows.scale, _eighths_of(words), by_column.scale,
            words if ends_E is None else ends_E,
            count, experts, columns, n_tiles, squares, *rows.scale.stride(), by_column.scale.stride(1),
            HAS_ENDS=ends_E is not None, POWER_OF_TWO=power_of_two, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return by_column


def _eighths_of(words_IW):
    """A descriptor of blocks of 32 words of 128 columns, every eighth of which lie one after another."""
    columns, words = words_IW.shape
    layout = layout_of(EIGHTH, WORDS, torch.int32, 8)
    shape, strides = [8, columns // 8, words], [words, 8 * words, 1]
    return TensorDescriptor(words_IW, shape, strides, [8, EIGHTH, WORDS], layout)
