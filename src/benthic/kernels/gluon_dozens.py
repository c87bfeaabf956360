# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The product of some dozens of rows an expert for Hopper in Gluon: as fast as weights are read.

    out[r, n] = sum over k of weight[expert of r, n, k] * x[r, k]

Weights are the tall operand of the matrix instruction, a tile's rows the narrow one. Two groups of four warps
share a tile of 256 of the weight's rows, so rows of x, which every tile reads again, are few beside them.
With SwiGLU a group's 128 are 64 gates and the 64 ups that belong to them, and 64 columns are written.

There is one program a multiprocessor. A warp loads chunk after chunk of its tiles by TMA, whatever expert
they belong to, and of x only the boxes that the expert has; so weights come also while sums are written. All
parts walk over the tiles of all experts by themselves, from ends that lie on the device. An expert of more
rows than a tile has its weights read by several programs side by side, from the cache.

The first weights are loaded before the kernel ahead has ended, and with it before it is known where experts
end: those of the program's tile if every expert has one tile of rows. If not, they are passed over.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fp8_tiles import corner, expert_of
from benthic.kernels.gluon_tiles import blocks_of, layout_of, load, meet, new_bars, rows_loadable, view
from benthic.kernels.host import cdiv
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

CHUNK = gl.constexpr(64)
"""Dims that are multiplied at once."""
HALF = gl.constexpr(64)
"""Of a group's 128 rows of the weight: what one load takes."""
STAGES = gl.constexpr(4)
"""Chunks in the ring: 128 KiB of weights, where a multiprocessor needs 40 to hide what memory takes."""
TOGETHER = 2
"""Chunks that are asked for together: 256 bytes of a weight's row come from memory one after another."""
BAND = gl.constexpr(16)
ROWS = gl.constexpr(64)
"""Rows of x in a tile. Few experts have more, and a tile costs what its weights cost."""
BOX = gl.constexpr(32)
"""Of these rows what one load takes, if the expert has rows in it: two chunks cost the loading warp 1,500
cycles or so, and take 3,600 at the rate of memory."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS, ENTRY_REGISTERS = 240, 24, 168
"""Of a thread; the last before the groups divide them: 65,536 over three groups of 128 threads."""

_wait = gluon.jit(wait_for_inputs.fn)


@gluon.jit
def _find(step, place, ends_ptr, sizes, OWN: gl.constexpr):
    """The place to go on from; and expert, first row, end of rows and first column of a program's step.

    Also how many columns of the tile are multiplied, all of them or of a tile that is cut a group's, and in
    how many chunks: none for rows that belong to no expert, nor where a tile's part lies behind the columns.
    """
    rows, experts, width, chunks, n_tiles, whole = sizes
    number = gl.program_id(0) + step * gl.num_programs(0)
    cut = gl.maximum(number - whole, 0)
    tile = gl.minimum(number, whole + cut // 2)
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    expert, first, start, end = place
    row, column = corner(tile, first, start, end, n_tiles, BAND, ROWS, 2 * OWN)
    column += cut % 2 * OWN
    left = gl.minimum(gl.where(number < whole, 2 * OWN, OWN), width - column)
    return place, (expert, row, end, column, left, gl.where((expert < experts) & (left > 0), chunks, 0))


@gluon.jit
def _ahead(sizes, OWN: gl.constexpr):
    """A program's first step if every expert has one tile of rows, but for those rows."""
    column = gl.program_id(0) % sizes[4] * (2 * OWN)
    return gl.program_id(0) // sizes[4], 0, 0, column, gl.minimum(2 * OWN, sizes[2] - column), sizes[3]


@gluon.jit
def _foreseen(at, sizes, OWN: gl.constexpr):
    """Whether the weights loaded ahead are the first that a program needs."""
    expert, _row, _end, column, _left, chunks = _ahead(sizes, OWN)
    same = (at[0] == expert) & (at[3] == column)
    return same & (gl.program_id(0) < sizes[5]) & (chunks >= STAGES)  # whole, and of an expert


@gluon.jit
def _load_weights(
    weight, ring, full, number, step, chunk, n_dim,
    OWN: gl.constexpr, GATED: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of `COUNT` chunks, from chunk number `number` of the program on."""
    BYTES: gl.constexpr = weight.block_type.nbytes
    expert, _row, _end, column, left, _chunks = step
    for i in gl.static_range(COUNT):
        bar = full.index((number + i) % STAGES)
        mbarrier.expect(bar, 2 * BYTES, pred=left <= OWN)
        mbarrier.expect(bar, 4 * BYTES, pred=left > OWN)
    for part in gl.static_range(4):
        first = column + part // 2 * OWN + part % 2 * (n_dim // 2 if GATED else HALF)
        for i in gl.static_range(COUNT):
            stage = (number + i) % STAGES
            at, needed = [expert * n_dim + first, (chunk + i) * CHUNK], part // 2 * OWN < left
            load(weight, at, full.index(stage), ring.index(4 * stage + part), pred=needed)


@gluon.jit
def _load_rows(x, ring, full, number, row, end, chunk):
    """Ask for a chunk of the boxes of rows that the expert has."""
    BYTES: gl.constexpr = x.block_type.nbytes
    stage = number % STAGES
    boxes = gl.minimum((end - row + BOX - 1) // BOX, ROWS // BOX)
    for box in gl.static_range(ROWS // BOX):
        mbarrier.expect(full.index(stage), (box + 1) * BYTES, pred=boxes == box + 1)
    for box in gl.static_range(ROWS // BOX):
        place = ring.index(ROWS // BOX * stage + box)
        load(x, [row + box * BOX, chunk * CHUNK], full.index(stage), place, pred=box < boxes)


@gluon.jit
def _produce(
    x, weight, rings, bars, ends_ptr, n_dim, sizes,
    OWN: gl.constexpr, GATED: gl.constexpr, COUNT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    x_ring, weight_ring = rings
    full, empty = bars
    step, number, ahead = 0, 0, 0
    place, at = _find(0, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, sizes, OWN)
    if PDL:
        foreseen = _foreseen(at, sizes, OWN)
        for stage in gl.static_range(STAGES):
            mbarrier.arrive(full.index(stage), count=1, pred=foreseen == 0)
        number, ahead = gl.where(foreseen, 0, STAGES), gl.where(foreseen, STAGES, 0)
    while at[0] < sizes[1]:
        for chunk in range(0, at[5], COUNT):
            if number >= ahead:
                for i in gl.static_range(COUNT):
                    mbarrier.wait(empty.index((number + i) % STAGES), (number // STAGES) & 1 ^ 1)
                _load_weights(weight, weight_ring, full, number, at, chunk, n_dim, OWN, GATED, COUNT)
            for i in gl.static_range(COUNT):
                _load_rows(x, x_ring, full, number + i, at[1], at[2], chunk + i)
            number += COUNT
        step += 1
        place, at = _find(step, place, ends_ptr, sizes, OWN)


@gluon.jit
def _sum(group, number, chunks, rings, bars):
    """Sums of a group's rows of the weight over chunks from a number on; and the next number.

    Nothing is in flight as a chunk is waited for: tensor cores idle, but its place is free sooner.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    x_ring, weight_ring = rings
    full, empty = bars
    x_tiles = view(x_ring, x_ring.dtype, [STAGES, ROWS, CHUNK], x_ring.layout)
    weight_tiles = view(weight_ring, weight_ring.dtype, [2 * STAGES, 2 * HALF, CHUNK], weight_ring.layout)
    sums = gl.zeros([2 * HALF, ROWS], gl.float32, layout=SUMS)
    for _chunk in range(chunks):
        stage = number % STAGES
        mbarrier.wait(full.index(stage), (number // STAGES) & 1)
        weight_tile, x_tile = weight_tiles.index(2 * stage + group), x_tiles.index(stage)
        sums = warpgroup_mma(weight_tile, x_tile.permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index(stage), count=1)
        number += 1
    return sums, number


@gluon.jit
def _gated(sums, dtype: gl.constexpr):
    """SwiGLU of gates and the ups below them, both rounded first, as they would be if they were written."""
    wide = sums.to(dtype).to(gl.float32)
    gate, up = gl.split(gl.permute(gl.reshape(wide, [2, HALF, ROWS]), (1, 2, 0)))
    return gate * (1 / (1 + gl.exp(-gate))) * up


@gluon.jit
def _write(sums, row, end, column, left, width, out_tile, out_ptr, GATED: gl.constexpr):
    """Write `left` columns of the rows, turned round in shared memory: a thread has 8 side by side."""
    OWN: gl.constexpr = out_tile.shape[1]
    HIGH: gl.constexpr = ROWS // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // OWN, OWN // 8], [4, 1], [1, 0])
    if GATED:
        sums = _gated(sums, out_tile.dtype)
    out_tile.permute((1, 0)).store(gl.convert_layout(sums.to(out_tile.dtype), SUMS))
    meet()
    below = gl.arange(0, HIGH, layout=gl.SliceLayout(1, LAYOUT))
    beside = gl.arange(0, OWN, layout=gl.SliceLayout(0, LAYOUT))
    for first in gl.static_range(0, ROWS, HIGH):
        start = (row + first).to(gl.int64) * width + column
        kept = (below < end - row - first)[:, None] & (beside < left)[None, :]
        to = gl.multiple_of(out_ptr + start, 16) + below[:, None] * width + beside[None, :]
        gl.store(to, out_tile.slice(first, HIGH).load(LAYOUT), mask=kept)
    meet()


@gluon.jit
def _multiply(
    group, rings, bars, out_tile, out_ptr, ends_ptr, sizes,
    OWN: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The columns of a group, tile after tile."""
    full, empty = bars
    step, number = 0, 0
    place, at = _find(0, (0, 0, 0, gl.load(ends_ptr)), ends_ptr, sizes, OWN)
    if PDL:
        number = gl.where(_foreseen(at, sizes, OWN), 0, STAGES)
        for stage in range(number):
            mbarrier.wait(full.index(stage), 0)
            mbarrier.arrive(empty.index(stage), count=1)
    while at[0] <= sizes[1]:
        _expert, row, end, column, left, chunks = at
        sums, number = _sum(group, number, chunks, rings, bars)
        column, left = column + group * OWN, left - group * OWN
        if left > 0:
            _write(sums, row, end, column, left, sizes[2], out_tile, out_ptr, GATED)
        step += 1
        place, at = _find(step, place, ends_ptr, sizes, OWN)


@remembered
@gluon.jit(do_not_specialize=["rows", "experts", "chunks", "n_tiles", "whole"])
def _experts_times_rows(
    x, weight, out_ptr, ends_ptr, rows, experts, n_dim, chunks, n_tiles, whole,
    GATED: gl.constexpr, COUNT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
    PDL: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts, cut in two from `whole` on."""
    OWN: gl.constexpr = HALF if GATED else 2 * HALF
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * ROWS // BOX, BOX, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES * 4, HALF, CHUNK], weight.layout)
    tiles = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [2, ROWS, OWN], OUT_LAYOUT)
    rings, bars = (x_ring, weight_ring), (new_bars(STAGES, 2), new_bars(STAGES, 2))
    width = n_dim // 2 if GATED else n_dim
    sizes = (rows, experts, width, chunks, n_tiles, whole)
    fence_async_shared()
    if PDL:
        ahead = _ahead(sizes, OWN)
        for chunk in gl.static_range(0, STAGES, COUNT):  # behind the last chunk are zeros
            _load_weights(weight, weight_ring, bars[0], chunk, ahead, chunk, n_dim, OWN, GATED, COUNT)
    _wait(PDL)
    gl.warp_specialize([
        (_multiply, (0, rings, bars, tiles.index(0), out_ptr, ends_ptr, sizes, OWN, GATED, PDL)),
        (_multiply, (1, rings, bars, tiles.index(1), out_ptr, ends_ptr, sizes, OWN, GATED, PDL)),
        (_produce, (x, weight, rings, bars, ends_ptr, n_dim, sizes, OWN, GATED, COUNT, PDL)),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`; computes no gradients."""
    return multiply(x_RI, weight_EOI, ends_E, gated=False)


def grouped_swiglu(x_RI, weight_EGI, ends_E):
    """See `benthic.kernels.ops.grouped_swiglu`; computes no gradients."""
    return multiply(x_RI, weight_EGI, ends_E, gated=True)


def multiply(x_RK, weight_ENK, ends_E, *, gated):
    """Either product; the launch follows from shapes, so graphs can hold it."""
    (rows, k_dim), (experts, n_dim, _k_dim), device = x_RK.shape, weight_ENK.shape, x_RK.device
    width, own = (n_dim // 2, HALF.value) if gated else (n_dim, 2 * HALF.value)
    n_tiles = cdiv(width, 2 * own)
    programs = min(multiprocessors(device), 2 * (rows // ROWS.value + experts + 1) * n_tiles)
    out_RN = x_RK.new_empty(rows, width)
    if rows:
        _experts_times_rows[(programs,)](
            blocks_of(rows_loadable(x_RK), BOX.value, CHUNK.value),
            blocks_of(weight_ENK.contiguous(), HALF.value, CHUNK.value),
            out_RN, ends_E, rows, experts, n_dim,
            cdiv(k_dim, CHUNK.value * TOGETHER) * TOGETHER, n_tiles,
            whole(experts * n_tiles, programs),  # as if each had one tile of rows; others cost time alone
            GATED=gated, COUNT=TOGETHER, OUT_LAYOUT=layout_of(ROWS.value, own, x_RK.dtype),
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS, **early(device, rows),
        )  # fmt: skip
    return out_RN


def whole(tiles, programs):
    """The tile from which on tiles are cut: the first of a last wave whose halves all fit into one."""
    left = tiles % programs
    return tiles - left if 2 * left <= programs else tiles
