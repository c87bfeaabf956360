# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""FP8 products for Hopper in Gluon: one warp loads, two warp groups of 64 rows each multiply and promote.

    out[r, n] = sum over chunks of 128 of K of (x[r, :] . weight[expert of r, n, :]) * their two scales

Tensor cores sum a chunk from zero; what it gives is scaled and added to float32 sums in registers, because
their own sums of FP8 products keep too few bits (DeepSeek-V3 report, section 3.3.2). A group promotes 64
columns while the next 64 are multiplied. A tile of 128 x 192 is as large as registers allow, for it is the
second-level cache that limits these products: without sharing between multiprocessors a chunk is 40 KiB for
768 cycles of tensor cores.

There is one program a multiprocessor. All three parts walk over the tiles of all experts by themselves, so
the next tile is loaded while the last one is written. Rows of an expert are counted on the device.
"""

from __future__ import annotations

import torch
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
    corner,
    expert_of,
    one_end,
    start,
    tiles_of,
)
from benthic.kernels.gluon_tiles import load, new_bars
from benthic.kernels.host import cdiv
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import multiprocessors

COLUMNS = gl.constexpr(192)
STAGES = gl.constexpr(5)
BAND = gl.constexpr(16)


@gluon.jit
def _produce(x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_tiles, n_tiles):
    """Load chunk after chunk of this program's tiles as places in the ring come free."""
    full, empty = bars
    place = (0, 0, 0, gl.load(ends_ptr))
    tile, number = gl.program_id(0), 0
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    while place[0] < experts:
        row, column = corner(tile, place[1], place[2], place[3], n_tiles, BAND, ROWS, COLUMNS)
        weight_row = place[0] * n_dim + column
        for chunk in range(k_tiles):
            stage, bar = number % STAGES, full.index(number % STAGES)
            mbarrier.wait(empty.index(stage), (number // STAGES) & 1 ^ 1)
            mbarrier.expect(bar, 2 * x.block_type.nbytes + 3 * weight.block_type.nbytes)
            for part in gl.static_range(2):
                load(x, [row + part * PART, chunk * CHUNK], bar, x_ring.index(2 * stage + part))
            for part in gl.static_range(3):
                at = [weight_row + part * PART, chunk * CHUNK]
                load(weight, at, bar, weight_ring.index(3 * stage + part))
            number += 1
        tile += gl.num_programs(0)
        place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)


@gluon.jit
def _add_chunk(sums, x_tile, weight_ring, first, x_scale, scales, zero):
    """Add a chunk to the sums of three times 64 columns: one is promoted while the next is multiplied."""
    sum_0, sum_1, sum_2 = sums
    part_0 = start(x_tile, weight_ring, first, zero)
    part_1 = start(x_tile, weight_ring, first + 1, zero)
    part_0 = warpgroup_mma_wait(1, deps=[part_0])
    sum_0 += part_0 * (x_scale * scales[0])[:, None]
    part_2 = start(x_tile, weight_ring, first + 2, zero)
    part_1 = warpgroup_mma_wait(1, deps=[part_1])
    sum_1 += part_1 * (x_scale * scales[1])[:, None]
    part_2 = warpgroup_mma_wait(0, deps=[part_2])
    sum_2 += part_2 * (x_scale * scales[2])[:, None]
    return sum_0, sum_1, sum_2


@gluon.jit
def _scale_of(weight_scale_ptr, expert, column, chunk, k_tiles, scale_tiles):
    """The scale of 64 columns in a chunk; behind the last column that of the last."""
    block = expert.to(gl.int64) * scale_tiles + gl.minimum(column // CHUNK, scale_tiles - 1)
    return gl.load(weight_scale_ptr + block * k_tiles + chunk)


@gluon.jit
def _multiply(
    group, x_ring, weight_ring, bars, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
):  # fmt: skip
    """The 64 rows of a group, tile after tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    full, empty = bars
    zero = gl.zeros([PART, PART], gl.float32, layout=SUMS)
    place = (0, 0, 0, gl.load(ends_ptr))
    tile, number = gl.program_id(0), 0
    place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)
    while place[0] <= experts:
        row, column = corner(tile, place[1], place[2], place[3], n_tiles, BAND, ROWS, COLUMNS)
        row += group * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, SUMS))
        sums = (zero, zero, zero)
        chunks = gl.where(place[0] < experts, k_tiles, 0)
        x_scale_at = x_scale_ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride_scale
        for chunk in range(chunks):
            stage = number % STAGES
            x_scale = gl.load(x_scale_at + chunk * stride_tile)
            scale_0 = _scale_of(weight_scale_ptr, place[0], column, chunk, k_tiles, scale_tiles)
            scale_1 = _scale_of(weight_scale_ptr, place[0], column + PART, chunk, k_tiles, scale_tiles)
            scale_2 = _scale_of(weight_scale_ptr, place[0], column + 2 * PART, chunk, k_tiles, scale_tiles)
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            x_tile = x_ring.index(2 * stage + group)
            scales = (scale_0, scale_1, scale_2)
            sums = _add_chunk(sums, x_tile, weight_ring, 3 * stage, x_scale, scales, zero)
            mbarrier.arrive(empty.index(stage), count=1)
            number += 1
        at = out_ptr + row.to(gl.int64)[:, None] * n_dim
        for part in gl.static_range(3):
            columns = column + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, SUMS))
            kept = (row < place[3])[:, None] & (columns < n_dim)[None, :]
            gl.store(at + columns[None, :], sums[part].to(out_ptr.dtype.element_ty), mask=kept)
        tile += gl.num_programs(0)
        place = expert_of(tile, place, ends_ptr, rows, experts, n_tiles, ROWS)


@remembered
@gluon.jit(do_not_specialize=["rows"])
def _rows_times_blocks(
    x, weight, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: every so manieth tile of all experts."""
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, PART, CHUNK], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [3 * STAGES, PART, CHUNK], weight.layout)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            0, x_ring, weight_ring, bars, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr,
            rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
        )),
        (_multiply, (
            1, x_ring, weight_ring, bars, x_scale_ptr, weight_scale_ptr, out_ptr, ends_ptr,
            rows, experts, n_dim, k_tiles, n_tiles, scale_tiles, stride_scale, stride_tile,
        )),
        (_produce, (
            x, weight, x_ring, weight_ring, bars, ends_ptr, rows, experts, n_dim, k_tiles, n_tiles,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip


def linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`; the launch follows from shapes, so a CUDA graph can hold it."""
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    rows, k_dim = x.values.shape
    n_dim = values.shape[-2]
    ends = one_end(rows, values.device) if ends_E is None else ends_E
    experts, n_tiles = ends.shape[0], cdiv(n_dim, COLUMNS.value)
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=values.device)
    most_tiles = (rows // ROWS.value + experts + 1) * n_tiles
    programs = min(multiprocessors(values.device), most_tiles)
    if rows:
        _rows_times_blocks[(programs,)](
            tiles_of(x.values), tiles_of(values.flatten(0, -2)), x.scale, scale, out_RN, ends,
            rows, experts, n_dim, cdiv(k_dim, CHUNK.value), n_tiles, scale.shape[-2],
            *x.scale.stride(),
            REGISTERS=CONSUMER_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, maxnreg=ENTRY_REGISTERS,
        )  # fmt: skip
    return out_RN
