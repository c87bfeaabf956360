# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The product of experts' rows for Hopper in Gluon: one warp loads, two groups of four warps multiply.

    out[r, n] = sum over k of x[r, k] * weight[expert of r, k, n]

Both the output (a weight's rows are the columns n) and the gradient of the input (they are the dims k): the
tensor cores read a weight's tile as it lies or turned round. Groups have 128 rows each and share 128 columns
of the weight. A group all of whose rows are behind the expert's end loads and multiplies nothing, so an
expert's last tile costs what its rows cost.

There is one program a multiprocessor. All parts walk over the tiles of all experts by themselves, from ends
that lie on the device, so the next tile is loaded while the last one is written. Sums leave through shared
memory: by TMA, or where another expert's rows follow, by threads that write what is theirs.
"""

from __future__ import annotations

import functools

import torch
import triton
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

from benthic.kernels.gluon_fp8_tiles import corner, expert_of
from benthic.kernels.gluon_tiles import load, meet, new_bars, take_context, unload
from benthic.kernels.grouped_mm import GroupedMm
from benthic.kernels.triton_tiles import multiprocessors

ROWS = gl.constexpr(256)
COLUMNS = gl.constexpr(128)
PART = gl.constexpr(128)
"""Rows of a tile that a group has."""
CHUNK = gl.constexpr(64)
"""Dims that are multiplied at once."""
PIECE = gl.constexpr(64)
"""Columns of sums that leave the registers at once."""
STAGES = gl.constexpr(4)
BAND = gl.constexpr(4)
"""Tiles of rows that meet a tile of columns one after another, so that both stay in the cache."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


@gluon.jit
def _find(tile, place, ends_ptr, rows, experts, n_tiles):
    """Expert, first row, end of rows and first column of a tile; and the place to go on from."""
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    expert, first, start, end = place
    row, column = corner(tile, first, start, end, n_tiles, BAND, ROWS, COLUMNS)
    return place, (expert, row, end, column)


@gluon.jit
def _produce(
    x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr,
):  # fmt: skip
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    ONE: gl.constexpr = x.block_type.nbytes + weight.block_type.nbytes
    BOTH: gl.constexpr = ONE + x.block_type.nbytes
    full, empty = bars
    tile, number = gl.program_id(0), 0
    place, at = _find(tile, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, rows, experts, n_tiles)
    while at[0] < experts:
        expert, row, end, column = at
        both = row + PART < end
        for k in range(0, k_dim, CHUNK):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, ONE, pred=row + PART >= end)
            mbarrier.expect(bar, BOTH, pred=both)
            load(x, [row, k], bar, x_ring.index(2 * stage))
            load(x, [row + PART, k], bar, x_ring.index(2 * stage + 1), pred=both)
            if TURNED:
                load(weight, [expert * n_dim + column, k], bar, weight_ring.index(stage))
            else:
                load(weight, [expert * k_dim + k, column], bar, weight_ring.index(stage))
            number += 1
        tile += gl.num_programs(0)
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)


@gluon.jit
def _write_piece(sums, row, end, column, out, out_tile, out_ptr, n_dim):
    """Write the columns of a group's rows that leave the registers at once."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    tma.store_wait(0)  # for what the group wrote last
    meet()
    out_tile.store(gl.convert_layout(sums.to(out_tile.dtype), SUMS))
    fence_async_shared()
    meet()
    if row + PART <= end:
        unload(out, [row, column], out_tile)
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PIECE, PIECE // 8], [4, 1], [1, 0])
        rows = row + gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, PIECE, layout=gl.SliceLayout(0, LAYOUT))
        kept = (rows < end)[:, None] & (columns < n_dim)[None, :]
        place = out_ptr + rows.to(gl.int64)[:, None] * n_dim + columns[None, :]
        gl.store(place, out_tile.load(LAYOUT), mask=kept)


@gluon.jit
def _multiply(
    group, x_ring, weight_ring, bars, out, out_tile, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr,
):  # fmt: skip
    """The rows of a group, tile after tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    full, empty = bars
    tile, number = gl.program_id(0), 0
    place, at = _find(tile, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, rows, experts, n_tiles)
    while at[0] <= experts:
        expert, row, end, column = at
        row += group * PART
        last = gl.where(expert < experts, k_dim, 0)
        if row < end:
            sums = gl.zeros([PART, COLUMNS], gl.float32, layout=SUMS)
            for k in range(0, last, CHUNK):
                stage, before = number % STAGES, (number + STAGES - 1) % STAGES
                mbarrier.wait(full.index(stage), (number // STAGES) & 1)
                weight_tile = weight_ring.index(stage)
                if TURNED:
                    weight_tile = weight_tile.permute((1, 0))
                sums = warpgroup_mma(x_ring.index(2 * stage + group), weight_tile, sums, is_async=True)
                sums = warpgroup_mma_wait(1, deps=[sums])
                mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
                number += 1
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1, pred=last > 0)
            pieces = gl.split(gl.permute(gl.reshape(sums, [PART, 2, PIECE]), (0, 2, 1)))
            for piece in gl.static_range(2):
                first = column + piece * PIECE
                _write_piece(pieces[piece], row, end, first, out, out_tile, out_ptr, n_dim)
        else:
            for _k in range(0, last, CHUNK):
                mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1)
                mbarrier.arrive(empty.index(number % STAGES), count=1)
                number += 1
        tile += gl.num_programs(0)
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "experts", "n_tiles"])
def _rows_times_experts(
    x, weight, out, out_ptr, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts. TURNED: weights are [E, N, K]."""
    block: gl.constexpr = weight.block_type.shape
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, PART, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, block[0], block[1]], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, PART, PIECE], out.layout)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, x_ring, weight_ring, bars, out, out_tiles.index(0), out_ptr, ends_ptr,
            rows, experts, n_dim, k_dim, n_tiles, TURNED,
        )),
        (_multiply, (
            1, x_ring, weight_ring, bars, out, out_tiles.index(1), out_ptr, ends_ptr,
            rows, experts, n_dim, k_dim, n_tiles, TURNED,
        )),
        (_produce, (
            x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_dim, n_tiles, TURNED,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`; the gradient of weights is the library's product."""
    return GroupedMm.apply(x_RI, weight_EOI, ends_E, multiply)


def multiply(x_RK, weight_EKN, ends_E):
    """`out[r] = x[r] @ weight[expert of r]`; the weight's dims may lie in either order."""
    rows, k_dim = x_RK.shape
    experts, _, n_dim = weight_EKN.shape
    out_RN = torch.empty(rows, n_dim, dtype=x_RK.dtype, device=x_RK.device)
    turned = weight_EKN.stride(2) != 1
    weight = (weight_EKN.transpose(1, 2) if turned else weight_EKN).contiguous()
    n_tiles = triton.cdiv(n_dim, COLUMNS.value)
    programs = min(multiprocessors(x_RK.device), (rows // ROWS.value + experts + 1) * n_tiles)
    if rows:
        take_context(x_RK.device)
        _rows_times_experts[(programs,)](
            _described(_loadable(x_RK), PART.value, CHUNK.value),
            _described(weight, *((COLUMNS.value, CHUNK.value) if turned else (CHUNK.value, COLUMNS.value))),
            _described(out_RN, PART.value, PIECE.value),
            out_RN, ends_E, rows, experts, n_dim, k_dim, n_tiles, TURNED=turned,
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS,
        )  # fmt: skip
    return out_RN


def _loadable(x_RK):
    """As TMA takes it: rows that begin and step by multiples of 16 bytes."""
    steps = x_RK.stride(0) % 8 == 0 and x_RK.stride(0) >= x_RK.shape[1]
    aligned = x_RK.stride(1) == 1 and steps and x_RK.data_ptr() % 16 == 0
    return x_RK if aligned else x_RK.contiguous()


def _described(x, rows, columns):
    """A descriptor of blocks of a matrix, or of some below one another; zeros lie behind them."""
    width, stride = x.shape[-1], x.stride(-2)
    return TensorDescriptor(
        x, [x.numel() // width, width], [stride, 1], [rows, columns], _layout(rows, columns)
    )


@functools.cache
def _layout(rows, columns):
    """Of a block in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
