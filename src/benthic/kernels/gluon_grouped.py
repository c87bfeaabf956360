# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The product of experts' rows for Hopper in Gluon: one warp loads, groups of four warps multiply.

    out[r, n] = sum over k of x[r, k] * weight[expert of r, k, n]

Both the output (a weight's rows are the columns n) and the gradient of the input (they are the dims k): the
tensor cores read a weight's tile as it lies or turned round. Groups have rows of their own and share a tile
of the weight. A group all of whose rows are behind the expert's end loads and multiplies nothing, so an
expert's last tile costs what its rows cost.

There is one program a multiprocessor. All parts walk over the tiles of all experts by themselves, from ends
that lie on the device, so the next tile is loaded while the last one is written. Sums leave through shared
memory: by TMA, or where another expert's rows follow, by threads that write what is theirs.
"""

from __future__ import annotations

from typing import NamedTuple

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
from benthic.kernels.gluon_tiles import DTYPES, load, meet, new_bars, unload
from benthic.kernels.grouped_mm import GroupedMm
from benthic.kernels.triton_tiles import multiprocessors

CHUNK = gl.constexpr(64)
"""Dims that are multiplied at once."""
PRODUCER_REGISTERS = 24


class Tile(NamedTuple):
    """How a tile is divided.

    Attributes:
        groups: groups of warps that multiply.
        part: rows that each of them has.
        width: columns of a product.
        products: products of a group beside one another, as many as make a tile's columns.
        piece: columns that leave the registers at once.
        stages: places of the ring.
        band: tiles of rows that meet a tile of columns one after another, so that both stay in the cache.
        registers: of a thread that multiplies.
        entry_registers: of a thread before the groups divide them.
    """

    groups: int
    part: int
    width: int
    products: int
    piece: int
    stages: int
    band: int
    registers: int
    entry_registers: int


THREE = Tile(3, 64, 128, 2, 128, 3, 16, 160, 128)
TWO = Tile(2, 64, 256, 1, 128, 4, 16, 240, 168)
TALL = Tile(2, 128, 128, 1, 64, 4, 16, 240, 168)
NARROW = Tile(3, 64, 128, 1, 128, 4, 16, 160, 128)


@gluon.jit
def _find(
    tile, place, ends_ptr, rows, experts, n_tiles,
    BAND: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Expert, first row, end of rows and first column of a tile; and the place to go on from."""
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    expert, first, start, end = place
    row, column = corner(tile, first, start, end, n_tiles, BAND, ROWS, COLUMNS)
    return place, (expert, row, end, column)


@gluon.jit
def _produce(
    x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, GROUPS: gl.constexpr, PRODUCTS: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr,
):  # fmt: skip
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    PART: gl.constexpr = x.block_type.shape[0]
    WIDTH: gl.constexpr = weight.block_type.shape[0 if TURNED else 1]
    full, empty = bars
    tile, number = gl.program_id(0), 0
    place = (0, 0, 0, gl.load(ends_ptr))
    place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles, BAND, GROUPS * PART, PRODUCTS * WIDTH)
    while at[0] < experts:
        expert, row, end, column = at
        parts = gl.minimum((end - row + PART - 1) // PART, GROUPS)
        for k in range(0, k_dim, CHUNK):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            for part in gl.static_range(GROUPS):
                mbarrier.expect(
                    bar, (part + 1) * x.block_type.nbytes + PRODUCTS * weight.block_type.nbytes,
                    pred=parts == part + 1,
                )  # fmt: skip
            for part in gl.static_range(GROUPS):
                at_x = [row + part * PART, k]
                load(x, at_x, bar, x_ring.index(GROUPS * stage + part), pred=part < parts)
            for part in gl.static_range(PRODUCTS):
                first, to = column + part * WIDTH, weight_ring.index(PRODUCTS * stage + part)
                if TURNED:
                    load(weight, [expert * n_dim + first, k], bar, to)
                else:
                    load(weight, [expert * k_dim + k, first], bar, to)
            number += 1
        tile += gl.num_programs(0)
        place, at = _find(
            tile, place, ends_ptr, rows, experts, n_tiles, BAND, GROUPS * PART, PRODUCTS * WIDTH
        )


@gluon.jit
def _halves(x):
    """The first and the last columns."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _write_piece(sums, row, end, column, out, out_tile, out_ptr, n_dim):
    """Write the columns of a group's rows that leave the registers at once."""
    PART: gl.constexpr = out_tile.shape[0]
    PIECE: gl.constexpr = out_tile.shape[1]
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
def _write(sums, row, end, column, out, out_tile, out_ptr, n_dim):
    """Write a group's rows of a tile, piece after piece."""
    PIECE: gl.constexpr = out_tile.shape[1]
    if sums.shape[1] == PIECE:
        _write_piece(sums, row, end, column, out, out_tile, out_ptr, n_dim)
    else:
        halves = _halves(sums)
        for half in gl.static_range(2):
            first = column + half * (sums.shape[1] // 2)
            _write_piece(halves[half], row, end, first, out, out_tile, out_ptr, n_dim)


@gluon.jit
def _multiply(
    group, x_ring, weight_ring, bars, out, out_tile, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, GROUPS: gl.constexpr, PRODUCTS: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr,
):  # fmt: skip
    """The rows of a group, tile after tile."""
    PART: gl.constexpr = out_tile.shape[0]
    WIDTH: gl.constexpr = weight_ring.shape[1 if TURNED else 2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    full, empty = bars
    tile, number = gl.program_id(0), 0
    place = (0, 0, 0, gl.load(ends_ptr))
    place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles, BAND, GROUPS * PART, PRODUCTS * WIDTH)
    while at[0] <= experts:
        expert, row, end, column = at
        row += group * PART
        last = gl.where(expert < experts, k_dim, 0)
        if row < end:
            sums = gl.zeros([PART, WIDTH], gl.float32, layout=SUMS)
            more = sums
            for k in range(0, last, CHUNK):
                stage, before = number % STAGES, (number + STAGES - 1) % STAGES
                mbarrier.wait(full.index(stage), (number // STAGES) & 1)
                x_tile, weights = x_ring.index(GROUPS * stage + group), PRODUCTS * stage
                sums = _start(x_tile, weight_ring.index(weights), sums, TURNED)
                if PRODUCTS == 2:
                    more = _start(x_tile, weight_ring.index(weights + 1), more, TURNED)
                    sums, more = warpgroup_mma_wait(2, deps=[sums, more])
                else:
                    sums = warpgroup_mma_wait(1, deps=[sums])
                mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
                number += 1
            if PRODUCTS == 2:
                sums, more = warpgroup_mma_wait(0, deps=[sums, more])
            else:
                sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1, pred=last > 0)
            _write(sums, row, end, column, out, out_tile, out_ptr, n_dim)
            if PRODUCTS == 2:
                _write(more, row, end, column + WIDTH, out, out_tile, out_ptr, n_dim)
        else:
            for _k in range(0, last, CHUNK):
                mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1)
                mbarrier.arrive(empty.index(number % STAGES), count=1)
                number += 1
        tile += gl.num_programs(0)
        place, at = _find(
            tile, place, ends_ptr, rows, experts, n_tiles, BAND, GROUPS * PART, PRODUCTS * WIDTH
        )
    tma.store_wait(0)


@gluon.jit
def _start(x_tile, weight_tile, sums, TURNED: gl.constexpr):
    """Start a product that is added to sums."""
    if TURNED:
        weight_tile = weight_tile.permute((1, 0))
    return warpgroup_mma(x_tile, weight_tile, sums, is_async=True)


@gluon.jit(do_not_specialize=["rows", "experts", "n_tiles"])
def _rows_times_experts(
    x, weight, out, out_ptr, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, GROUPS: gl.constexpr, PRODUCTS: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts. TURNED: weights are [E, N, K]."""
    PART: gl.constexpr = x.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, PART, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(
        weight.dtype,
        [PRODUCTS * STAGES, weight.block_type.shape[0], weight.block_type.shape[1]],
        weight.layout,
    )
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, PART, out.block_type.shape[1]], out.layout)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, GROUPS))
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (
                0, x_ring, weight_ring, bars, out, out_tiles.index(0), out_ptr, ends_ptr,
                rows, experts, n_dim, k_dim, n_tiles, TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
            (_multiply, (
                1, x_ring, weight_ring, bars, out, out_tiles.index(1), out_ptr, ends_ptr,
                rows, experts, n_dim, k_dim, n_tiles, TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
            (_produce, (
                x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
                TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                0, x_ring, weight_ring, bars, out, out_tiles.index(0), out_ptr, ends_ptr,
                rows, experts, n_dim, k_dim, n_tiles, TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
            (_multiply, (
                1, x_ring, weight_ring, bars, out, out_tiles.index(1), out_ptr, ends_ptr,
                rows, experts, n_dim, k_dim, n_tiles, TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
            (_multiply, (
                2, x_ring, weight_ring, bars, out, out_tiles.index(2), out_ptr, ends_ptr,
                rows, experts, n_dim, k_dim, n_tiles, TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
            (_produce, (
                x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_dim, n_tiles,
                TURNED, GROUPS, PRODUCTS, STAGES, BAND,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`; the gradient of weights is the library's product."""
    return GroupedMm.apply(x_RI, weight_EOI, ends_E, multiply)


def multiply(x_RK, weight_EKN, ends_E, tile=None):
    """`out[r] = x[r] @ weight[expert of r]`; the weight's dims may lie in either order."""
    rows, k_dim = x_RK.shape
    experts, _, n_dim = weight_EKN.shape
    out_RN = torch.empty(rows, n_dim, dtype=x_RK.dtype, device=x_RK.device)
    tile = tile or TWO
    turned = weight_EKN.stride(2) != 1
    weight = (weight_EKN.transpose(1, 2) if turned else weight_EKN).contiguous().flatten(0, 1)
    block = [tile.width, CHUNK.value] if turned else [CHUNK.value, tile.width]
    tall, n_tiles = tile.groups * tile.part, triton.cdiv(n_dim, tile.width * tile.products)
    programs = min(multiprocessors(x_RK.device), (rows // tall + experts + 1) * n_tiles)
    if rows:
        _rows_times_experts[(programs,)](
            _described(_loadable(x_RK), [tile.part, CHUNK.value]), _described(weight, block),
            _described(out_RN, [tile.part, tile.piece]), out_RN, ends_E,
            rows, experts, n_dim, k_dim, n_tiles,
            TURNED=turned, GROUPS=tile.groups, PRODUCTS=tile.products, STAGES=tile.stages, BAND=tile.band,
            REGISTERS=tile.registers, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=tile.entry_registers,
        )  # fmt: skip
    return out_RN


def _loadable(x_RK):
    """As TMA takes it: rows that begin and step by multiples of 16 bytes."""
    steps = x_RK.stride(0) % 8 == 0 and x_RK.stride(0) >= x_RK.shape[1]
    aligned = x_RK.stride(1) == 1 and steps and x_RK.data_ptr() % 16 == 0
    return x_RK if aligned else x_RK.contiguous()


def _described(x_RD, block):
    """A descriptor of blocks of a matrix; zeros lie behind its last row and column."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x_RD.dtype])
    return TensorDescriptor(x_RD, list(x_RD.shape), [x_RD.stride(0), 1], block, layout)
