# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""MLA decode of few rows in Gluon: scores and sums of values with pages as the tall operand (`gluon_mla`).

Pages lie in a ring of pieces of 64 tokens x 64 dims, nine a page, whoever fills it. Four warps compute scores
and weights, four others outputs, at most two pages later.
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

from benthic.kernels.gluon_mla_shares import (
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
    rows_of,
)
from benthic.kernels.gluon_tiles import load, meet, new_bars, view
from benthic.kernels.host import cdiv
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.triton_tiles import multiprocessors

PIECES = gl.constexpr(9)
"""Of 64 dims in a page: eight of the latent, one of the rotary key."""
VALUES = gl.constexpr(8)
TURNS = gl.constexpr(4)
"""Barriers of each kind; no more than three pages are in the ring, in whole or in part."""
AHEAD = gl.constexpr(2)
"""Pages of weights that scores may be before outputs."""
BOX = gl.constexpr(16)
"""Tokens that are loaded at once of a page that a context ends in."""

wait = gluon.jit(wait_for_inputs.fn)


@gluon.jit
def slot_of(base, piece: gl.constexpr, RING: gl.constexpr):
    """Where in the ring a piece of the page at `base` lies."""
    at = base + piece
    return gl.where(at >= RING, at - RING, at)


@gluon.jit
def wait_until_used(empty, number):
    """Until nothing reads the page of that number any more; there is none before 0."""
    mbarrier.wait(empty.index(number % TURNS), (number // TURNS) & 1, pred=number >= 0)


@gluon.jit
def _load_queries(
    queries, latent_ptr, rope_ptr, latent_strides, rope_strides, sequence, rows, heads, ROWS: gl.constexpr
):  # fmt: skip
    """The rows of a sequence to shared memory."""
    for piece in gl.static_range(VALUES):
        at = latent_ptr + piece * 64
        copy_rows(queries.index(piece), at, latent_strides, sequence, 0, rows, heads, ROWS, 64)
    copy_rows(queries.index(VALUES), rope_ptr, rope_strides, sequence, 0, rows, heads, ROWS, 64)
    copied()


@gluon.jit
def boxes_of(ring):
    """The ring as boxes of some tokens of a piece, one after another."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX, 64], ring.dtype)
    return view(ring, ring.dtype, [ring.shape[0] * (PAGE // BOX), BOX, 64], layout)


@gluon.jit
def wake(cache, place):
    """Load a block before the first token, so zeros: TMA has read its descriptor when the first page comes.

    Returns the barrier to wait for before `place` is used. All barriers made before are ready for TMA.
    """
    woken = new_bars(1, 1)
    fence_async_shared()
    mbarrier.expect(woken.index(0), cache.block_type.nbytes)
    load(cache, [-PAGE, 0], woken.index(0), place)
    return woken.index(0)


@gluon.jit
def _clear_foreign_tokens(ring, base, tokens, RING: gl.constexpr):
    """Zero what a page's last box holds behind the context: weights there are 0, but 0 times NaN is not.

    Zeros were loaded behind the box.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = tokens // BOX * BOX + gl.arange(0, BOX, layout=gl.SliceLayout(1, layout))
    boxes = boxes_of(ring)
    places = [
        boxes.index(slot_of(base, piece, RING) * (PAGE // BOX) + tokens // BOX)
        for piece in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    values = [place.load(layout) for place in places]
    for piece in gl.static_range(VALUES):
        zero = gl.zeros_like(values[piece])
        places[piece].store(gl.where((row < tokens)[:, None], values[piece], zero))
    fence_async_shared()
    meet()


@gluon.jit
def _weights(s, m, total, visible, scale, SCORES: gl.constexpr):
    """Powers of a page of scores, the new greatest score a row, sums of powers, and what old sums are worth.

    Sums are kept apart for each place in the tile, and added up at the end. A row that has seen no token
    keeps m = -inf; 0 is subtracted there, so that its weights are 2^-inf = 0.
    """
    token = gl.arange(0, PAGE, layout=gl.SliceLayout(1, SCORES))
    s = gl.where(token[:, None] < visible[None, :], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=0))
    shift = gl.where(m_new == float("-inf"), 0.0, m_new * scale)
    p = gl.exp2(s * scale - shift[None, :])
    alpha = gl.exp2(m * scale - shift)
    return p, m_new, total * alpha[None, :] + p, alpha


@gluon.jit
def score(
    latent_ptr, rope_ptr, context_ptr, lse_ptr, ends_ptr, latent_strides, rope_strides,
    sequences, rows, heads, scale, ring, queries, weights, alphas, factors, bars, share,
    ROWS: gl.constexpr, RING: gl.constexpr, CLEAR: gl.constexpr,
):  # fmt: skip
    """Scores and weights of a share, page after page, at most `AHEAD` pages before their outputs.

    `CLEAR`: pages may hold NaN and infinities behind the context; E4M3 as widened is 480 at most.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    full, weighed, empty, ending = bars
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCORES))
    zero = gl.zeros([PAGE, ROWS], gl.float32, layout=SCORES)
    sequence, page, left = share
    number, base, part = 0, 0, 0
    while left > 0:
        context, pages = pages_of(context_ptr, sequence, page, left)
        if pages > 0:
            _load_queries(
                queries, latent_ptr, rope_ptr, latent_strides, rope_strides, sequence, rows, heads, ROWS
            )
            last_seen = context - (rows - 1 - row) // heads  # tokens that each row sees
            m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, SCORES))
            total = zero
            for i in range(pages):
                first = (page + i) * PAGE
                mbarrier.wait(full.index(number % TURNS), (number // TURNS) & 1)
                if CLEAR and first + PAGE > context and context % BOX > 0:
                    _clear_foreign_tokens(ring, base, context - first, RING)
                s = zero
                for piece in gl.static_range(PIECES):
                    keys = ring.index(slot_of(base, piece, RING))
                    query = queries.index(piece).permute((1, 0))
                    s = warpgroup_mma(keys, query, s, use_acc=piece > 0, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                p, m, total, alpha = _weights(s, m, total, last_seen - first, scale, SCORES)
                wait_until_used(empty, number - AHEAD)
                weights.index(number % AHEAD).store(p.to(weights.dtype))
                alphas.index(number % AHEAD).store(alpha)
                fence_async_shared()
                meet()
                mbarrier.arrive(weighed.index(number % TURNS), count=1)
                number += 1
                base = slot_of(base, PIECES, RING)
            lse = conclude(m, gl.sum(total, axis=0), scale, factors, ending, part)
            part += 1
            begins, ends = begins_and_ends(context, page, pages)
            note(ends_ptr, sequences, sequence, gl.program_id(0), begins, ends)
            if not (begins and ends):
                gl.store(lse_ptr + (2 * gl.program_id(0) + begins) * ROWS + row, lse)
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit
def _values(ring, base, piece: gl.constexpr, RING: gl.constexpr):
    """A piece of a page turned round: 64 dims x 64 tokens."""
    return ring.index(slot_of(base, piece, RING)).permute((1, 0))


@gluon.jit
def sum_values(
    context_ptr, part_ptr, out_ptr, rows, ring, weights, alphas, factors, bars, share,
    ROWS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Outputs of a share, page after page, as weights come."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    _full, weighed, empty, ending = bars
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OUT))
    dim = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    zero = gl.zeros([64, ROWS], gl.float32, layout=OUT)
    at = row[None, :] * LATENT + dim[:, None]
    sequence, page, left = share
    number, base, part = 0, 0, 0
    while left > 0:
        context, pages = pages_of(context_ptr, sequence, page, left)
        if pages > 0:
            acc = [zero for _ in (0, 1, 2, 3, 4, 5, 6, 7)]
            for _i in range(pages):
                mbarrier.wait(weighed.index(number % TURNS), (number // TURNS) & 1)
                alpha = alphas.index(number % AHEAD).load(gl.SliceLayout(0, OUT))
                acc = [x * alpha[None, :] for x in acc]
                weight = weights.index(number % AHEAD)
                acc = [
                    warpgroup_mma(_values(ring, base, piece, RING), weight, acc[piece], is_async=True)
                    for piece in (0, 1, 2, 3, 4, 5, 6, 7)
                ]
                acc = warpgroup_mma_wait(0, deps=acc)
                mbarrier.arrive(empty.index(number % TURNS), count=1)
                number += 1
                base = slot_of(base, PIECES, RING)
            factor = factor_of(factors, ending, part, gl.SliceLayout(0, OUT))
            part += 1
            acc = [x * factor[None, :] for x in acc]
            begins, ends = begins_and_ends(context, page, pages)
            if begins and ends:
                rows_ptr, kept = out_ptr + sequence.to(gl.int64) * rows * LATENT, (row < rows)[None, :]
                for piece in gl.static_range(VALUES):
                    gl.store(rows_ptr + piece * 64 + at, acc[piece].to(out_ptr.dtype.element_ty), mask=kept)
            else:
                own_ptr = part_ptr + (2 * gl.program_id(0) + begins) * ROWS * LATENT
                for piece in gl.static_range(VALUES):
                    gl.store(own_ptr + piece * 64 + at, acc[piece])
        sequence, page, left = sequence + 1, 0, left - pages


def launch(
    decode, descriptors, forms, registers,
    q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, scale,
):  # fmt: skip
    """Run `decode` over the shares of all pages, then add up what it leaves in parts.

    `descriptors` are of the cache, as `decode` loads it; `forms` has its own constants for up to so many
    rows; `registers` are a thread's before groups divide it.
    """
    (q_latent_SQHC, by_latent), (q_rope_SQHr, by_rope) = rows_of(q_latent_SQHC), rows_of(q_rope_SQHr)
    sequences, queries, heads, _latent = q_latent_SQHC.shape
    device, rows = cache_PBW.device, queries * heads
    out = torch.empty(q_latent_SQHC.shape, dtype=q_latent_SQHC.dtype, device=device)
    pages = sequences * block_table_SP.shape[1]
    if out.numel() == 0 or pages == 0:
        return out.zero_()
    padded = 16 if rows <= 16 else 32
    programs = min(multiprocessors(device), cdiv(pages, LEAST_PAGES))
    part, lse, ends, many = parts_of(sequences, programs, padded, device)
    decode[(programs,)](
        *descriptors, q_latent_SQHC, q_rope_SQHr, block_table_SP, context_S, part, lse, ends, out,
        *by_latent, *by_rope, block_table_SP.stride(0),
        sequences, rows, heads, scale,
        ROWS=padded, **forms[padded], LEAST=LEAST_PAGES, MANY=many, num_warps=4, maxnreg=registers,
        **early(device, sequences * queries),
    )  # fmt: skip
    add_up((part, lse, ends), context_S, out, programs)
    return out
