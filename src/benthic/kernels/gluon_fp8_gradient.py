# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The weight gradient of FP8 products for Hopper in Gluon; built like `gluon_fp8`.

    dweight[e, o, i] = sum over chunks of 128 rows of expert e of (dy[o, :] . x[i, :]) * their two scales

Both operands lie column by column, padded so that no chunk has rows of two experts, and both have a scale
for each column and chunk. All experts have as many tiles, whatever their number of chunks.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    CONSUMER_REGISTERS,
    ENTRY_REGISTERS,
    PART,
    PRODUCER_REGISTERS,
    ROWS,
    chunks_of,
    one_end,
    start,
    tiles_of,
)
from benthic.kernels.gluon_tiles import load, new_bars
from benthic.kernels.triton_tiles import multiprocessors

COLUMNS = gl.constexpr(128)
STAGES = gl.constexpr(6)


@gluon.jit
def _corner(tile, o_tiles, i_tiles):
    """Expert, first row and first column of a tile."""
    number = tile % (o_tiles * i_tiles)
    return tile // (o_tiles * i_tiles), number % o_tiles * ROWS, number // o_tiles * COLUMNS


@gluon.jit
def _produce(dy, x, dy_ring, x_ring, bars, ends_ptr, tiles, o_tiles, i_tiles):
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    full, empty = bars
    place = (0, 0, 0, gl.load(ends_ptr))
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, column = _corner(tile, o_tiles, i_tiles)
        place, chunks = chunks_of(expert, place, ends_ptr)
        for chunk in range(place[1], place[1] + chunks):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, 2 * dy.block_type.nbytes + 2 * x.block_type.nbytes)
            for part in gl.static_range(2):
                load(dy, [row + part * PART, chunk * CHUNK], bar, dy_ring.index(2 * stage + part))
                load(x, [column + part * PART, chunk * CHUNK], bar, x_ring.index(2 * stage + part))
            number += 1


@gluon.jit
def _multiply(
    group, dy_ring, x_ring, bars, dy_scale_ptr, x_scale_ptr, out_ptr, ends_ptr,
    o_dim, i_dim, tiles, o_tiles, i_tiles,
):  # fmt: skip
    """The 64 rows of a group, tile after tile; one part is promoted while the next is multiplied."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    full, empty = bars
    zero = gl.zeros([PART, PART], gl.float32, layout=SUMS)
    place = (0, 0, 0, gl.load(ends_ptr))
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, column = _corner(tile, o_tiles, i_tiles)
        place, chunks = chunks_of(expert, place, ends_ptr)
        row += group * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, SUMS))
        column += gl.arange(0, PART, layout=gl.SliceLayout(0, SUMS))
        dy_scale_at = dy_scale_ptr + gl.minimum(row, o_dim - 1)
        x_scale_at = x_scale_ptr + column
        sum_0, sum_1 = zero, zero
        for chunk in range(place[1], place[1] + chunks):
            stage = number % STAGES
            by_row = gl.load(dy_scale_at + chunk * o_dim)
            of_chunk = x_scale_at + chunk * i_dim
            by_column_0 = gl.load(of_chunk, mask=column < i_dim, other=0.0)
            by_column_1 = gl.load(of_chunk + PART, mask=column + PART < i_dim, other=0.0)
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            dy_tile = dy_ring.index(2 * stage + group)
            part_0 = start(dy_tile, x_ring, 2 * stage, zero)
            part_1 = start(dy_tile, x_ring, 2 * stage + 1, zero)
            part_0 = warpgroup_mma_wait(1, deps=[part_0])
            sum_0 += part_0 * by_row[:, None] * by_column_0[None, :]
            part_1 = warpgroup_mma_wait(0, deps=[part_1])
            mbarrier.arrive(empty.index(stage), count=1)
            sum_1 += part_1 * by_row[:, None] * by_column_1[None, :]
            number += 1
        at = out_ptr + (row.to(gl.int64) + expert * o_dim)[:, None] * i_dim + column[None, :]
        kept = (row < o_dim)[:, None]
        gl.store(at, sum_0.to(out_ptr.dtype.element_ty), mask=kept & (column < i_dim)[None, :])
        gl.store(at + PART, sum_1.to(out_ptr.dtype.element_ty), mask=kept & (column + PART < i_dim)[None, :])


@gluon.jit
def _column_tiles(
    dy, x, dy_scale_ptr, x_scale_ptr, out_ptr, ends_ptr,
    o_dim, i_dim, tiles, o_tiles, i_tiles,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts."""
    dy_ring = gl.allocate_shared_memory(dy.dtype, [2 * STAGES, PART, CHUNK], dy.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, PART, CHUNK], x.layout)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, dy_ring, x_ring, bars, dy_scale_ptr, x_scale_ptr, out_ptr, ends_ptr,
            o_dim, i_dim, tiles, o_tiles, i_tiles,
        )),
        (_multiply, (
            1, dy_ring, x_ring, bars, dy_scale_ptr, x_scale_ptr, out_ptr, ends_ptr,
            o_dim, i_dim, tiles, o_tiles, i_tiles,
        )),
        (_produce, (dy, x, dy_ring, x_ring, bars, ends_ptr, tiles, o_tiles, i_tiles)),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def weight_gradient(dy, x, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_weight_gradient`; the launch follows from shapes."""
    (o_dim, padded), i_dim = dy.values.shape, x.values.shape[0]
    ends = one_end(padded, x.values.device) if ends_E is None else ends_E
    experts = ends.shape[0]
    shape = (o_dim, i_dim) if ends_E is None else (experts, o_dim, i_dim)
    if not padded:
        return torch.zeros(shape, dtype=dtype, device=x.values.device)
    out = torch.empty(shape, dtype=dtype, device=x.values.device)
    o_tiles, i_tiles = triton.cdiv(o_dim, ROWS.value), triton.cdiv(i_dim, COLUMNS.value)
    tiles = experts * o_tiles * i_tiles
    programs = min(multiprocessors(out.device), tiles)
    _column_tiles[(programs,)](
        tiles_of(dy.values), tiles_of(x.values), dy.scale.t().contiguous(), x.scale.t().contiguous(),
        out, ends,
        o_dim, i_dim, tiles, o_tiles, i_tiles,
        REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4, maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
    return out
