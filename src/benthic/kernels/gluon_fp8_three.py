# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""FP8 products for Hopper in Gluon, in tiles of 192 x 128 that three groups of warps share; see `gluon_fp8`.

    out[r, n] = sum over chunks of 128 of K of (x[r, :] . weight[expert of r, n, :]) * their two scales

Each group has 64 rows and all columns in one product, so that the left operand is read once from shared
memory; while a group promotes, the two others multiply. Scales are loaded a chunk ahead, those of a tile
before the last one is written. A group without rows in an expert's last tile multiplies nothing;
programs take tiles from a counter (`gluon_queue`), since such tiles cost less. A tile leaves through shared
memory by TMA, unless another expert's rows or nobody's lie in it: then its threads write what is theirs.
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

from benthic.kernels.gluon_fp8_tiles import (
    CHUNK,
    GROUPS,
    PART,
    PRODUCER_REGISTERS,
    TALL_BAND,
    TALL_COLUMNS,
    TALL_ENTRY_REGISTERS,
    TALL_REGISTERS,
    TALL_ROWS,
    corner,
    end_of,
    expert_of,
    tiles_of,
)
from benthic.kernels.gluon_queue import AHEAD, asked, hand_on, new_counter, new_queue, told
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars, unload
from benthic.kernels.host import cdiv
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

STAGES = gl.constexpr(4)


@gluon.jit
def _find(tile, place, ends_ptr, rows, experts, n_tiles):
    """Expert, first row, end of rows and first column of a tile; and the place to go on from."""
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, TALL_ROWS)
    expert, first, start, end = place
    row, column = corner(tile, first, start, end, n_tiles, TALL_BAND, TALL_ROWS, TALL_COLUMNS)
    return place, (expert, row, end, column)


@gluon.jit
def _produce(
    x, weight, x_ring, weight_ring, bars, queue, ends_ptr, counter_ptr,
    rows, experts, n_dim, k_tiles, n_tiles,
):  # fmt: skip
    """Take tiles, and load chunk after chunk of them as places in the ring come free."""
    OF_ROWS: gl.constexpr = x.block_type.nbytes
    OF_WEIGHT: gl.constexpr = weight.block_type.nbytes
    full, empty = bars
    tile, turn, number = gl.program_id(0), 0, 0
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    while at[0] <= experts:
        expert, row, end, column = at
        parts = gl.minimum((end - row + PART - 1) // PART, GROUPS)
        chunks, answer = gl.where(expert < experts, k_tiles, 0), 0
        for chunk in range(chunks):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            for part in gl.static_range(GROUPS):
                mbarrier.expect(bar, (part + 1) * OF_ROWS + OF_WEIGHT, pred=parts == part + 1)
            for part in gl.static_range(GROUPS):
                at_row = row + part * PART
                load(x, [at_row, chunk * CHUNK], bar, x_ring.index(GROUPS * stage + part), pred=part < parts)
            load(weight, [expert * n_dim + column, chunk * CHUNK], bar, weight_ring.index(stage))
            number += 1
            if chunk == gl.maximum(chunks - AHEAD, 0):
                answer = asked(counter_ptr)
        if chunks == 0:
            answer = asked(counter_ptr)
        tile = hand_on(queue, turn, tile, answer, counter_ptr)
        turn += 1
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)


@gluon.jit
def _scales_at(at, group, scales, rows, experts, k_tiles, scale_tiles, stride_scale, BY_ROW: gl.constexpr):
    """Where the scales of a group's rows and of a tile's columns begin; somewhere allowed if it has none."""
    x_scale_ptr, weight_scale_ptr = scales
    expert, row, _end, column = at
    row += group * PART + gl.arange(0, PART, layout=BY_ROW)
    block = gl.minimum(expert, experts - 1).to(gl.int64) * scale_tiles
    block += gl.minimum(column // CHUNK, scale_tiles - 1)
    x_at = x_scale_ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride_scale
    return x_at, weight_scale_ptr + block * k_tiles


@gluon.jit
def _write(sums, at, group, out, out_tile, out_ptr, n_dim):
    """Write a group's 64 rows of a tile."""
    _expert, row, end, column = at
    row += group * PART
    if row + PART <= end:
        tma.store_wait(0)  # for what the group wrote last
        meet()
        out_tile.store(sums.to(out_tile.dtype))
        fence_async_shared()
        meet()
        unload(out, [row, column], out_tile)
    else:
        rows = row + gl.arange(0, PART, layout=gl.SliceLayout(1, sums.type.layout))
        columns = column + gl.arange(0, TALL_COLUMNS, layout=gl.SliceLayout(0, sums.type.layout))
        kept = (rows < end)[:, None] & (columns < n_dim)[None, :]
        place = out_ptr + rows.to(gl.int64)[:, None] * n_dim + columns[None, :]
        gl.store(place, sums.to(out_tile.dtype), mask=kept)


@gluon.jit
def _multiply(
    group, x_ring, weight_ring, bars, queue, scales, out, out_tile, out_ptr, ends_ptr, counter_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
):  # fmt: skip
    """The 64 rows of a group, tile after tile; nothing is multiplied where a tile has none for the group."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TALL_COLUMNS, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    full, empty = bars
    zero = gl.zeros([PART, TALL_COLUMNS], gl.float32, layout=SUMS)
    tile, turn, number = gl.program_id(0), 0, 0
    place, at = _find(tile, (0, 0, 0, end_of(ends_ptr, 0, experts, rows)), ends_ptr, rows, experts, n_tiles)
    x_at, w_at = _scales_at(at, group, scales, rows, experts, k_tiles, scale_tiles, stride_scale, BY_ROW)
    x_scale, w_scale = gl.load(x_at), gl.load(w_at)
    while at[0] <= experts:
        sums, last = zero, number + gl.where(at[0] < experts, k_tiles, 0)
        if at[1] + group * PART < at[2]:
            for chunk in range(last - number):
                stage = (number + chunk) % STAGES
                mbarrier.wait(full.index(stage), ((number + chunk) // STAGES) & 1)
                x_tile, weight_tile = x_ring.index(GROUPS * stage + group), weight_ring.index(stage)
                part = warpgroup_mma(x_tile, weight_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                scale, ahead = x_scale * w_scale, gl.minimum(chunk + 1, k_tiles - 1)
                x_scale, w_scale = gl.load(x_at + ahead * stride_tile), gl.load(w_at + ahead)
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(empty.index(stage), count=1)
                sums += part * scale[:, None]
        else:
            for chunk in range(number, last):
                mbarrier.wait(full.index(chunk % STAGES), (chunk // STAGES) & 1)
                mbarrier.arrive(empty.index(chunk % STAGES), count=1)
        written, number = at, last
        tile = told(queue, turn, tile, counter_ptr)
        turn += 1
        place, at = _find(tile, place, ends_ptr, rows, experts, n_tiles)
        x_at, w_at = _scales_at(at, group, scales, rows, experts, k_tiles, scale_tiles, stride_scale, BY_ROW)
        x_scale, w_scale = gl.load(x_at), gl.load(w_at)
        _write(sums, written, group, out, out_tile, out_ptr, n_dim)
    tma.store_wait(0)


@remembered
@gluon.jit(do_not_specialize=["rows"])
def _rows_times_blocks(
    x, weight, out, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr, counter_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: it takes tiles of all experts from the counter, or every so-manieth."""
    x_ring = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, PART, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, TALL_COLUMNS, CHUNK], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, PART, TALL_COLUMNS], out.layout)
    bars, queue = (new_bars(STAGES, 1), new_bars(STAGES, GROUPS)), new_queue(GROUPS)
    scales = (x_scale_ptr, weight_scale_ptr)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, x_ring, weight_ring, bars, queue, scales, out, out_tiles.index(0), out_ptr,
            ends_ptr, counter_ptr, rows, experts, n_dim, k_tiles, n_tiles,
            scale_tiles, stride_scale, stride_tile,
        )),
        (_multiply, (
            1, x_ring, weight_ring, bars, queue, scales, out, out_tiles.index(1), out_ptr,
            ends_ptr, counter_ptr, rows, experts, n_dim, k_tiles, n_tiles,
            scale_tiles, stride_scale, stride_tile,
        )),
        (_multiply, (
            2, x_ring, weight_ring, bars, queue, scales, out, out_tiles.index(2), out_ptr,
            ends_ptr, counter_ptr, rows, experts, n_dim, k_tiles, n_tiles,
            scale_tiles, stride_scale, stride_tile,
        )),
        (_produce, (
            x, weight, x_ring, weight_ring, bars, queue, ends_ptr, counter_ptr,
            rows, experts, n_dim, k_tiles, n_tiles,
        )),
    ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


def linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`; the launch follows from shapes, so a CUDA graph can hold it."""
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    rows, k_dim = x.values.shape
    n_dim = values.shape[-2]
    experts, n_tiles = 1 if ends_E is None else ends_E.shape[0], cdiv(n_dim, TALL_COLUMNS.value)
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=values.device)
    most_tiles = (rows // TALL_ROWS.value + experts + 1) * n_tiles
    programs = min(multiprocessors(values.device), most_tiles)
    queued = ends_E is not None and most_tiles > programs
    if rows:
        _rows_times_blocks[(programs,)](
            tiles_of(x.values), tiles_of(values, TALL_COLUMNS.value),
            blocks_of(out_RN, PART.value, TALL_COLUMNS.value), x.scale, scale, out_RN, ends_E,
            new_counter(values.device) if queued else None,
            rows, experts, n_dim, cdiv(k_dim, CHUNK.value), n_tiles, scale.shape[-2], *x.scale.stride(),
            REGISTERS=TALL_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=TALL_ENTRY_REGISTERS,
        )  # fmt: skip
    return out_RN
