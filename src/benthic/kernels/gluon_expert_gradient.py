# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The gradient of experts' weights for Hopper in Gluon: one warp loads, two warp groups multiply.

    dweight[e, o, i] = sum over the rows r of expert e of dy[r, o] * x[r, i], or with ADD: += that

A tile is 128 columns of the left operand by 256 of the right one, 64 x 256 of them a group's. Blocks of 64
rows come by TMA into a ring of shared memory, as they lie: the tensor cores read both operands turned round.
Which of dy and x is the right operand is chosen so that fewer tiles stand over the edge.

There is one program a multiprocessor. All three parts walk over the tiles of all experts by themselves, so
the next tile is loaded, and multiplied, while the last one leaves: its sums go to shared memory, 32 columns
at a time, from where TMA writes them or has the second-level cache add them, in float32 and once each, so
results are the same every time. Where experts have few rows the cache reads old sums while their tile is
multiplied. Where the squares of what is written are asked for, a group writes those of its part of a tile.
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

from benthic.kernels.gluon_tiles import add, blocks_of, layout_of, load, meet, new_bars, unload, view
from benthic.kernels.host import cdiv
from benthic.kernels.reference.moe import squares_of
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

LEFT = gl.constexpr(128)
RIGHT = gl.constexpr(256)
"""Columns of the operands that meet in a tile."""
HALF = gl.constexpr(64)
"""Columns of the left operand that a group has."""
BLOCK = gl.constexpr(64)
"""Rows that are multiplied at once."""
STAGES = gl.constexpr(4)
PART = gl.constexpr(32)
"""Columns of sums that leave the registers at once: 128 bytes of float32."""
SLOTS = gl.constexpr(2)
"""Such parts of a group that stand in shared memory until TMA has written or added them."""
FETCHED_ROWS = 768
"""Rows an expert, on average, below which the cache reads old sums as a tile begins, not when they are met.

On an H200 64 experts with 384 rows add 1,202 us so, 1,262 without; with 1,536 rows 2,233 and 2,078.
"""
BAND = gl.constexpr(16)
"""Left tiles that meet a right one one after another, so that both stay in the cache."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


@gluon.jit
def _corner(tile, left_tiles, right_tiles):
    """Expert, first left and first right column of a tile: bands of left tiles, each right one by one."""
    expert = tile // (left_tiles * right_tiles)
    number = tile % (left_tiles * right_tiles)
    band = number // (BAND * right_tiles) * BAND
    high = gl.minimum(left_tiles - band, BAND)
    number = number % (BAND * right_tiles)
    return expert, (band + number % high) * LEFT, number // high * RIGHT


@gluon.jit
def _rows_of(ends_ptr, expert):
    """First row and end of an expert."""
    start = gl.load(ends_ptr + (expert - 1), mask=expert > 0, other=0)
    return start, gl.load(ends_ptr + expert)


@gluon.jit
def _produce(left, right, left_ring, right_ring, bars, ends_ptr, tiles, left_tiles, right_tiles):
    """Load block after block of this program's tiles as places in the ring come free."""
    full, empty = bars
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, first_left, first_right = _corner(tile, left_tiles, right_tiles)
        start, end = _rows_of(ends_ptr, expert)
        for row in range(start, end, BLOCK):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, 2 * left.block_type.nbytes + right.block_type.nbytes)
            for group in gl.static_range(2):
                load(left, [row, first_left + group * HALF], bar, left_ring.index(2 * stage + group))
            load(right, [row, first_right], bar, right_ring.index(stage))
            number += 1


@gluon.jit
def _clear_after(block, kept, WIDTH: gl.constexpr):
    """Zero the rows of a block from `kept` on: they are of other tokens, and 0 times NaN is not 0.

    Both groups do so to what both read, and write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    for first in gl.static_range(0, BLOCK, 16):
        if kept < first + 16:
            for column in gl.static_range(0, WIDTH, 64):
                part = block.slice(first, 16).slice(column, 64, dim=1)
                value = part.load(layout)
                part.store(gl.where((row < kept - first)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _halves(x):
    """The first and the last columns."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _eighths(x):
    """All columns, `PART` after `PART`."""
    first, last = _halves(x)
    a, b = _halves(first)
    c, d = _halves(last)
    return _halves(a) + _halves(b) + _halves(c) + _halves(d)


@gluon.jit
def _fetch(out_ptr, expert, wanted, first_left, first_right, left_dim, right_dim, TURNED: gl.constexpr):
    """Have the second-level cache read the old sums of a group while it multiplies."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if TURNED:
        row = first_right + gl.arange(0, RIGHT, layout=layout)
        column = gl.zeros_like(row) + first_left
        width, height, some = left_dim, right_dim, HALF
    else:
        place = gl.arange(0, 2 * HALF, layout=layout)
        row, column = first_left + place % HALF, first_right + place // HALF * (RIGHT // 2)
        width, height, some = right_dim, left_dim, RIGHT // 2
    at = out_ptr + (expert.to(gl.int64) * height + row) * width + column
    size = gl.where((row < height) & wanted, gl.minimum(width - column, some), 0) * 4
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [at, size], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _give(part, slot, out, expert, left, right, ADD: gl.constexpr, TURNED: gl.constexpr):
    """Have TMA write or add some sums from shared memory, as soon as what stood there has left."""
    ROWS: gl.constexpr = out.block_type.shape[1]
    COLUMNS: gl.constexpr = out.block_type.shape[2]
    MATRIX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], out.dtype)
    matrix = view(slot, out.dtype, [ROWS, COLUMNS], MATRIX)
    tma.store_wait(SLOTS - 1)
    meet()
    if TURNED:
        matrix.permute((1, 0)).store(part.to(out.dtype))
        row, column = right, left
    else:
        matrix.store(part.to(out.dtype))
        row, column = left, right
    fence_async_shared()
    meet()
    if ADD:
        add(out, [expert, row, column], slot)
    else:
        unload(out, [expert, row, column], slot)


@gluon.jit
def _multiply(
    group, left_ring, right_ring, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
    left_dim, right_dim, tiles, left_tiles, right_tiles,
    ADD: gl.constexpr, FETCH: gl.constexpr, TURNED: gl.constexpr, SQUARES: gl.constexpr,
):  # fmt: skip
    """The 64 x 256 sums of a group, tile after tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RIGHT, 16])
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    full, empty = bars
    zero = gl.zeros([HALF, RIGHT], gl.float32, layout=SUMS)
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, first_left, first_right = _corner(tile, left_tiles, right_tiles)
        first_left += group * HALF
        start, end = _rows_of(ends_ptr, expert)
        if FETCH:
            _fetch(out_ptr, expert, end > start, first_left, first_right, left_dim, right_dim, TURNED)
        sums = zero
        for row in range(start, end, BLOCK):
            stage, before = number % STAGES, (number + STAGES - 1) % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            left, right = left_ring.index(2 * stage + group), right_ring.index(stage)
            if end - row < BLOCK:
                _clear_after(left, end - row, HALF)
                _clear_after(right, end - row, RIGHT)
                fence_async_shared()
                meet()
            sums = warpgroup_mma(left.permute((1, 0)), right, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index(before), count=1, pred=row > start)
            number += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1, pred=end > start)
        if (end > start) | (not ADD):
            squares = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, PARTS))
            parts = _eighths(sums)
            for i in gl.static_range(RIGHT // PART):
                part, slot = gl.convert_layout(parts[i], PARTS), slots.index(group * SLOTS + i % SLOTS)
                _give(part, slot, out, expert, first_left, first_right + i * PART, ADD, TURNED)
                if SQUARES:
                    squares += gl.sum(part * part, axis=1)
            if SQUARES:
                gl.store(squares_ptr + 2 * tile + group, gl.sum(squares, axis=0))
    tma.store_wait(0)


@remembered
@gluon.jit(do_not_specialize=["left_eights", "right_eights", "tiles", "left_tiles", "right_tiles"])
def _expert_gradient(
    left, right, out, out_ptr, squares_ptr, ends_ptr,
    left_eights, right_eights, tiles, left_tiles, right_tiles,
    ADD: gl.constexpr, FETCH: gl.constexpr, TURNED: gl.constexpr, SQUARES: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts.

    TURNED: the left operand is x. SQUARES, where nothing is added: two numbers a tile.
    """
    left_dim, right_dim = left_eights * 8, right_eights * 8
    left_ring = gl.allocate_shared_memory(left.dtype, [2 * STAGES, BLOCK, HALF], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, BLOCK, RIGHT], right.layout)
    ROWS: gl.constexpr = out.block_type.shape[1]
    COLUMNS: gl.constexpr = out.block_type.shape[2]
    slots = gl.allocate_shared_memory(out.dtype, [2 * SLOTS, 1, ROWS, COLUMNS], out.layout)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, left_ring, right_ring, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
            left_dim, right_dim, tiles, left_tiles, right_tiles, ADD, FETCH, TURNED, SQUARES,
        )),
        (_multiply, (
            1, left_ring, right_ring, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
            left_dim, right_dim, tiles, left_tiles, right_tiles, ADD, FETCH, TURNED, SQUARES,
        )),
        (_produce, (left, right, left_ring, right_ring, bars, ends_ptr, tiles, left_tiles, right_tiles)),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def grouped_weight_gradient(dy_RO, x_RI, ends_E, *, dtype):
    """See `benthic.kernels.ops.weight_gradient`; an expert without rows has zeros."""
    out_EOI = torch.empty(ends_E.shape[0], dy_RO.shape[1], x_RI.shape[1], dtype=dtype, device=x_RI.device)
    if not len(x_RI):  # a descriptor wants something to describe
        return out_EOI.zero_()
    _sum_rows(out_EOI, dy_RO, x_RI, ends_E, add=False)
    return out_EOI


def add_grouped_weight_gradient(into_EOI, dy_RO, x_RI, ends_E, *, fresh, squares=False):
    """See `benthic.kernels.ops.add_weight_gradient`; the launch follows from shapes."""
    if len(x_RI):
        return _sum_rows(into_EOI, dy_RO, x_RI, ends_E, add=not fresh, squares=squares)
    if fresh:
        into_EOI.zero_()
    return squares_of(into_EOI) if squares else None


def _sum_rows(out_EOI, dy_RO, x_RI, ends_E, *, add, squares=False):
    """Launch; the squares of the halves of every tile, if asked for."""
    experts, o_dim, i_dim = out_EOI.shape
    turned = _tiles(i_dim, o_dim) < _tiles(o_dim, i_dim)
    left, right = (x_RI, dy_RO) if turned else (dy_RO, x_RI)
    left_dim, right_dim = left.shape[1], right.shape[1]
    left_tiles, right_tiles = cdiv(left_dim, LEFT.value), cdiv(right_dim, RIGHT.value)
    tiles = experts * left_tiles * right_tiles
    programs = min(multiprocessors(x_RI.device), tiles)
    sums_EOI = out_EOI if out_EOI.data_ptr() % 16 == 0 else out_EOI.clone()  # TMA writes where 16 bytes begin
    parts = torch.empty(2 * tiles, dtype=torch.float32, device=x_RI.device) if squares else None
    _expert_gradient[(programs,)](
        _columns_of(left, HALF.value), _columns_of(right, RIGHT.value), _parts_of(sums_EOI, turned), sums_EOI,
        parts, ends_E, left_dim // 8, right_dim // 8, tiles, left_tiles, right_tiles,
        ADD=add, FETCH=add and len(x_RI) < FETCHED_ROWS * experts, TURNED=turned, SQUARES=squares,
        REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4, maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
    if sums_EOI is not out_EOI:
        out_EOI.copy_(sums_EOI)
    return parts


def _tiles(left_dim, right_dim):
    return cdiv(left_dim, LEFT.value) * cdiv(right_dim, RIGHT.value)


def _columns_of(x_RD, width):
    """A descriptor of blocks of rows by `width` columns; zeros lie behind the last of either."""
    aligned = x_RD.stride(1) == 1 and x_RD.stride(0) % 8 == 0 and x_RD.data_ptr() % 16 == 0
    x_RD = x_RD if aligned else x_RD.contiguous()
    return blocks_of(x_RD, BLOCK.value, width)


def box(turned):
    """Expert, rows and columns of the sums that leave at once."""
    return [1, PART.value, HALF.value] if turned else [1, HALF.value, PART.value]


def _parts_of(out_EOI, turned):
    """A descriptor of what leaves at once; TMA leaves out what stands over an expert's edge."""
    expert, rows, columns = block = box(turned)
    layout = layout_of(rows, columns, out_EOI.dtype, expert)
    return TensorDescriptor(out_EOI, list(out_EOI.shape), list(out_EOI.stride()), block, layout)
