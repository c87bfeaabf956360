# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Paged absorbed MLA decode for Hopper in Gluon: 64 query-head pairs of a sequence are the tall operand.

For more pairs (rows) than `gluon_mla` takes; both products are then

    S = Q K^T  (64 rows x 64 tokens)  and  O = P V  (64 rows x 512 dims)

A program holds 64 rows and two pages, each 64 tokens x (4 x 128 + 64) dims. One warp loads pieces of 128 dims
by TMA, four warps compute scores and weights, and twice four others sum half of the values each. Weights go
through shared memory into registers. Piece after piece comes free as values are summed, and scores begin
with the first piece that is there, so loads, scores and values of three pages overlap.

Programs with the same share of all pages stand side by side, one for each 64 rows: what one reads, the others
find in the L2 cache. Shares and their parts are those of `gluon_mla_shares`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from old_gluon_mla_shares import (
    LATENT,
    LEAST_PAGES,
    PAGE,
    add_up,
    begins_and_ends,
    conclude,
    copied,
    copy_rows,
    factor_of,
    note,
    pages_of,
    parts_of,
    pieces_of,
    rows_of,
    share_of,
)
from benthic.kernels.gluon_tiles import LOG2E, clear_after, load, meet, new_bars
from benthic.kernels.host import cdiv
from benthic.kernels.triton_tiles import multiprocessors

ROWS = gl.constexpr(64)
WIDTH = gl.constexpr(128)
"""Dims of a piece of the latent."""
VALUES = gl.constexpr(4)
"""Pieces of a latent."""
HALF = gl.constexpr(2)
"""Pieces that a group sums."""
ROPE = gl.constexpr(64)
PAGES = gl.constexpr(2)
"""In shared memory."""
VALUE_REGISTERS = 176
PRODUCER_REGISTERS = 32
ENTRY_REGISTERS = 128
"""Of a thread before the groups divide them: 65,536 over four groups of 128 threads."""


@gluon.jit
def _place(number, piece):
    """Where a piece of the page of that number lies, and its barriers."""
    return number % PAGES * VALUES + piece


@gluon.jit
def _turn(number):
    """Phase of the barriers of the page of that number."""
    return (number // PAGES) & 1


@gluon.jit
def _nth(k: gl.constexpr):
    """The k-th piece to be loaded: both groups free their pieces in order, side by side."""
    return k // 2 + k % 2 * HALF


@gluon.jit
def _produce(latents, ropes, table_ptr, context_ptr, stride_table, values, keys, bars, share):
    """Load the pages of a share, piece after piece, as places come free; the rotary key with the first."""
    full, empty, _weighed, _taken, _ending = bars
    sequence, page, left = share
    number = 0
    while left > 0:
        _context, pages = pages_of(context_ptr, sequence, page, left)
        row_ptr = table_ptr + sequence.to(gl.int64) * stride_table + page
        coming = gl.load(row_ptr, mask=pages > 0, other=0)
        for i in range(pages):
            token = coming * PAGE
            coming = gl.load(row_ptr + i + 1, mask=i + 1 < pages, other=0)
            for k in gl.static_range(VALUES):
                place = _place(number, _nth(k))
                mbarrier.wait(empty.index(place), _turn(number) ^ 1)
                bar = full.index(place)
                mbarrier.expect(bar, latents.block_type.nbytes + (ropes.block_type.nbytes if k == 0 else 0))
                if k == 0:
                    load(ropes, [token, LATENT], bar, keys.index(number % PAGES))
                load(latents, [token, _nth(k) * WIDTH], bar, values.index(place))
            number += 1
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit
def _load_queries(
    queries, latent_ptr, rope_ptr, latent_strides, rope_strides, sequence, first_row, rows, heads
):  # fmt: skip
    """Queries of 64 rows to shared memory, all pieces at once and past registers."""
    latents, ropes = queries
    for k in gl.static_range(VALUES):
        at = latent_ptr + k * WIDTH
        copy_rows(latents.index(k), at, latent_strides, sequence, first_row, rows, heads, ROWS, WIDTH)
    copy_rows(ropes, rope_ptr, rope_strides, sequence, first_row, rows, heads, ROWS, ROPE)
    copied()


@gluon.jit
def _clear_foreign_tokens(values, number, full, tokens):
    """Zero what a page holds behind the context: weights there are 0, but 0 times NaN is not."""
    for piece in gl.static_range(VALUES):
        place = _place(number, piece)
        mbarrier.wait(full.index(place), _turn(number))
        clear_after(values.index(place), tokens, PAGE, WIDTH)
    fence_async_shared()
    meet()


@gluon.jit
def _scores(queries, values, keys, number, full, zero):
    """Products of 64 rows and the tokens of a page, piece after piece as they come."""
    latents, ropes = queries
    s = zero
    for k in gl.static_range(VALUES):
        place = _place(number, _nth(k))
        mbarrier.wait(full.index(place), _turn(number))
        key = values.index(place).permute((1, 0))
        s = warpgroup_mma(latents.index(_nth(k)), key, s, use_acc=k > 0, is_async=True)
        if k == 0:
            s = warpgroup_mma(ropes, keys.index(number % PAGES).permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _weights(s, m, total, visible, scale, cut, SCORES: gl.constexpr):
    """Powers of a page of scores, the new greatest score a row, sums of powers, and what old sums are worth.

    Where the page is cut, rows see `visible` tokens of it. A row that has seen no token keeps m = -inf; 0 is
    subtracted there, so that its weights are 2^-inf = 0.
    """
    if cut:
        token = gl.arange(0, PAGE, layout=gl.SliceLayout(0, SCORES))
        s = gl.where(token[None, :] < visible[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=1))
    shift = gl.where(m_new == float("-inf"), 0.0, m_new * scale)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m * scale - shift)
    return p, m_new, total * alpha + gl.sum(p, axis=1), alpha


@gluon.jit
def _part(begins, tiles):
    """Where this program's 64 rows of a part of a sequence begin."""
    share, tile = gl.program_id(0) // tiles, gl.program_id(0) % tiles
    return ((2 * share + begins) * tiles + tile) * ROWS


@gluon.jit
def _score(
    latent_ptr, rope_ptr, context_ptr, lse_ptr, ends_ptr, latent_strides, rope_strides,
    sequences, rows, heads, scale, values, keys, queries, weights, alphas, factors, bars, share, tiles,
):  # fmt: skip
    """Scores and weights of a share, page after page."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE, 16])
    full, _empty, weighed, taken, ending = bars
    first_row = gl.program_id(0) % tiles * ROWS
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    zero = gl.zeros([ROWS, PAGE], gl.float32, layout=SCORES)
    sequence, page, left = share
    number, part = 0, 0
    while left > 0:
        context, pages = pages_of(context_ptr, sequence, page, left)
        if pages > 0:
            _load_queries(
                queries, latent_ptr, rope_ptr, latent_strides, rope_strides,
                sequence, first_row, rows, heads,
            )  # fmt: skip
            last_seen = context - (rows - 1 - first_row - row) // heads  # tokens that each row sees
            m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
            total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
            for i in range(pages):
                first = (page + i) * PAGE
                if first + PAGE > context:
                    _clear_foreign_tokens(values, number, full, context - first)
                s = _scores(queries, values, keys, number, full, zero)
                cut = first + PAGE > context - (rows - 1) // heads
                p, m, total, alpha = _weights(s, m, total, last_seen - first, scale, cut, SCORES)
                mbarrier.wait(taken, (number - 1) & 1, pred=number > 0)
                weights.store(p.to(weights.dtype))
                alphas.store(alpha)
                meet()
                mbarrier.arrive(weighed, count=1)
                number += 1
            lse = conclude(m, total, scale, factors, ending, part)
            part += 1
            begins, ends = begins_and_ends(context, page, pages)
            note(ends_ptr, sequences, sequence, gl.program_id(0) // tiles, begins, ends)
            if not (begins and ends):
                gl.store(lse_ptr + _part(begins, tiles) + row, lse)
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit
def _sum_values(
    group, context_ptr, part_ptr, out_ptr, rows, values, weights, alphas, factors, bars, share, tiles
):  # fmt: skip
    """Half of the outputs of a share, page after page, as weights come."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    _full, empty, weighed, taken, ending = bars
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    dim = group * HALF * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT))
    zero = gl.zeros([ROWS, WIDTH], gl.float32, layout=OUT)
    at = row[:, None] * LATENT + dim[None, :]
    sequence, page, left = share
    number, part = 0, 0
    while left > 0:
        context, pages = pages_of(context_ptr, sequence, page, left)
        if pages > 0:
            acc_0, acc_1 = zero, zero
            for _i in range(pages):
                mbarrier.wait(weighed, number & 1)
                p = weights.load(LEFT)
                alpha = alphas.load(gl.SliceLayout(1, OUT))[:, None]
                mbarrier.arrive(taken, count=1)
                acc_0, acc_1 = acc_0 * alpha, acc_1 * alpha
                place = _place(number, group * HALF)
                acc_0 = warpgroup_mma(p, values.index(place), acc_0, is_async=True)
                acc_1 = warpgroup_mma(p, values.index(place + 1), acc_1, is_async=True)
                acc_0 = warpgroup_mma_wait(1, deps=[acc_0])
                mbarrier.arrive(empty.index(place), count=1)
                acc_1, p = warpgroup_mma_wait(0, deps=[acc_1, p])
                mbarrier.arrive(empty.index(place + 1), count=1)
                number += 1
            factor = factor_of(factors, ending, part, gl.SliceLayout(1, OUT))[:, None]
            part += 1
            acc_0, acc_1 = acc_0 * factor, acc_1 * factor
            begins, ends = begins_and_ends(context, page, pages)
            if begins and ends:
                first = gl.program_id(0) % tiles * ROWS
                rows_ptr = out_ptr + (sequence.to(gl.int64) * rows + first) * LATENT
                kept = (row < rows - first)[:, None]
                gl.store(rows_ptr + at, acc_0.to(out_ptr.dtype.element_ty), mask=kept)
                gl.store(rows_ptr + WIDTH + at, acc_1.to(out_ptr.dtype.element_ty), mask=kept)
            else:
                own_ptr = part_ptr + _part(begins, tiles) * LATENT
                gl.store(own_ptr + at, acc_0)
                gl.store(own_ptr + WIDTH + at, acc_1)
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit(do_not_specialize=["sequences"])
def _decode(
    latents, ropes, latent_ptr, rope_ptr, table_ptr, context_ptr, part_ptr, lse_ptr, ends_ptr, out_ptr,
    stride_qs, stride_qq, stride_qh, stride_rs, stride_rq, stride_rh, stride_table,
    sequences, rows, heads, tiles, scale,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr, LEAST: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: 64 rows of its share of all pages."""
    number, shares = gl.program_id(0) // tiles, gl.num_programs(0) // tiles
    share = share_of(context_ptr, sequences, number, shares, LEAST, MANY)
    dtype: gl.constexpr = latents.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    values = gl.allocate_shared_memory(dtype, [PAGES * VALUES, PAGE, WIDTH], latents.layout)
    keys = gl.allocate_shared_memory(dtype, [PAGES, PAGE, ROPE], ropes.layout)
    queries = (
        gl.allocate_shared_memory(dtype, [VALUES, ROWS, WIDTH], latents.layout),
        gl.allocate_shared_memory(dtype, [ROWS, ROPE], ropes.layout),
    )
    weights = gl.allocate_shared_memory(dtype, [ROWS, PAGE], ropes.layout)
    alphas = gl.allocate_shared_memory(gl.float32, [ROWS], plain)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], plain)
    by_one, by_two = new_bars(2, 1), new_bars(2, 2)  # arrivals: of scores, of both groups that sum
    bars = (
        new_bars(PAGES * VALUES, 1), new_bars(PAGES * VALUES, 1), by_one.index(0), by_two.index(0),
        (by_one.index(1), by_two.index(1)),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize([
        (_score, (
            latent_ptr, rope_ptr, context_ptr, lse_ptr, ends_ptr, (stride_qs, stride_qq, stride_qh),
            (stride_rs, stride_rq, stride_rh), sequences, rows, heads, scale * LOG2E, values, keys, queries,
            weights, alphas, factors, bars, share, tiles,
        )),
        (_sum_values, (
            0, context_ptr, part_ptr, out_ptr, rows, values, weights, alphas, factors, bars, share, tiles,
        )),
        (_sum_values, (
            1, context_ptr, part_ptr, out_ptr, rows, values, weights, alphas, factors, bars, share, tiles,
        )),
        (_produce, (latents, ropes, table_ptr, context_ptr, stride_table, values, keys, bars, share)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, FEW_REGISTERS])  # fmt: skip


def mla_decode(q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, *, scale):
    """See `benthic.kernels.ops.mla_decode`; launches follow from shapes, so a CUDA graph can hold them."""
    (q_latent_SQHC, by_latent), (q_rope_SQHr, by_rope) = rows_of(q_latent_SQHC), rows_of(q_rope_SQHr)
    sequences, queries, heads, _latent = q_latent_SQHC.shape
    device, rows = cache_PBW.device, queries * heads
    out = torch.empty(q_latent_SQHC.shape, dtype=q_latent_SQHC.dtype, device=device)
    pages = sequences * block_table_SP.shape[1]
    if out.numel() == 0 or pages == 0:
        return out.zero_()
    tiles = cdiv(rows, ROWS.value)
    shares = min(max(multiprocessors(device) // tiles, 1), cdiv(pages, LEAST_PAGES))
    part, lse, ends, many = parts_of(sequences, shares, tiles * ROWS.value, device)
    _decode[(shares * tiles,)](
        pieces_of(cache_PBW, WIDTH.value), pieces_of(cache_PBW, ROPE.value),
        q_latent_SQHC, q_rope_SQHr, block_table_SP, context_S, part, lse, ends, out,
        *by_latent, *by_rope, block_table_SP.stride(0),
        sequences, rows, heads, tiles, scale,
        REGISTERS=VALUE_REGISTERS, FEW_REGISTERS=PRODUCER_REGISTERS, LEAST=LEAST_PAGES, MANY=many,
        num_warps=4, maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
    add_up((part, lse, ends), context_S, out, shares)
    return out
