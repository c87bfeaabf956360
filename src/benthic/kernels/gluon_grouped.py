# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The product of experts' rows for Hopper in Gluon: one warp loads, two groups of four warps multiply.

    out[r, n] = sum over k of x[r, k] * weight[expert of r, k, n]

Both the output (a weight's rows are the columns n) and the gradient of the input (they are the dims k): the
tensor cores read a weight's tile as it lies or turned round. Groups have 128 rows each and share 128 columns
of the weight. Rows are loaded, multiplied and written by 64: a group loads and multiplies no 64 rows that are
all behind the expert's end, so an expert's last tile costs what its rows cost.

With SwiGLU a tile's columns are 64 gates and the 64 ups that belong to them, and 64 columns are written.

There is one program a multiprocessor, which takes tile after tile from a counter (`gluon_queue`). All parts
find a tile among those of all experts by themselves, from ends that lie on the device, so the next tile is
loaded while the last one is written. Sums leave through shared memory: by TMA, or where another expert's rows
follow, by threads that write what is theirs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fp8_tiles import corner, end_of, expert_of
from benthic.kernels.gluon_queue import AHEAD, asked, hand_on, new_counter, new_queue, told
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars, take_context, unload, view
from benthic.kernels.grouped_mm import GroupedMm
from benthic.kernels.host import cdiv
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

ROWS = gl.constexpr(256)
COLUMNS = gl.constexpr(128)
PART = gl.constexpr(128)
"""Rows of a tile that a group has."""
HALF = gl.constexpr(64)
"""Of these rows, or of a tile's columns: what one load takes, and rows that leave the registers at once."""
CHUNK = gl.constexpr(64)
"""Dims that are multiplied at once."""
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
    x, weight, x_ring, weight_ring, bars, queue, ends_ptr, counter_ptr,
    rows, experts, n_dim, k_dim, n_tiles, TURNED: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Take tiles, and load chunk after chunk of them as places in the ring come free."""
    HALVES: gl.constexpr = ROWS // HALF
    BYTES: gl.constexpr = x.block_type.nbytes  # a weight's blocks have as many
    full, empty = bars
    tile, turn, number = gl.program_id(0), 0, 0
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    while at[0] <= experts:
        expert, row, end, column = at
        halves = gl.minimum((end - row + HALF - 1) // HALF, HALVES)
        last, answer = gl.where(expert < experts, k_dim, 0), 0
        for k in range(0, last, CHUNK):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            for i in gl.static_range(HALVES):
                mbarrier.expect(bar, (i + 1 + 2) * BYTES, pred=halves == i + 1)
            for i in gl.static_range(HALVES):
                load(x, [row + i * HALF, k], bar, x_ring.index(HALVES * stage + i), pred=i < halves)
            for i in gl.static_range(2):
                first = column // 2 + i * (n_dim // 2) if GATED else column + i * HALF
                if TURNED:
                    load(weight, [expert * n_dim + first, k], bar, weight_ring.index(2 * stage + i))
                else:
                    load(weight, [expert * k_dim + k, first], bar, weight_ring.index(2 * stage + i))
            number += 1
            if k == gl.maximum(last - AHEAD * CHUNK, 0):
                answer = asked(counter_ptr)
        if last == 0:
            answer = asked(counter_ptr)
        tile = hand_on(queue, turn, tile, answer, counter_ptr)
        turn += 1
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)


@gluon.jit
def _sum(
    group, number, k_dim, x_ring, weight_ring, bars, TURNED: gl.constexpr, HIGH: gl.constexpr
):  # fmt: skip
    """Sums of the first `HIGH` rows of a group over chunks from a number on; and the next number.

    Halves that are loaded one by one lie in shared memory as a tile of both does.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    HIGH_TILES: gl.constexpr = ROWS // HIGH
    full, empty = bars
    x_tiles = view(x_ring, x_ring.dtype, [STAGES * HIGH_TILES, HIGH, CHUNK], x_ring.layout)
    wide: gl.constexpr = [STAGES, COLUMNS, CHUNK] if TURNED else [STAGES, CHUNK, COLUMNS]
    weight_tiles = view(weight_ring, weight_ring.dtype, wide, weight_ring.layout)
    sums = gl.zeros([HIGH, COLUMNS], gl.float32, layout=SUMS)
    for k in range(0, k_dim, CHUNK):
        stage, before = number % STAGES, (number + STAGES - 1) % STAGES
        mbarrier.wait(full.index(stage), (number // STAGES) & 1)
        x_tile = x_tiles.index(HIGH_TILES * stage + group * (PART // HIGH))
        weight_tile = weight_tiles.index(stage)
        if TURNED:
            weight_tile = weight_tile.permute((1, 0))
        sums = warpgroup_mma(x_tile, weight_tile, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
        number += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((number + STAGES - 1) % STAGES), count=1, pred=k_dim > 0)
    return sums, number


@gluon.jit
def _gated(sums, dtype: gl.constexpr):
    """SwiGLU of gates and the ups beside them, both rounded first, as they would be if they were written."""
    wide = sums.to(dtype).to(gl.float32)
    gate, up = gl.split(gl.permute(gl.reshape(wide, [HALF, 2, HALF]), (0, 2, 1)))
    return gate * (1 / (1 + gl.exp(-gate))) * up


@gluon.jit
def _write(sums, row, end, column, out, out_tile, out_ptr, width, GATED: gl.constexpr):
    """Write the rows that leave the registers at once."""
    if GATED:
        sums = _gated(sums, out_tile.dtype)
    WIDTH: gl.constexpr = out_tile.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tma.store_wait(0)  # for what the group wrote last
    meet()
    out_tile.store(gl.convert_layout(sums.to(out_tile.dtype), SUMS))
    fence_async_shared()
    meet()
    if row + HALF <= end:
        unload(out, [row, column], out_tile)
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
        rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
        kept = (rows < end)[:, None] & (columns < width)[None, :]
        place = out_ptr + rows.to(gl.int64)[:, None] * width + columns[None, :]
        gl.store(place, out_tile.load(LAYOUT), mask=kept)


@gluon.jit
def _multiply(
    group, x_ring, weight_ring, bars, queue, out, out_tile, out_ptr, ends_ptr, counter_ptr,
    rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The rows of a group, tile after tile."""
    SHARE: gl.constexpr = 2 if GATED else 1  # columns of the weight for one that is written
    full, empty = bars
    tile, turn, number = gl.program_id(0), 0, 0
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    while at[0] <= experts:
        expert, row, end, column = at
        column, width = column // SHARE, n_dim // SHARE
        row += group * PART
        last = gl.where(expert < experts, k_dim, 0)
        if row + HALF < end:
            sums, number = _sum(group, number, last, x_ring, weight_ring, bars, TURNED, PART)
            upper, lower = gl.split(gl.permute(gl.reshape(sums, [2, HALF, COLUMNS]), (1, 2, 0)))
            _write(upper, row, end, column, out, out_tile, out_ptr, width, GATED)
            _write(lower, row + HALF, end, column, out, out_tile, out_ptr, width, GATED)
        elif row < end:
            sums, number = _sum(group, number, last, x_ring, weight_ring, bars, TURNED, HALF)
            _write(sums, row, end, column, out, out_tile, out_ptr, width, GATED)
        else:
            for _k in range(0, last, CHUNK):
                mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1)
                mbarrier.arrive(empty.index(number % STAGES), count=1)
                number += 1
        tile = told(queue, turn, tile, counter_ptr)
        turn += 1
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)
    tma.store_wait(0)


@remembered
@gluon.jit(do_not_specialize=["rows", "experts", "n_tiles"])
def _rows_times_experts(
    x, weight, out, out_ptr, ends_ptr, counter_ptr, rows, experts, n_dim, k_dim, n_tiles,
    TURNED: gl.constexpr, GATED: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor, which takes tiles of all experts from the counter, or every so-manieth.

    TURNED: weights are [E, N, K]; GATED: their first rows are gates, the others ups.
    """
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * ROWS // HALF, HALF, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES * 2, HALF, CHUNK], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, HALF, out.block_type.shape[1]], out.layout)
    bars, queue = (new_bars(STAGES, 1), new_bars(STAGES, 2)), new_queue(2)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, x_ring, weight_ring, bars, queue, out, out_tiles.index(0), out_ptr, ends_ptr, counter_ptr,
            rows, experts, n_dim, k_dim, n_tiles, TURNED, GATED,
        )),
        (_multiply, (
            1, x_ring, weight_ring, bars, queue, out, out_tiles.index(1), out_ptr, ends_ptr, counter_ptr,
            rows, experts, n_dim, k_dim, n_tiles, TURNED, GATED,
        )),
        (_produce, (
            x, weight, x_ring, weight_ring, bars, queue, ends_ptr, counter_ptr,
            rows, experts, n_dim, k_dim, n_tiles, TURNED, GATED,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`; the gradient of weights is the library's product."""
    return GroupedMm.apply(x_RI, weight_EOI, ends_E, multiply)


def grouped_swiglu(x_RI, weight_EGI, ends_E):
    """See `benthic.kernels.ops.grouped_swiglu`; for weights in rows."""
    return multiply(x_RI, weight_EGI, ends_E, gated=True)


def linear_swiglu(x_RI, weight_GI):
    """See `benthic.kernels.ops.linear_swiglu`: one expert that has all rows."""
    return multiply(x_RI, weight_GI[None], None, gated=True)


def multiply(x_RK, weight_ENK, ends_E, *, gated=False):
    """`out[r] = x[r] @ weight[expert of r].T`, with SwiGLU if gated; a weight's dims lie in either order.

    Without ends a single expert has all rows.
    """
    (rows, k_dim), (experts, n_dim, _) = x_RK.shape, weight_ENK.shape
    upright = not gated and weight_ENK.stride() == (n_dim * k_dim, 1, n_dim)
    weight = weight_ENK if upright else weight_ENK.contiguous()
    out = x_RK.new_empty(rows, n_dim // 2 if gated else n_dim)
    n_tiles = cdiv(n_dim, COLUMNS.value)
    tiles = (rows // ROWS.value + experts + 1) * n_tiles
    programs = min(multiprocessors(x_RK.device), tiles)
    if rows:
        take_context(x_RK.device)
        _rows_times_experts[(programs,)](
            blocks_of(_loadable(x_RK), HALF.value, CHUNK.value),
            blocks_of(weight, HALF.value, CHUNK.value, turned=upright),
            blocks_of(out, HALF.value, COLUMNS.value // (2 if gated else 1)),
            out, ends_E, new_counter(x_RK.device) if tiles > programs else None,
            rows, experts, n_dim, k_dim, n_tiles, TURNED=not upright, GATED=gated,
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS,
        )  # fmt: skip
    return out


def _loadable(x_RK):
    """As TMA takes it: rows that begin and step by multiples of 16 bytes."""
    steps = x_RK.stride(0) % 8 == 0 and x_RK.stride(0) >= x_RK.shape[1]
    aligned = x_RK.stride(1) == 1 and steps and x_RK.data_ptr() % 16 == 0
    return x_RK if aligned else x_RK.contiguous()
