# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""FP8 products for Hopper in Gluon: one warp loads, two warp groups of 64 rows each multiply and promote.

    out[r, n] = sum over chunks of 128 of K of (x[r, :] . weight[expert of r, n, :]) * their two scales

Tensor cores sum a chunk from zero; what it gives is scaled and added to float32 sums in registers, because
their own sums of FP8 products keep too few bits (DeepSeek-V3 report, section 3.3.2). A tile has 128 x 192,
which is as large as registers allow: 128 columns that share one scale of the weight, and the 64 before or
behind them. A group promotes the 128 while its 64 are multiplied, and the 64 beside the other group's
products. Scales are loaded a chunk ahead, those of a tile before the last one is written.

There is one program a multiprocessor. All three parts walk over the tiles of all experts by themselves, so
the next tile is loaded while the last one is written. Rows of an expert are counted on the device.

The last tiles of a single weight are divided evenly along K (`tail`), or a last wave would be half empty.
A program begins with the tile that the next one goes on with: sums lie in memory long before they are asked
for, and adding goes on from them, so that every output has the same bits as if its tile were whole.
"""

from __future__ import annotations

from math import gcd

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.fp8_waves import tail
from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    CONSUMER_REGISTERS,
    ENTRY_REGISTERS,
    PART,
    PRODUCER_REGISTERS,
    ROWS,
    corner,
    end_of,
    expert_of,
    start,
    tiles_of,
)
from benthic.kernels.gluon_tiles import layout_of, load, meet, new_bars
from benthic.kernels.host import cdiv
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

COLUMNS = gl.constexpr(192)
WIDE = gl.constexpr(128)
STAGES = gl.constexpr(4)
BAND = gl.constexpr(16)
SIZES = [
    "rows", "experts", "n_dim", "k_tiles", "n_tiles", "tiles", "whole", "share", "scale_tiles",
    "stride_scale", "stride_tile",
]  # fmt: skip
"""Numbers of which no kernel is compiled anew."""


@gluon.jit
def _piece(step, k_tiles, tiles, whole, share, TAIL: gl.constexpr):
    """Tile, first chunk and end of chunks of a program's step; those of the tail from the last tile on."""
    tile, first, last = gl.program_id(0) + step * gl.num_programs(0), 0, k_tiles
    if TAIL:
        begin = gl.program_id(0) * share
        end = gl.minimum(begin + share, (tiles - whole) * k_tiles)
        own = (end - 1) // k_tiles - step + whole // gl.num_programs(0)
        if tile >= whole:
            first, last = gl.maximum(begin - own * k_tiles, 0), gl.minimum(end - own * k_tiles, k_tiles)
            tile = whole + own
            if first >= k_tiles:  # behind the last
                tile, first = tiles, 0
    return tile, first, last


@gluon.jit
def _find(tile, place, ends_ptr, rows, experts, n_tiles):
    """Expert, first row, end of rows, first of 128 and of 64 columns; and the place to go on from."""
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    expert, first, begin, end = place
    row, column = corner(tile, first, begin, end, n_tiles, BAND, ROWS, COLUMNS)
    odd = column % WIDE
    return place, (expert, row, end, column + odd, column + WIDE - 2 * odd)


@gluon.jit
def _produce(x, wide, narrow, rings, bars, ends_ptr, sizes, TAIL: gl.constexpr):
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    x_ring, wide_ring, narrow_ring = rings
    full, empty = bars
    rows, experts, n_dim, k_tiles, n_tiles, tiles, whole, share = sizes
    step, number = 0, 0
    tile, first, last = _piece(step, k_tiles, tiles, whole, share, TAIL)
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    while at[0] < experts:
        expert, row, _end, column, beside = at
        for chunk in range(first, last):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, 2 * x.block_type.nbytes + wide.block_type.nbytes + narrow.block_type.nbytes)
            for part in gl.static_range(2):
                load(x, [row + part * PART, chunk * CHUNK], bar, x_ring.index(2 * stage + part))
            load(wide, [expert * n_dim + column, chunk * CHUNK], bar, wide_ring.index(stage))
            load(narrow, [expert * n_dim + beside, chunk * CHUNK], bar, narrow_ring.index(stage))
            number += 1
        step += 1
        tile, first, last = _piece(step, k_tiles, tiles, whole, share, TAIL)
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)


@gluon.jit
def _scales_at(at, group, scales, rows, experts, k_tiles, BY_ROW: gl.constexpr):
    """Where scales of a group's rows and of both parts' columns begin; somewhere allowed if it has none."""
    x_scale_ptr, weight_scale_ptr, scale_tiles, stride_scale, _stride_tile = scales
    expert, row, _end, column, beside = at
    row += group * PART + gl.arange(0, PART, layout=BY_ROW)
    block = gl.minimum(expert, experts - 1).to(gl.int64) * scale_tiles
    wide = block + gl.minimum(column // CHUNK, scale_tiles - 1)
    narrow = block + gl.minimum(beside // CHUNK, scale_tiles - 1)
    x_at = x_scale_ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride_scale
    return x_at, weight_scale_ptr + wide * k_tiles, weight_scale_ptr + narrow * k_tiles


@gluon.jit
def _scales_of(places, chunk, stride_tile):
    """The scales of a chunk."""
    return gl.load(places[0] + chunk * stride_tile), gl.load(places[1] + chunk), gl.load(places[2] + chunk)


@gluon.jit
def _parts_at(part_ptr, program, group, layout: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Where a program's sums of some columns lie, if another one goes on with its tile."""
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    column = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    first = (2 * program + group) * (PART * COLUMNS)
    return part_ptr + first + row[:, None] * COLUMNS + column[None, :]


@gluon.jit
def _go_on_from(part_ptr, ends_ptr, group, rows, WIDE_SUMS: gl.constexpr, SUMS: gl.constexpr):
    """The sums with which the program before this one has begun a tile, in its first step of the tail."""
    program = gl.program_id(0) - 1
    ready_ptr = ends_ptr + 1 + 2 * program + group
    seen = gl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
    while seen == rows:
        seen = gl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
    wide = gl.load(_parts_at(part_ptr, program, group, WIDE_SUMS, 0, WIDE))
    return wide, gl.load(_parts_at(part_ptr, program, group, SUMS, WIDE, PART))


@gluon.jit
def _hand_over(wide, narrow, part_ptr, ends_ptr, group, WIDE_SUMS: gl.constexpr, SUMS: gl.constexpr):
    """Write sums for the program behind this one, then say so."""
    program = gl.program_id(0)
    gl.store(_parts_at(part_ptr, program, group, WIDE_SUMS, 0, WIDE), wide)
    gl.store(_parts_at(part_ptr, program, group, SUMS, WIDE, PART), narrow)
    meet()
    gl.atomic_add(ends_ptr + 1 + 2 * program + group, 1, sem="release", scope="gpu")


@gluon.jit
def _write(sums, row, end, column, n_dim, out_tile, out_ptr, TOGETHER: gl.constexpr):
    """Write a group's 64 rows of some columns, through shared memory, so that a thread has 8 in a row.

    `TOGETHER` of them, of two bytes or four, are aligned: parts of a kernel know nothing of their arguments.
    """
    WIDTH: gl.constexpr = out_tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    out_tile.store(sums.to(out_tile.dtype))
    width = n_dim // TOGETHER * TOGETHER
    below = gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT))
    beside = gl.arange(0, PART, layout=gl.SliceLayout(0, LAYOUT))
    for part in gl.static_range(0, WIDTH, PART):
        first = gl.multiple_of(out_ptr + (row.to(gl.int64) * width + column + part), 2 * TOGETHER)
        kept = (below < end - row)[:, None] & (beside < width - (column // PART * PART + part))[None, :]
        values = out_tile.slice(part, PART, dim=1).load(LAYOUT)
        gl.store(first + below[:, None] * width + beside[None, :], values, mask=kept)


@gluon.jit
def _multiply(
    group, rings, bars, scales, out_tile, out_ptr, part_ptr, ends_ptr, sizes, TOGETHER: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """The 64 rows of a group, tile after tile."""
    WIDE_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    x_ring, wide_ring, narrow_ring = rings
    full, empty = bars
    rows, experts, n_dim, k_tiles, n_tiles, tiles, whole, share = sizes
    wide_zero = gl.zeros([PART, WIDE], gl.float32, layout=WIDE_SUMS)
    zero = gl.zeros([PART, PART], gl.float32, layout=SUMS)
    step, number = 0, 0
    tile, first, last = _piece(step, k_tiles, tiles, whole, share, TAIL)
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    places = _scales_at(at, group, scales, rows, experts, k_tiles, BY_ROW)
    x_scale, wide_scale, scale = _scales_of(places, first, scales[4])
    while at[0] <= experts:
        wide, narrow = wide_zero, zero
        if TAIL and first > 0:
            wide, narrow = _go_on_from(part_ptr, ends_ptr, group, rows, WIDE_SUMS, SUMS)
        for chunk in range(first, gl.where(at[0] < experts, last, first)):
            stage = number % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            x_tile, wide_tile = x_ring.index(2 * stage + group), wide_ring.index(stage)
            part = warpgroup_mma(x_tile, wide_tile.permute((1, 0)), wide_zero, use_acc=False, is_async=True)
            rest = start(x_tile, narrow_ring, stage, zero)
            part_scale, rest_scale = x_scale * wide_scale, x_scale * scale
            x_scale, wide_scale, scale = _scales_of(places, gl.minimum(chunk + 1, k_tiles - 1), scales[4])
            part = warpgroup_mma_wait(1, deps=[part])
            wide = wide + part * gl.convert_layout(part_scale, gl.SliceLayout(1, WIDE_SUMS))[:, None]
            rest = warpgroup_mma_wait(0, deps=[rest])
            mbarrier.arrive(empty.index(stage), count=1)
            narrow = narrow + rest * rest_scale[:, None]
            number += 1
        _expert, row, end, column, beside = at
        handed = last < k_tiles
        step += 1
        tile, first, last = _piece(step, k_tiles, tiles, whole, share, TAIL)
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)
        places = _scales_at(at, group, scales, rows, experts, k_tiles, BY_ROW)
        x_scale, wide_scale, scale = _scales_of(places, first, scales[4])
        row += group * PART
        if TAIL and handed:
            _hand_over(wide, narrow, part_ptr, ends_ptr, group, WIDE_SUMS, SUMS)
        else:
            _write(wide, row, end, column, n_dim, out_tile, out_ptr, TOGETHER)
            _write(narrow, row, end, beside, n_dim, out_tile.slice(0, PART, dim=1), out_ptr, TOGETHER)


@remembered
@gluon.jit(do_not_specialize=SIZES)
def _rows_times_blocks(
    x, wide, narrow, x_scale_ptr, weight_scale_ptr, out_ptr, part_ptr, ends_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, tiles, whole, share, scale_tiles, stride_scale, stride_tile,
    OUT_LAYOUT: gl.constexpr, TOGETHER: gl.constexpr, TAIL: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts."""
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, PART, CHUNK], x.layout)
    wide_ring = gl.allocate_shared_memory(wide.dtype, [STAGES, WIDE, CHUNK], wide.layout)
    narrow_ring = gl.allocate_shared_memory(narrow.dtype, [STAGES, PART, CHUNK], narrow.layout)
    out_tiles = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [2, PART, WIDE], OUT_LAYOUT)
    rings, bars = (x_ring, wide_ring, narrow_ring), (new_bars(STAGES, 1), new_bars(STAGES, 2))
    scales = (x_scale_ptr, weight_scale_ptr, scale_tiles, stride_scale, stride_tile)
    sizes = (rows, experts, n_dim, k_tiles, n_tiles, tiles, whole, share)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, rings, bars, scales, out_tiles.index(0), out_ptr, part_ptr, ends_ptr, sizes, TOGETHER, TAIL,
        )),
        (_multiply, (
            1, rings, bars, scales, out_tiles.index(1), out_ptr, part_ptr, ends_ptr, sizes, TOGETHER, TAIL,
        )),
        (_produce, (x, wide, narrow, rings, bars, ends_ptr, sizes, TAIL)),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`; the launch follows from shapes, so a CUDA graph can hold it."""
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    (rows, k_dim), n_dim, device = x.values.shape, values.shape[-2], values.device
    n_tiles, k_tiles = cdiv(n_dim, COLUMNS.value), cdiv(k_dim, CHUNK.value)
    experts = 1 if ends_E is None else ends_E.shape[0]
    tiles = cdiv(rows, ROWS.value) * n_tiles  # of a single weight; experts' are counted on the device
    processors, parts = multiprocessors(device), x.scale  # of the same dtype, and nothing is written there
    whole, share = tail(tiles, k_tiles, processors) if ends_E is None else (0, 0)
    programs = min(processors, tiles if ends_E is None else (rows // ROWS.value + experts + 1) * n_tiles)
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=device)
    if share:  # behind a single weight's end, what says that a program's sums are ready
        ends_E = torch.full((1 + 2 * programs,), rows, dtype=torch.int32, device=device)
        parts = torch.empty(2 * programs, PART.value, COLUMNS.value, dtype=torch.float32, device=device)
    if rows:
        _rows_times_blocks[(programs,)](
            tiles_of(x.values), tiles_of(values, WIDE.value), tiles_of(values), x.scale, scale, out_RN, parts,
            ends_E, rows, experts, n_dim, k_tiles, n_tiles, tiles, whole, share, scale.shape[-2],
            *x.scale.stride(),
            OUT_LAYOUT=layout_of(PART.value, WIDE.value, dtype), TOGETHER=gcd(n_dim, 8), TAIL=share > 0,
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS,
        )  # fmt: skip
    return out_RN
