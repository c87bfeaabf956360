# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The gradient of experts' weights for Hopper in Gluon: one warp loads, two warp groups multiply.

    dweight[e, o, i] = sum over the rows r of expert e of dy[r, o] * x[r, i], or with ADD: += that

A tile is 128 columns of the left operand by 256 of the right one, 64 x 256 of them a group's. Blocks of 64
rows come by TMA into a ring of shared memory, as they lie: the tensor cores read both operands turned round.
Which of dy and x is the right operand is chosen so that fewer tiles stand over the edge.

There is one program a multiprocessor. All three parts walk over the tiles of all experts by themselves, so
the next tile is loaded, and multiplied, while the last one leaves through shared memory (`gluon_sums`): TMA
writes it or has the second-level cache add it, in float32 and every sum once, so results are the same every
time. Where experts have few rows the cache reads old sums while their tile is multiplied. Where the squares
of what is written are asked for, a group writes those of its part of a tile.
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

from benthic.kernels.gluon_sums import described, fetch, leave, new_slots
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars
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
SLOTS = gl.constexpr(2)
"""Parts of a group's sums that stand in shared memory until TMA has written or added them."""
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

WAIT_NS = gl.constexpr(400)


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
    gl.inline_asm_elementwise("nanosleep.u32 $1; mov.b32 $0, 0;", "=r,r", [gl.program_id(0) * 37 % 11 * WAIT_NS], dtype=gl.int32, is_pure=False, pack=1)
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
def _multiply(
    group, left_ring, right_ring, slots, bars, out, out_ptr, squares_ptr, ends_ptr,
    left_dim, right_dim, tiles, left_tiles, right_tiles,
    ADD: gl.constexpr, FETCH: gl.constexpr, TURNED: gl.constexpr, SQUARES: gl.constexpr,
):  # fmt: skip
    """The 64 x 256 sums of a group, tile after tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RIGHT, 16])
    full, empty = bars
    zero = gl.zeros([HALF, RIGHT], gl.float32, layout=SUMS)
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, first_left, first_right = _corner(tile, left_tiles, right_tiles)
        first_left += group * HALF
        start, end = _rows_of(ends_ptr, expert)
        if FETCH:
            some = end > start
            if TURNED:
                fetch(out_ptr, expert, some, first_right, first_left, right_dim, left_dim, RIGHT, HALF)
            else:
                fetch(out_ptr, expert, some, first_left, first_right, left_dim, right_dim, HALF, RIGHT)
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
            squares = leave(
                sums, slots, group, out, expert, first_left, first_right, SLOTS, ADD, TURNED, SQUARES
            )
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
    slots = new_slots(out, 2 * SLOTS)
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
    sums_EOI, parts_of_sums = described(out_EOI, turned=turned)
    parts = torch.empty(2 * tiles, dtype=torch.float32, device=x_RI.device) if squares else None
    _expert_gradient[(programs,)](
        _columns_of(left, HALF.value), _columns_of(right, RIGHT.value), parts_of_sums, sums_EOI,
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
