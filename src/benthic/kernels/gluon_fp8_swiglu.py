# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""SwiGLU's gradient in E4M3, in rows and in columns, for Hopper in Gluon.

Apart, the gradient writes 2F values a row and the quantiser reads them again. Here three squares of 128 x 128
come by TMA: of gates, of ups and of what arrives. Both gradients are computed once, rounded to 16 bits and
stored over gates and ups, while their largest magnitudes are taken; then each is quantised as
`gluon_fp8_squares` does. Words of columns lie over the third square, so that two programs of eight warps fit
a multiprocessor. Each square of the next tile is asked for as soon as this one's is not needed any more.

WEIGHTED: gradients are those of rows times weights, and what each row's weight gets of the square is written
beside: one float32, to be added to those of the other squares of the row.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from benthic.kernels.gluon_fp8_parts import (
    PLAIN,
    STAGED,
    TILE,
    clear_from,
    larger,
    largest_of_fours,
    largest_of_rows,
    store_row_values,
    wide,
    words_of,
)
from benthic.kernels.gluon_fp8_tiles import expert_of
from benthic.kernels.gluon_tiles import blocks_of, load, meet, new_bars, rows_loadable, take_context, view
from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import padded_rows
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_e4m3 import empty_tiles, inverse_of, tile_scale
from benthic.kernels.triton_tiles import multiprocessors

WORDS = gl.constexpr(32)
"""Of a column of a square."""
LEFT = gl.constexpr(gl.SwizzledSharedLayout(32, 8, 2, [1, 0]))
"""Numbers of columns that are left when each thread has compared its own; rows 8 apart lie in other banks."""
PROGRAMS, WARPS, REGISTERS = 2, 8, 128
"""Programs of a multiprocessor, as many as its shared memory holds, their warps, registers of a thread."""


@gluon.jit
def _sigmoid(x):
    """`1 / (1 + exp(-x))` as `tl.sigmoid` computes it, but 0 where that is below 2^-126, without branches."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 power;
        mul.f32 power, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 power, power;
        add.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _gradients(gate, up, dy, weight, product, PARTS: gl.constexpr, WEIGHTED: gl.constexpr):
    """Both gradients of a part, stored over gates and ups; operations in the order of `_swiglu_backward`.

    WEIGHTED: in that of `_weighted_swiglu_backward`, whose sums of products go to `product`.
    """
    g, u, d = wide(gate.load(PARTS)), wide(up.load(PARTS)), wide(dy.load(PARTS))
    sigmoid = _sigmoid(g)
    dgate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    dup = d * g * sigmoid
    if WEIGHTED:
        product.store(gl.sum(dup * u, axis=1))
        by = weight.load(gl.SliceLayout(1, PARTS))[:, None]
        dgate, dup = dgate * by, dup * by
    dgate, dup = dgate.to(gate.dtype), dup.to(gate.dtype)
    gate.store(dgate)
    up.store(dup)
    return dgate, dup


@gluon.jit
def _weights_of(row_weight_ptr, row, within, end, wanted):
    """Weights of a square's rows, 0 from their expert's end on."""
    mask = wanted & (row + within < end)
    return gl.load(row_weight_ptr + row + within, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _largest_of_pairs(x):
    """Of each two rows of a part, which a thread has, the number of largest magnitude."""
    a, b = gl.split(x.reshape([x.shape[0] // 2, 2, TILE]).permute((0, 2, 1)))
    return larger(a, b)


@gluon.jit
def _largest_of_columns(left):
    """The largest magnitude of each column of gates, then of ups, of which each has half of the rows left."""
    W: gl.constexpr = gl.num_warps()
    EIGHTS: gl.constexpr = gl.BlockedLayout([left.shape[0] // 4, 2], [2, 16], [2, W // 2], [1, 0])
    found = _largest_of_pairs(largest_of_fours(left.load(EIGHTS)))
    return gl.max(gl.abs(found.to(gl.float32)).reshape([2, 2, TILE]), axis=1).reshape([2 * TILE])


@gluon.jit
def _quantise(
    square, numbers, staged, values_ptr, columns, height,
    HALF: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Values of rows go to memory, words of columns to shared memory.

    `numbers` are scales of rows, their inverses, scales of columns, theirs: of gates, then of ups.
    """
    row_scale, row_inverses, column_scale, column_inverses = numbers
    by = column_scale.slice(HALF * TILE, TILE).load(gl.SliceLayout(0, PARTS))
    inverse = column_inverses.slice(HALF * TILE, TILE).load(gl.SliceLayout(0, PARTS))
    for first in gl.static_range(0, TILE, PART):
        x = wide(square.slice(first, PART).load(PARTS))
        row_by = row_scale.slice(HALF * TILE + first, PART).load(gl.SliceLayout(1, PARTS))
        row_inverse = row_inverses.slice(HALF * TILE + first, PART).load(gl.SliceLayout(1, PARTS))
        store_row_values(x, row_by, row_inverse, values_ptr, first, columns, height, TILE)
        words = words_of(x, by, inverse)
        staged.slice(first // 4, PART // 4, dim=1).store(words.permute((1, 0)))
    fence_async_shared()
    meet()


@gluon.jit
def _store_columns(staged, words_ptr, word_dim, owned, kept, TURNED: gl.constexpr):
    """Words of columns of a square to memory, zeros for rows that nobody owns."""
    out = gl.arange(0, TILE, layout=gl.SliceLayout(1, TURNED))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, TURNED))
    words = staged.load(TURNED)
    words = gl.where(owned, words, gl.zeros_like(words))
    width = gl.where(kept, TILE, 0)
    gl.store(words_ptr + ((out * word_dim)[:, None] + word[None, :]), words, mask=(out < width)[:, None])


@remembered
@gluon.jit(do_not_specialize=["rows", "squares"])
def _swiglu_squares(
    gate_up, dy, row_values_ptr, row_scale_ptr, column_words_ptr, column_scale_ptr, ends_ptr,
    row_weight_ptr, part_ptr,
    rows, experts, width_dim, word_dim, n_tiles, squares, row_tile_stride, column_tile_stride,
    HAS_ENDS: gl.constexpr, POWER_OF_TWO: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """Every so manieth square of gates, and those of ups and of dy that belong to it."""
    W: gl.constexpr = gl.num_warps()
    PART: gl.constexpr = 8 * W
    PARTS: gl.constexpr = gl.BlockedLayout([4, 8], [2, 16], [W, 1], [1, 0])
    SOME: gl.constexpr = 4 * W
    PAIRS: gl.constexpr = gl.BlockedLayout([2, 8], [2, 16], [W, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    TURNED: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [W, 1], [1, 0])
    gates = gl.allocate_shared_memory(gate_up.dtype, [TILE, TILE], gate_up.layout)
    ups = gl.allocate_shared_memory(gate_up.dtype, [TILE, TILE], gate_up.layout)
    dys = gl.allocate_shared_memory(dy.dtype, [TILE, TILE], dy.layout)
    staged = view(dys, gl.int32, [2 * TILE, WORDS], STAGED)
    # apart, for Triton has all warps meet between two stores to one
    of_rows = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    row_scale = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    row_inverse = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    column_scale = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    column_inverse = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    numbers = row_scale, row_inverse, column_scale, column_inverse
    left = gl.allocate_shared_memory(gate_up.dtype, [SOME, TILE], LEFT)
    weights, products = of_rows, of_rows
    if WEIGHTED:
        weights = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
        products = gl.allocate_shared_memory(gl.float32, [2 * TILE], PLAIN)
    bar = new_bars(1, 1).index(0)
    fence_async_shared()
    meet()
    end = rows
    if HAS_ENDS:
        end = gl.load(ends_ptr)
    line = gl.arange(0, 2 * TILE, layout=LINE)
    half, within = line // TILE, line % TILE
    at, phase = gl.program_id(0), 0
    place = expert_of(at, (0, 0, 0, end), ends_ptr, rows, experts, n_tiles, TILE)
    row, column = place[2] + (at - place[1]) // n_tiles * TILE, at % n_tiles * TILE
    more = at < squares
    mbarrier.expect(bar, 3 * gate_up.block_type.nbytes, pred=more)
    load(gate_up, [row, column], bar, gates, pred=more)
    load(gate_up, [row, width_dim + column], bar, ups, pred=more)
    load(dy, [row, column], bar, dys, pred=more)
    if WEIGHTED:
        weights.store(_weights_of(row_weight_ptr, row, within, place[3], more))
        meet()
    while more:
        owned, height, tile = place[0] < experts, place[3] - row, at // n_tiles
        kept = tile < word_dim // WORDS
        mbarrier.wait(bar, phase)
        phase ^= 1
        if height < TILE:
            clear_from(gates, height, PARTS, PART)
            clear_from(ups, height, PARTS, PART)
            clear_from(dys, height, PARTS, PART)
        dgate, dup = _gradients(
            gates.slice(0, SOME), ups.slice(0, SOME), dys.slice(0, SOME),
            weights.slice(0, SOME), products.slice(0, SOME), PAIRS, WEIGHTED,
        )  # fmt: skip
        of_rows.slice(0, SOME).store(largest_of_rows(dgate))
        of_rows.slice(TILE, SOME).store(largest_of_rows(dup))
        of_gates, of_ups = _largest_of_pairs(dgate), _largest_of_pairs(dup)
        for first in gl.static_range(SOME, TILE, SOME):
            dgate, dup = _gradients(
                gates.slice(first, SOME), ups.slice(first, SOME), dys.slice(first, SOME),
                weights.slice(first, SOME), products.slice(first, SOME), PAIRS, WEIGHTED,
            )  # fmt: skip
            of_rows.slice(first, SOME).store(largest_of_rows(dgate))
            of_rows.slice(TILE + first, SOME).store(largest_of_rows(dup))
            of_gates = larger(of_gates, _largest_of_pairs(dgate))
            of_ups = larger(of_ups, _largest_of_pairs(dup))
        left.store(gl.join(of_gates, of_ups).permute((2, 0, 1)).reshape([SOME, TILE]))
        meet()
        amax = _largest_of_columns(left)
        scale = tile_scale(of_rows.load(LINE), POWER_OF_TWO)
        row_scale.store(scale)
        row_inverse.store(inverse_of(scale))
        scale_at = row_scale_ptr + (column // TILE).to(gl.int64) * row_tile_stride + row
        half_at = half.to(gl.int64) * n_tiles * row_tile_stride
        gl.store(scale_at + half_at + within, scale, mask=within < height)
        if WEIGHTED:
            part_at = part_ptr + (column // TILE).to(gl.int64) * rows + row
            gl.store(part_at + line, products.load(LINE), mask=line < gl.minimum(height, TILE))
        scale = tile_scale(gl.where(owned, amax, 0.0), POWER_OF_TWO)
        column_scale.store(scale)
        column_inverse.store(inverse_of(scale))
        scale_at = column_scale_ptr + tile.to(gl.int64) * column_tile_stride + column
        column_at = gl.arange(0, 2 * TILE, layout=amax.type.layout)
        scale_at += column_at // TILE * width_dim + column_at % TILE
        gl.store(scale_at, scale, mask=column_at < gl.where(kept, 2 * TILE, 0))
        meet()
        values_ptr = row_values_ptr + row.to(gl.int64) * (2 * width_dim) + column
        words_ptr = column_words_ptr + column.to(gl.int64) * word_dim + tile * WORDS
        words, columns = staged.slice(0, TILE), 2 * width_dim
        _quantise(gates, numbers, words, values_ptr, columns, height, 0, PARTS, PART)
        at += gl.num_programs(0)
        more = at < squares
        place = expert_of(at, place, ends_ptr, rows, experts, n_tiles, TILE)
        row, column = place[2] + (at - place[1]) // n_tiles * TILE, at % n_tiles * TILE
        mbarrier.expect(bar, 3 * gate_up.block_type.nbytes, pred=more)
        load(gate_up, [row, column], bar, gates, pred=more)
        if WEIGHTED:
            weight = _weights_of(row_weight_ptr, row, within, place[3], more)
        _store_columns(words, words_ptr, word_dim, owned, kept, TURNED)
        words = staged.slice(TILE, TILE)
        _quantise(ups, numbers, words, values_ptr + width_dim, columns, height, 1, PARTS, PART)
        load(gate_up, [row, width_dim + column], bar, ups, pred=more)
        words_ptr += width_dim.to(gl.int64) * word_dim
        _store_columns(words, words_ptr, word_dim, owned, kept, TURNED)
        if WEIGHTED:
            weights.store(weight)
        meet()
        load(dy, [row, column], bar, dys, pred=more)


def swiglu_gradient_both(gate_up_RF2, dy_RF, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.swiglu_gradient_fp8_both`."""
    return _both(gate_up_RF2, dy_RF, None, None, ends_E, power_of_two=power_of_two)


def weighted_swiglu_gradient_both(gate_up_RF2, dy_RF, weight_R, ends_E, *, power_of_two):
    """See `benthic.kernels.ops.weighted_swiglu_gradient_fp8_both`."""
    rows, width = dy_RF.shape
    parts_tR = torch.empty(cdiv(width, TILE.value), rows, dtype=torch.float32, device=dy_RF.device)
    weight_R = weight_R.contiguous()
    tiles = _both(gate_up_RF2, dy_RF, weight_R, parts_tR, ends_E, power_of_two=power_of_two)
    return *tiles, parts_tR.sum(0)


def _both(gate_up_RF2, dy_RF, weight_R, parts_tR, ends_E, *, power_of_two):
    gate_up_RF2, dy_RF = rows_loadable(gate_up_RF2), rows_loadable(dy_RF)
    rows, width = dy_RF.shape
    experts, n_tiles = 1 if ends_E is None else ends_E.shape[0], cdiv(width, TILE.value)
    padded = padded_rows(rows, experts)
    by_row = empty_tiles(rows, 2 * width, dy_RF.device)
    by_column = empty_tiles(2 * width, padded, dy_RF.device)
    words = by_column.values.view(torch.int32)
    # one tile more than columns have room for: the rows past the last expert may begin in it
    squares = (padded // TILE.value + 1) * n_tiles
    if rows and width:
        take_context(dy_RF.device)
        _swiglu_squares[(min(PROGRAMS * multiprocessors(dy_RF.device), squares),)](
            blocks_of(gate_up_RF2, TILE.value, TILE.value), blocks_of(dy_RF, TILE.value, TILE.value),
            by_row.values, by_row.scale, words, by_column.scale, words if ends_E is None else ends_E,
            weight_R, parts_tR, rows, experts, width, padded // 4, n_tiles, squares,
            by_row.scale.stride(1), by_column.scale.stride(1),
            HAS_ENDS=ends_E is not None, POWER_OF_TWO=power_of_two, WEIGHTED=weight_R is not None,
            num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return by_row, by_column
