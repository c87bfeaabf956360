# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What FP8 products in Gluon share: sizes, registers, a product of 64 rows and 64 columns, descriptors."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from benthic.kernels.gluon_tiles import blocks_of

ROWS = gl.constexpr(128)
CHUNK = gl.constexpr(128)
"""Dims that have one scale, and columns that share one of the weight."""
PART = gl.constexpr(64)
"""Rows or columns of a product; some of them side by side are the columns of a tile."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""

GROUPS = gl.constexpr(3)
TALL_ROWS = gl.constexpr(192)
TALL_COLUMNS = gl.constexpr(128)
TALL_BAND = gl.constexpr(16)
TALL_REGISTERS = 160
TALL_ENTRY_REGISTERS = 128
"""The same of kernels whose tiles are multiplied by three groups of 64 rows, besides the one that loads."""


@gluon.jit
def end_of(ends_ptr, expert, experts, rows):
    """Where an expert's rows end; a single one without ends has all."""
    end = rows
    if ends_ptr is not None:
        end = gl.load(ends_ptr + expert, mask=expert < experts, other=rows)
    return end


@gluon.jit
def expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS: gl.constexpr):
    """Go on from an earlier tile's expert to that of `tile`, `experts` for rows that belong to none.

    A place is the expert, its first tile, its first row and its end. Behind the last tile the expert is
    `experts + 1`.
    """
    expert, first, start, end = place
    tiles = (end - start + ROWS - 1) // ROWS * n_tiles
    while (tile >= first + tiles) & (expert <= experts):
        first += tiles
        expert += 1
        start = end
        end = end_of(ends_ptr, expert, experts, rows)
        tiles = (end - start + ROWS - 1) // ROWS * n_tiles
    return expert, first, start, end


@gluon.jit
def corner(tile, first, start, end, n_tiles, BAND: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and first column of a tile: bands of rows, in each of them column by column.

    `BAND` tiles of rows meet a tile of columns one after another, so that both stay in the cache.
    """
    m_tiles = (end - start + ROWS - 1) // ROWS
    number = tile - first
    band = number // (BAND * n_tiles) * BAND
    high = gl.maximum(gl.minimum(m_tiles - band, BAND), 1)  # behind the last tile there are none
    number = number % (BAND * n_tiles)
    return start + (band + number % high) * ROWS, number // high * COLUMNS


@gluon.jit
def chunks_of(expert, place, ends_ptr):
    """Go on from an earlier expert, its first chunk and its end to those of `expert`; and its chunks."""
    before, first, start_row, end = place
    chunks = (end - start_row + CHUNK - 1) // CHUNK
    while before < expert:
        first += chunks
        before += 1
        start_row = end
        if ends_ptr is not None:
            end = gl.load(ends_ptr + before)
        chunks = (end - start_row + CHUNK - 1) // CHUNK
    return (before, first, start_row, end), chunks


@gluon.jit
def start(x_tile, weight_ring, place, zero):
    """Start the product of a group's rows and 64 columns, summed from zero."""
    return warpgroup_mma(x_tile, weight_ring.index(place).permute((1, 0)), zero, use_acc=False, is_async=True)


def tiles_of(values_RK, rows=PART.value):
    """A descriptor of blocks of some rows by a chunk; zeros lie behind the last row and the last dim."""
    return blocks_of(values_RK, rows, CHUNK.value)
