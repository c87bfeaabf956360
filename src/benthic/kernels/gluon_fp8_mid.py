# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""FP8 products of some dozens of rows with one weight an expert, for Hopper: as fast as weights are read.

    out[r, n] = sum over chunks of 128 of K of (weight[expert of r, n, :] . x[r, :]) * their two scales

Weights are the tall operand of the matrix instruction, a tile's rows the narrow one: an expert of two dozens
of rows is not padded to 128, and four chunks of 256 outputs and up to 64 rows fit into shared memory.
There is one program a multiprocessor. A warp loads chunk after chunk of its tiles by TMA, whatever expert
they belong to, and of rows only the boxes of 32 that the expert has; two or three groups of warps have 128 or
64 outputs of a tile each. All parts walk over the tiles of all experts by themselves, from ends that lie on
the device. Tiles of a last wave that multiprocessors outnumber are cut into a group's outputs each.

The first weights are loaded before the kernel ahead has ended, and with it before it is known where experts
end: those of the program's tile if every expert has one tile of rows. If not, they are loaded again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    ENTRY_REGISTERS,
    TALL_ENTRY_REGISTERS,
    corner,
    expert_of,
    tiles_of,
)
from benthic.kernels.gluon_tiles import layout_of, load, meet, new_bars
from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

STAGES = gl.constexpr(4)
BOX = gl.constexpr(32)
"""Rows that are loaded together."""
MOST = gl.constexpr(64)
"""Rows of one product; a tile of 96 has a second one of the others."""
BAND = gl.constexpr(16)
PRODUCER_REGISTERS = 56


class Form(NamedTuple):
    """How tiles are divided.

    Attributes:
        average: rows an expert, up to which tiles have this form.
        rows: of a tile.
        groups: of warps.
        wide: outputs of a group.
        registers: of a thread of a group.
        entry: of a thread before the groups divide them.
    """

    average: int
    rows: int
    groups: int
    wide: int
    registers: int
    entry: int


FORMS = (
    Form(20, 32, 2, 128, 216, ENTRY_REGISTERS),
    Form(48, 64, 2, 128, 216, ENTRY_REGISTERS),
    Form(80, 96, 3, 64, 152, TALL_ENTRY_REGISTERS),
)
"""Of experts whose rows are drawn at random one of 200, of 100 and of 25 has more rows than a tile at these
averages. It reads its weight again, from the cache."""
SIZES = [
    "rows", "experts", "n_dim", "k_tiles", "n_tiles", "scale_tiles", "stride_scale", "stride_tile",
]  # fmt: skip
"""Numbers of which no kernel is compiled anew."""

_wait = gluon.jit(wait_for_inputs.fn)


@gluon.jit
def _whole(ends_ptr, rows, experts, n_tiles, ROWS: gl.constexpr, GROUPS: gl.constexpr, EXPERTS: gl.constexpr):
    """The tile from which on tiles are cut: the first of the last wave, if parts of all of these are one."""
    programs = gl.num_programs(0)
    each = gl.arange(0, EXPERTS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    end = gl.load(ends_ptr + each, mask=each < experts, other=rows)
    begin = gl.load(ends_ptr + (each - 1), mask=(each > 0) & (each <= experts), other=0)
    tall = gl.where(each <= experts, (end - begin + ROWS - 1) // ROWS, 0)
    tiles = gl.sum(tall, axis=0) * n_tiles
    left = tiles % programs
    return gl.where(left * GROUPS > programs, tiles, tiles - left)


@gluon.jit
def _find(step, place, ends_ptr, sizes, ROWS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr):
    """The place to go on from; and expert, first row, end of rows and first output of a program's step.

    Also how many outputs of the tile are multiplied: all of them, or a group's.
    """
    rows, experts, n_dim, _k_tiles, n_tiles, whole = sizes
    tile = gl.program_id(0) + step * gl.num_programs(0)
    cut = gl.maximum(tile - whole, 0)
    tile = gl.minimum(tile, whole + cut // GROUPS)
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    expert, first, begin, end = place
    row, column = corner(tile, first, begin, end, n_tiles, BAND, ROWS, GROUPS * WIDE)
    width = gl.where(tile < whole, GROUPS * WIDE, WIDE)
    column += gl.where(tile < whole, 0, cut % GROUPS * WIDE)
    return place, (expert, row, end, column, gl.minimum(width, n_dim - column))


@gluon.jit
def _chunks(at, sizes):
    """Chunks of a step: none of rows that belong to no expert, nor of a tile's part behind the outputs."""
    return gl.where((at[0] < sizes[1]) & (at[4] > 0), sizes[3], 0)


@gluon.jit
def _load_if(needed, tensor, corner, bar, place):
    """Load a box, or say that none comes."""
    mbarrier.expect(bar, tensor.block_type.nbytes, pred=needed)
    mbarrier.arrive(bar, count=1, pred=needed == 0)
    load(tensor, corner, bar, place, pred=needed)


@gluon.jit
def _ahead(n_tiles, GROUPS: gl.constexpr, WIDE: gl.constexpr):
    """Expert and first output of a program's first tile, if every expert before has one tile of rows."""
    return gl.program_id(0) // n_tiles, gl.program_id(0) % n_tiles * (GROUPS * WIDE)


@gluon.jit
def _load_ahead(weight, weight_ring, ahead, n_dim, n_tiles, GROUPS: gl.constexpr, WIDE: gl.constexpr):
    """Load as many chunks of that tile as there are places; behind the last chunk are zeros."""
    expert, column = _ahead(n_tiles, GROUPS, WIDE)
    for stage in gl.static_range(STAGES):
        bar = ahead.index(stage)
        mbarrier.expect(bar, GROUPS * weight.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            at = [expert * n_dim + column + group * WIDE, stage * CHUNK]
            load(weight, at, bar, weight_ring.index(GROUPS * stage + group))


@gluon.jit
def _produce(
    x, weight, rings, bars, ends_ptr, sizes,
    ROWS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    x_ring, weight_ring = rings
    full, empty, ahead = bars
    _rows, experts, n_dim, _k_tiles, n_tiles, _whole_tiles = sizes
    step, number = 0, 0
    place, at = _find(0, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, sizes, ROWS, GROUPS, WIDE)
    there = at[0] < 0
    if PDL:
        expert, column = _ahead(n_tiles, GROUPS, WIDE)
        there = (at[0] == expert) & (at[3] == column)
    while at[0] < experts:
        expert, row, end, column, width = at
        for chunk in range(_chunks(at, sizes)):
            stage = number % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            missing = (there == 0) | (step > 0) | (number >= STAGES)
            if PDL and number < STAGES:
                mbarrier.wait(ahead.index(stage), 0)
            for group in gl.static_range(GROUPS):
                _load_if(
                    missing & (group * WIDE < width), weight,
                    [expert * n_dim + column + group * WIDE, chunk * CHUNK],
                    bar, weight_ring.index(GROUPS * stage + group),
                )  # fmt: skip
            for box in gl.static_range(ROWS // BOX):
                _load_if(
                    row + box * BOX < end, x, [row + box * BOX, chunk * CHUNK],
                    bar, x_ring.index(stage).slice(box * BOX, BOX),
                )  # fmt: skip
            number += 1
        step += 1
        place, at = _find(step, place, ends_ptr, sizes, ROWS, GROUPS, WIDE)
    if PDL:  # or weights would come when the program is no more
        for stage in range(gl.minimum(number, STAGES), STAGES):
            mbarrier.wait(ahead.index(stage), 0)


@gluon.jit
def _scales_at(at, group, scales, sizes, ROWS: gl.constexpr, WIDE: gl.constexpr):
    """Where scales of a tile's first rows, the others and a group's outputs begin; somewhere allowed."""
    x_scale_ptr, weight_scale_ptr, scale_tiles, stride_scale, _stride_tile = scales
    rows, experts, _n_dim, k_tiles, _n_tiles, _whole_tiles = sizes
    expert, row, _end, column, _width = at
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    FIRST: gl.constexpr = ROWS if ROWS <= MOST else MOST
    each = row + gl.arange(0, FIRST, layout=LAYOUT)
    first_at = x_scale_ptr + gl.minimum(each, rows - 1).to(gl.int64) * stride_scale
    rest_at = first_at
    if ROWS > MOST:
        each = row + MOST + gl.arange(0, ROWS - MOST, layout=LAYOUT)
        rest_at = x_scale_ptr + gl.minimum(each, rows - 1).to(gl.int64) * stride_scale
    block = gl.minimum((column + group * WIDE) // CHUNK, scale_tiles - 1)
    weight_at = (gl.minimum(expert, experts - 1).to(gl.int64) * scale_tiles + block) * k_tiles
    return first_at, rest_at, weight_scale_ptr + weight_at


@gluon.jit
def _scales_of(places, chunk, stride_tile, ROWS: gl.constexpr):
    """The scales of a chunk: of a tile's first rows, of the others, of the outputs."""
    first, weight = gl.load(places[0] + chunk * stride_tile), gl.load(places[2] + chunk)
    rest = first
    if ROWS > MOST:
        rest = gl.load(places[1] + chunk * stride_tile)
    return first, rest, weight


@gluon.jit
def _write(sums, own, n_dim, out_tile, out_ptr, WIDE: gl.constexpr):
    """Write a group's outputs of some rows, turned round in shared memory: a thread has 8 in a row."""
    ROWS: gl.constexpr = out_tile.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [4, 1], [1, 0])
    row, end, column, width = own
    out_tile.permute((1, 0)).store(sums.to(out_tile.dtype))
    meet()
    below = gl.arange(0, BOX, layout=gl.SliceLayout(1, LAYOUT))
    beside = gl.arange(0, WIDE, layout=gl.SliceLayout(0, LAYOUT))
    for first in gl.static_range(0, ROWS, BOX):
        start = (row + first).to(gl.int64) * n_dim + column
        kept = (below < end - row - first)[:, None] & (beside < width)[None, :]
        place = gl.multiple_of(out_ptr + start, 16) + below[:, None] * n_dim + beside[None, :]
        gl.store(place, out_tile.slice(first, BOX).load(LAYOUT), mask=kept)
    meet()


@gluon.jit
def _start(weight_tile, x_tile, zero):
    """Start the product of a group's outputs and some rows, summed from zero."""
    return warpgroup_mma(weight_tile, x_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _multiply(
    group, rings, bars, scales, out_tile, out_ptr, ends_ptr, sizes,
    ROWS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The outputs of a group, tile after tile."""
    FIRST: gl.constexpr = ROWS if ROWS <= MOST else MOST
    REST: gl.constexpr = ROWS - MOST if ROWS > MOST else BOX
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 32])
    REST_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 32])
    x_ring, weight_ring = rings
    full, empty, _ahead = bars
    experts, eights, k_tiles = sizes[1], sizes[2] // 8, sizes[3]
    zero = gl.zeros([WIDE, FIRST], gl.float32, layout=SUMS)
    rest_zero = gl.zeros([WIDE, REST], gl.float32, layout=REST_SUMS)
    step, number = 0, 0
    place, at = _find(0, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, sizes, ROWS, GROUPS, WIDE)
    places = _scales_at(at, group, scales, sizes, ROWS, WIDE)
    first_scale, rest_scale, weight_scale = _scales_of(places, 0, scales[4], ROWS)
    while at[0] <= experts:
        sums, rest_sums = zero, rest_zero
        for chunk in range(_chunks(at, sizes)):
            stage = number % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            weight_tile, x_tile = weight_ring.index(GROUPS * stage + group), x_ring.index(stage)
            part = _start(weight_tile, x_tile.slice(0, FIRST), zero)
            if ROWS > MOST:
                rest = _start(weight_tile, x_tile.slice(FIRST, REST), rest_zero)
            first_both, rest_both = first_scale * weight_scale, rest_scale * weight_scale
            following = gl.minimum(chunk + 1, k_tiles - 1)
            first_scale, rest_scale, weight_scale = _scales_of(places, following, scales[4], ROWS)
            scale = gl.convert_layout(first_both, gl.SliceLayout(0, SUMS))
            if ROWS > MOST:
                part = warpgroup_mma_wait(1, deps=[part])
                sums = sums + part * scale[None, :]
                rest = warpgroup_mma_wait(0, deps=[rest])
                mbarrier.arrive(empty.index(stage), count=1)
                scale = gl.convert_layout(rest_both, gl.SliceLayout(0, REST_SUMS))
                rest_sums = rest_sums + rest * scale[None, :]
            else:
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index(stage), count=1)
                sums = sums + part * scale[None, :]
            number += 1
        _expert, row, end, column, width = at
        step += 1
        place, at = _find(step, place, ends_ptr, sizes, ROWS, GROUPS, WIDE)
        places = _scales_at(at, group, scales, sizes, ROWS, WIDE)
        first_scale, rest_scale, weight_scale = _scales_of(places, 0, scales[4], ROWS)
        own = row, end, column + group * WIDE, width - group * WIDE
        _write(sums, own, eights * 8, out_tile.slice(0, FIRST), out_ptr, WIDE)
        if ROWS > MOST:
            own = row + MOST, end, column + group * WIDE, width - group * WIDE
            _write(rest_sums, own, eights * 8, out_tile.slice(FIRST, REST), out_ptr, WIDE)


@remembered
@gluon.jit(do_not_specialize=SIZES)
def _blocks_times_rows(
    x, weight, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
    ROWS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr, EXPERTS: gl.constexpr,
    OUT_LAYOUT: gl.constexpr, PDL: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts."""
    PLACES: gl.constexpr = ROWS if ROWS <= MOST else 2 * MOST
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, PLACES, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [GROUPS * STAGES, WIDE, CHUNK], weight.layout)
    tiles = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [GROUPS, PLACES, WIDE], OUT_LAYOUT)
    rings = (x_ring, weight_ring)
    full, empty = new_bars(STAGES, GROUPS + ROWS // BOX), new_bars(STAGES, GROUPS)
    ahead = new_bars(STAGES, 1)
    fence_async_shared()
    if PDL:
        _load_ahead(weight, weight_ring, ahead, n_dim, n_tiles, GROUPS, WIDE)
    _wait(PDL)
    whole = _whole(ends_ptr, rows, experts, n_tiles, ROWS, GROUPS, EXPERTS)
    bars, sizes = (full, empty, ahead), (rows, experts, n_dim, k_tiles, n_tiles, whole)
    scales = (x_scale_ptr, weight_scale_ptr, scale_tiles, stride_scale, stride_tile)
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (
                0, rings, bars, scales, tiles.index(0), out_ptr, ends_ptr, sizes, ROWS, GROUPS, WIDE,
            )),
            (_multiply, (
                1, rings, bars, scales, tiles.index(1), out_ptr, ends_ptr, sizes, ROWS, GROUPS, WIDE,
            )),
            (_produce, (x, weight, rings, bars, ends_ptr, sizes, ROWS, GROUPS, WIDE, PDL)),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                0, rings, bars, scales, tiles.index(0), out_ptr, ends_ptr, sizes, ROWS, GROUPS, WIDE,
            )),
            (_multiply, (
                1, rings, bars, scales, tiles.index(1), out_ptr, ends_ptr, sizes, ROWS, GROUPS, WIDE,
            )),
            (_multiply, (
                2, rings, bars, scales, tiles.index(2), out_ptr, ends_ptr, sizes, ROWS, GROUPS, WIDE,
            )),
            (_produce, (x, weight, rings, bars, ends_ptr, sizes, ROWS, GROUPS, WIDE, PDL)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


def linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`; the launch follows from shapes, so a CUDA graph can hold it."""
    rows, experts = x.values.shape[0], ends_E.shape[0]
    form = next((form for form in FORMS if rows <= form.average * experts), FORMS[-1])
    return multiply(x, weight, ends_E, form, dtype=dtype)


def multiply(x, weight, ends_E, form, *, dtype):
    """`linear` in a given form."""
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    (rows, k_dim), (experts, n_dim, _k_dim), device = x.values.shape, values.shape, values.device
    _average, tall, groups, wide, registers, entry = form
    n_tiles = cdiv(n_dim, groups * wide)
    most_tiles = (rows // tall + experts + 1) * n_tiles
    programs = min(multiprocessors(device), most_tiles * groups)
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=device)
    if rows:
        _blocks_times_rows[(programs,)](
            tiles_of(x.values, BOX.value), tiles_of(values.flatten(0, -2), wide),
            x.scale, scale, out_RN, ends_E,
            rows, experts, n_dim, cdiv(k_dim, CHUNK.value), n_tiles, scale.shape[-2], *x.scale.stride(),
            ROWS=tall, GROUPS=groups, WIDE=wide, EXPERTS=next_power_of_2(experts + 1),
            OUT_LAYOUT=layout_of(BOX.value, wide, dtype),
            REGISTERS=registers, FEW_REGISTERS=PRODUCER_REGISTERS, num_warps=4, maxnreg=entry,
            **early(device, rows),
        )  # fmt: skip
    return out_RN
