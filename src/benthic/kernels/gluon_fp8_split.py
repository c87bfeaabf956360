# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""FP8 products of some dozens of rows for Hopper: every multiprocessor reads its share of the weight.

    out[r, n] = sum over chunks of 128 of K of (x[r, :] . weight[n, :]) * their two scales

With up to 128 rows a product takes as long as its weight is read, and there are fewer tiles of columns than
multiprocessors. So all chunks of all tiles, one tile after another, are divided evenly: a program multiplies
`share` of them, wherever tiles begin and end. A tile that one program has whole leaves by TMA. Of others
each program writes float32 sums, at most two a program, and a second kernel adds them in the order of K.
How chunks are divided follows from shapes and the number of multiprocessors (`division`), and so do all bits.

A warp loads; each of one to three groups of warps multiplies all rows with 64 columns. The first weights are
loaded before the kernel ahead has ended (`benthic.kernels.launch.wait_for_inputs` says why they may be).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    PART,
    PRODUCER_REGISTERS,
    TALL_ENTRY_REGISTERS,
    TALL_REGISTERS,
    start,
    tiles_of,
)
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars, unload
from benthic.kernels.host import cdiv
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

SHARED = 220 * 1024
"""Bytes of shared memory; what is left lets a program of the next kernel start."""
LEAST = 4
"""Chunks of a program, or its start would take longer than they do."""
SLICE = 8
"""Rows of a tile that a program of the second kernel adds."""
SECOND_KERNEL = 140 * 1024
"""Bytes that a multiprocessor could have read meanwhile, about 2.5 us of an H200."""

SIZES = ["rows", "share", "k_tiles", "m_tiles"]
STRIDES = ["stride_scale", "stride_tile", "stride_block", "stride_chunk"]
"""Numbers of which no kernel is compiled anew."""

_wait = gluon.jit(wait_for_inputs.fn)


class Division(NamedTuple):
    """How a product is divided.

    Attributes:
        rows: of a tile, 64 or 128.
        groups: of warps, each with 64 columns of a tile.
        share: chunks of a program.
        whole: every tile is one program's.
    """

    rows: int
    groups: int
    share: int
    whole: bool


def division(rows, n_dim, k_dim, processors):
    """The division that lets the busiest multiprocessor move the fewest bytes."""
    options = [
        _cost(rows, n_dim, k_dim, processors, groups, whole)
        for groups in (1, 2, 3)
        for whole in (True, False)
    ]
    return min(options)[1]


def _cost(rows, n_dim, k_dim, processors, groups, whole):
    """Bytes that a multiprocessor moves, and the division."""
    tall, wide = PART.value if rows <= PART.value else 2 * PART.value, groups * PART.value
    k_tiles, tiles = cdiv(k_dim, CHUNK.value), cdiv(rows, tall) * cdiv(n_dim, wide)
    share = max(cdiv(tiles * k_tiles, processors), LEAST)
    if whole or share % k_tiles == 0 or share > tiles * k_tiles:
        share, whole = k_tiles * cdiv(tiles, processors), True
    moved = share * (tall + wide) * CHUNK.value
    sums = 0 if whole else 2 * 4 * tall * wide + SECOND_KERNEL
    return moved + sums, Division(tall, groups, share, whole)


@gluon.jit
def _segment(at, begin, end, k_tiles):
    """First and last chunk of what a program has of a tile, and where their sums go if that is not all."""
    first = at % k_tiles
    return first, gl.minimum(k_tiles, first + end - at) - 1, 2 * gl.program_id(0) + gl.where(at > begin, 1, 0)


@gluon.jit
def _corner(at, k_tiles, m_tiles, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and column of the tile of a chunk: all rows of some columns, then the next ones."""
    tile = at // k_tiles
    return tile % m_tiles * ROWS, tile // m_tiles * COLUMNS


@gluon.jit
def _load_weight(x, weight, rings, at, number, k_tiles, m_tiles, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Start to load a chunk of columns; its barrier waits for the rows as well."""
    _x_ring, weight_ring, full, _empty = rings
    stage = number % STAGES
    bar = full.index(stage)
    _row, column = _corner(at, k_tiles, m_tiles, x.block_type.shape[0], GROUPS * PART)
    mbarrier.expect(bar, x.block_type.nbytes + GROUPS * weight.block_type.nbytes)
    for part in gl.static_range(GROUPS):
        place = weight_ring.index(GROUPS * stage + part)
        load(weight, [column + part * PART, at % k_tiles * CHUNK], bar, place)


@gluon.jit
def _produce(x, weight, rings, shape, GROUPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):
    """Load chunk after chunk as places in the ring come free."""
    x_ring, _weight_ring, full, empty = rings
    begin, end, _rows, _n_dim, k_tiles, m_tiles = shape
    for at in range(begin, gl.minimum(begin + STAGES, end)):
        _load_weight(x, weight, rings, at, at - begin, k_tiles, m_tiles, GROUPS, STAGES)
    _wait(PDL)
    for at in range(begin, end):
        number = at - begin
        stage = number % STAGES
        if number >= STAGES:
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            _load_weight(x, weight, rings, at, number, k_tiles, m_tiles, GROUPS, STAGES)
        row, _column = _corner(at, k_tiles, m_tiles, x.block_type.shape[0], GROUPS * PART)
        load(x, [row, at % k_tiles * CHUNK], full.index(stage), x_ring.index(stage))


@gluon.jit
def _multiply(
    group, rings, scales, out, out_tile, part_ptr, shape,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """All rows and 64 columns of every tile of which a program has chunks."""
    ROWS: gl.constexpr = out_tile.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    x_ring, weight_ring, full, empty = rings
    begin, end, rows, n_dim, k_tiles, m_tiles = shape
    x_scale_ptr, weight_scale_ptr, stride_scale, stride_tile, stride_block, stride_chunk = scales
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    zero = gl.zeros([ROWS, PART], gl.float32, layout=SUMS)
    _wait(PDL)
    at = begin
    while at < end:
        first, last, place = _segment(at, begin, end, k_tiles)
        row, column = _corner(at, k_tiles, m_tiles, ROWS, GROUPS * PART)
        column += group * PART
        block = gl.minimum(column, n_dim - 1) // CHUNK
        x_at = x_scale_ptr + gl.minimum(row + index, rows - 1).to(gl.int64) * stride_scale
        w_at = weight_scale_ptr + block * stride_block
        x_scale, w_scale = gl.load(x_at + first * stride_tile), gl.load(w_at + first * stride_chunk)
        sums = zero
        for chunk in range(first, last + 1):
            number = at - begin + chunk - first
            stage = number % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            part = start(x_ring.index(stage), weight_ring, GROUPS * stage + group, zero)
            scale, following = x_scale * w_scale, gl.minimum(chunk + 1, last)
            x_scale = gl.load(x_at + following * stride_tile)
            w_scale = gl.load(w_at + following * stride_chunk)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(stage), count=1)
            sums = sums + part * scale[:, None]
        if last - first + 1 == k_tiles:
            tma.store_wait(0)  # for what the group wrote last
            meet()
            out_tile.store(sums.to(out_tile.dtype))
            fence_async_shared()
            meet()
            unload(out, [row, column], out_tile)
        else:
            part_at = part_ptr + (place * GROUPS + group) * (ROWS * PART) + index[:, None] * PART
            columns = gl.arange(0, PART, layout=gl.SliceLayout(0, SUMS))
            gl.store(part_at + columns[None, :], sums, mask=(index < rows - row)[:, None])
        at += last - first + 1
    tma.store_wait(0)


@remembered
@gluon.jit(do_not_specialize=[*SIZES, "work", "n_dim", *STRIDES])
def _shares(
    x, weight, out, part_ptr, x_scale_ptr, weight_scale_ptr, rows, n_dim, work, share, k_tiles, m_tiles,
    stride_scale, stride_tile, stride_block, stride_chunk,
    ROWS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Every program multiplies `share` chunks, the last one what is left."""
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [GROUPS * STAGES, PART, CHUNK], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, PART], out.layout)
    rings = (x_ring, weight_ring, new_bars(STAGES, 1), new_bars(STAGES, GROUPS))
    scales = (x_scale_ptr, weight_scale_ptr, stride_scale, stride_tile, stride_block, stride_chunk)
    begin = gl.program_id(0) * share
    end = gl.minimum(begin + share, work)
    fence_async_shared()
    shape = (begin, end, rows, n_dim, k_tiles, m_tiles)
    if GROUPS == 1:
        gl.warp_specialize([
            (_multiply, (0, rings, scales, out, out_tiles.index(0), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_produce, (x, weight, rings, shape, GROUPS, STAGES, PDL)),
        ], [1], [FEW_REGISTERS])  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (0, rings, scales, out, out_tiles.index(0), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_multiply, (1, rings, scales, out, out_tiles.index(1), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_produce, (x, weight, rings, shape, GROUPS, STAGES, PDL)),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (0, rings, scales, out, out_tiles.index(0), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_multiply, (1, rings, scales, out, out_tiles.index(1), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_multiply, (2, rings, scales, out, out_tiles.index(2), part_ptr, shape, GROUPS, STAGES, PDL)),
            (_produce, (x, weight, rings, shape, GROUPS, STAGES, PDL)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


@remembered
@triton.jit(do_not_specialize=SIZES)
def _add_shares(
    part_ptr, out_ptr, rows, n_dim, share, k_tiles, m_tiles,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the sums of a tile that several programs have, in the order of K: some rows and 64 columns.

    Tiles are counted where all may be cut, ends of programs where these have more than a tile.
    """
    wait_for_inputs(PDL)
    tile, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    if share > k_tiles:
        tile = (tile + 1) * share // k_tiles
    first_chunk = tile * k_tiles
    program, last = first_chunk // share, (first_chunk + k_tiles - 1) // share
    if program == last:
        return
    row, column = tl.program_id(0) * SLICE + tl.arange(0, SLICE), tl.arange(0, PART)
    out_row, out_column = tile % m_tiles * ROWS + row, (tile // m_tiles * GROUPS + group) * PART + column
    kept = (out_row < rows)[:, None] & (out_column < n_dim)[None, :]
    part_at = part_ptr + (group * ROWS + row)[:, None] * PART + column[None, :]
    total = tl.zeros([SLICE, PART], tl.float32)
    while program <= last:
        for ahead in tl.static_range(8):  # which are on their way together
            own = program + ahead
            place = 2 * own + tl.where(own * share < first_chunk, 1, 0)
            own_at = part_at + place * (GROUPS * ROWS * PART)
            total += tl.load(own_at, mask=kept & (own <= last), other=0.0)
        program += 8
    out_at = out_ptr + out_row[:, None] * n_dim + out_column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=kept)


def linear(x, weight, ends_E, *, dtype):  # noqa: ARG001 (no experts)
    """See `benthic.kernels.ops.fp8_linear`; launches follow from shapes, so a CUDA graph can hold them."""
    (rows, k_dim), n_dim = x.values.shape, weight.values.shape[0]
    divided = division(max(rows, 1), n_dim, k_dim, multiprocessors(x.values.device))
    return multiply(x, weight, divided, dtype=dtype)


def multiply(x, weight, divided, *, dtype):
    """`linear` in a given division."""
    values, device = weight.values.contiguous(), weight.values.device
    (rows, k_dim), n_dim = x.values.shape, values.shape[0]
    tall, groups, share, whole = divided
    k_tiles, m_tiles = cdiv(k_dim, CHUNK.value), cdiv(rows, tall)
    tiles = m_tiles * cdiv(n_dim, groups * PART.value)
    programs = cdiv(tiles * k_tiles, share)
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=device)
    parts = x.scale  # of the same dtype, and nothing is written there
    if not whole:
        parts = torch.empty(2 * programs * groups * tall * PART.value, dtype=torch.float32, device=device)
    if rows:
        _shares[(programs,)](
            tiles_of(x.values, tall), tiles_of(values), blocks_of(out_RN, tall, PART.value),
            parts, x.scale, weight.scale, rows, n_dim, tiles * k_tiles, share, k_tiles, m_tiles,
            *x.scale.stride(), *weight.scale.stride(),
            ROWS=tall, GROUPS=groups, STAGES=stages(tall, groups),
            REGISTERS=TALL_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=TALL_ENTRY_REGISTERS, **early(device, rows),
        )  # fmt: skip
        if not whole:
            cut = min(tiles, programs - 1)
            _add_shares[(cdiv(min(rows, tall), SLICE), cut * groups)](
                parts, out_RN, rows, n_dim, share, k_tiles, m_tiles,
                ROWS=tall, GROUPS=groups, PART=PART.value, SLICE=SLICE, num_warps=4, **early(device, rows),
            )  # fmt: skip
    return out_RN


def stages(rows, groups):
    """Chunks in the ring of a program, beside the tile that leaves."""
    columns = groups * PART.value
    return (SHARED - 2 * rows * columns) // ((rows + columns) * CHUNK.value)
