# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The weight gradient of FP8 products for Hopper in Gluon, by three groups of warps; see `gluon_fp8_three`.

    dweight[e, o, i] = sum over chunks of 128 rows of expert e of (dy[o, :] . x[i, :]) * their two scales

A tile of 192 x 128 asks the second-level cache for a fifth less than one of 128 x 128. Each group has 64 of
its rows and all columns in one product, so that the left operand is read once; while a group promotes, the
two others multiply. Scales come by TMA with the operands. A tile leaves through shared memory, written by TMA
or added by the second-level cache, while the next one is multiplied (`gluon_sums`).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    GROUPS,
    PART,
    PRODUCER_REGISTERS,
    TALL_BAND,
    TALL_COLUMNS,
    TALL_ENTRY_REGISTERS,
    TALL_REGISTERS,
    TALL_ROWS,
    chunks_of,
    corner,
    end_of,
    tiles_of,
)
from benthic.kernels.gluon_sums import described, fetch, leave, new_slots
from benthic.kernels.gluon_tiles import load, new_bars
from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import by_column
from benthic.kernels.reference.moe import squares_of
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

STAGES = gl.constexpr(4)
"""Chunks of both operands and their scales, 41 KiB each."""
SLOTS = gl.constexpr(2)
"""Parts of a group's sums, of four, that stand in shared memory until TMA has written or added them."""
FETCHED_ROWS = 1024
"""Padded rows an expert, on average, below which the cache reads old sums as a tile begins."""


@gluon.jit
def _corner(tile, o_dim, o_tiles, i_tiles):
    """Expert, first row and first column of a tile."""
    expert = tile // (o_tiles * i_tiles)
    first = expert * o_tiles * i_tiles
    row, column = corner(tile, first, 0, o_dim, i_tiles, TALL_BAND, TALL_ROWS, TALL_COLUMNS)
    return expert, row, column


@gluon.jit
def _produce(
    dy, x, dy_scale, x_scale, rings, bars, ends_ptr, padded, o_dim, i_dim, tiles, o_tiles, i_tiles,
):  # fmt: skip
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    dy_ring, x_ring, dy_scales, x_scales = rings
    full, empty = bars
    of_rows: gl.constexpr = GROUPS * (dy.block_type.nbytes + dy_scale.block_type.nbytes)
    of_columns: gl.constexpr = x.block_type.nbytes + x_scale.block_type.nbytes
    place = (0, 0, 0, end_of(ends_ptr, 0, 1, padded))
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, column = _corner(tile, o_dim, o_tiles, i_tiles)
        place, chunks = chunks_of(expert, place, ends_ptr)
        for chunk in range(place[1], place[1] + chunks):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, of_rows + of_columns)
            for part in gl.static_range(GROUPS):
                at, first = GROUPS * stage + part, row + part * PART
                load(dy, [first, chunk * CHUNK], bar, dy_ring.index(at))
                load(dy_scale, [chunk * o_dim + first], bar, dy_scales.index(at))
            load(x, [column, chunk * CHUNK], bar, x_ring.index(stage))
            load(x_scale, [chunk * i_dim + column], bar, x_scales.index(stage))
            number += 1


@gluon.jit
def _multiply(
    group, rings, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
    padded, o_dim, i_dim, tiles, o_tiles, i_tiles,
    ADD: gl.constexpr, FETCH: gl.constexpr, SQUARES: gl.constexpr,
):  # fmt: skip
    """The 64 rows of a group, tile after tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TALL_COLUMNS, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, SUMS)
    dy_ring, x_ring, dy_scales, x_scales = rings
    full, empty = bars
    zero = gl.zeros([PART, TALL_COLUMNS], gl.float32, layout=SUMS)
    place = (0, 0, 0, end_of(ends_ptr, 0, 1, padded))
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, column = _corner(tile, o_dim, o_tiles, i_tiles)
        row += group * PART
        place, chunks = chunks_of(expert, place, ends_ptr)
        if FETCH:
            fetch(out_ptr, expert, chunks > 0, row, column, o_dim, i_dim, PART, TALL_COLUMNS)
        sums = zero
        for _chunk in range(chunks):
            stage = number % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            dy_tile, x_tile = dy_ring.index(GROUPS * stage + group), x_ring.index(stage)
            part = warpgroup_mma(dy_tile, x_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            by_row = dy_scales.index(GROUPS * stage + group).load(BY_ROW)
            part = warpgroup_mma_wait(0, deps=[part])
            by_column = x_scales.index(stage).load(BY_COLUMN)
            sums += part * by_row[:, None] * by_column[None, :]
            fence_async_shared()  # scales were loaded by threads, which TMA does not wait for
            mbarrier.arrive(empty.index(stage), count=1)
            number += 1
        if (chunks > 0) | (not ADD):
            squares = leave(sums, slots, group, out, expert, row, column, SLOTS, ADD, False, SQUARES)
            if SQUARES:  # what stands over an edge is 0 times another scale, which is finite
                gl.store(squares_ptr + GROUPS * tile + group, gl.sum(squares, axis=0))
    tma.store_wait(0)


@remembered
@gluon.jit(do_not_specialize=["padded", "tiles", "o_tiles", "i_tiles"])
def _column_tiles(
    dy, x, dy_scale, x_scale, out, out_ptr, squares_ptr, ends_ptr,
    padded, o_dim, i_dim, tiles, o_tiles, i_tiles,
    ADD: gl.constexpr, FETCH: gl.constexpr, SQUARES: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts.

    SQUARES, where nothing is added: three numbers a tile.
    """
    dy_ring = gl.allocate_shared_memory(dy.dtype, [GROUPS * STAGES, PART, CHUNK], dy.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TALL_COLUMNS, CHUNK], x.layout)
    dy_scales = gl.allocate_shared_memory(gl.float32, [GROUPS * STAGES, PART], dy_scale.layout)
    x_scales = gl.allocate_shared_memory(gl.float32, [STAGES, TALL_COLUMNS], x_scale.layout)
    rings = (dy_ring, x_ring, dy_scales, x_scales)
    slots = new_slots(out, GROUPS * SLOTS)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, GROUPS))
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, rings, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
            padded, o_dim, i_dim, tiles, o_tiles, i_tiles, ADD, FETCH, SQUARES,
        )),
        (_multiply, (
            1, rings, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
            padded, o_dim, i_dim, tiles, o_tiles, i_tiles, ADD, FETCH, SQUARES,
        )),
        (_multiply, (
            2, rings, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
            padded, o_dim, i_dim, tiles, o_tiles, i_tiles, ADD, FETCH, SQUARES,
        )),
        (_produce, (
            dy, x, dy_scale, x_scale, rings, bars, ends_ptr, padded, o_dim, i_dim, tiles, o_tiles, i_tiles,
        )),
    ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


def _scales_of(scale, columns):
    """A descriptor of some columns' scales: chunk after chunk, as a line of numbers."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(by_column(scale), [scale.numel()], [1], [columns], layout)


def weight_gradient(dy, x, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_weight_gradient`; the launch follows from shapes."""
    o_dim, i_dim = dy.values.shape[0], x.values.shape[0]
    shape = (o_dim, i_dim) if ends_E is None else (ends_E.shape[0], o_dim, i_dim)
    out = torch.empty(shape, dtype=dtype, device=x.values.device)
    _launch(out, dy, x, ends_E, add=False)
    return out


def add_weight_gradient(into, dy, x, ends_E, *, fresh, squares=False):
    """See `benthic.kernels.ops.add_fp8_weight_gradient`; every sum is added once."""
    return _launch(into, dy, x, ends_E, add=not fresh, squares=squares)


def _launch(out, dy, x, ends_E, *, add, squares=False):
    """Launch; the squares of every group's part of a tile, if asked for."""
    (o_dim, padded), i_dim = dy.values.shape, x.values.shape[0]
    if not padded:
        if not add:
            out.zero_()
        return squares_of(out) if squares else None
    experts = 1 if ends_E is None else ends_E.shape[0]
    o_tiles, i_tiles = cdiv(o_dim, TALL_ROWS.value), cdiv(i_dim, TALL_COLUMNS.value)
    tiles = experts * o_tiles * i_tiles
    programs = min(multiprocessors(out.device), tiles)
    sums, parts_of_sums = described(out)
    parts = torch.empty(GROUPS.value * tiles, dtype=torch.float32, device=out.device) if squares else None
    _column_tiles[(programs,)](
        tiles_of(dy.values), tiles_of(x.values, TALL_COLUMNS.value),
        _scales_of(dy.scale, PART.value), _scales_of(x.scale, TALL_COLUMNS.value),
        parts_of_sums, sums, parts, ends_E, padded, o_dim, i_dim, tiles, o_tiles, i_tiles,
        ADD=add, FETCH=add and padded < FETCHED_ROWS * experts, SQUARES=squares,
        REGISTERS=TALL_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4, maxnreg=TALL_ENTRY_REGISTERS,
    )  # fmt: skip
    if sums is not out:
        out.copy_(sums)
    return parts
