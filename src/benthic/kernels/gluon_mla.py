# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Paged absorbed MLA decode for Hopper in Gluon: pages are the tall operand, loads have a warp of their own.

A page holds 64 tokens of 512 + 64 dims and a sequence has few query-head pairs (rows), so both products are
turned round. Nothing is padded to 64 rows, and the latent is read once, as keys and as values:

    S^T = K Q^T  (64 tokens x rows)  and  O^T = V^T P^T  (512 dims x rows)

Shared memory is a ring of pieces of 64 tokens x 64 dims, nine a page. One warp fills it by TMA, four warps
compute scores and weights, four others outputs, at most two pages later. All pages of all sequences are cut
into shares, one a multiprocessor, so a program may meet the end of one sequence and the beginning of
others. Outputs of a sequence of which it has all pages it writes; of others it leaves parts, which a second
kernel weighs (`gluon_mla_shares`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from benthic.kernels.gluon_mla_rows import (
    AHEAD,
    BOX,
    PIECES,
    TURNS,
    boxes_of,
    launch,
    score,
    slot_of,
    sum_values,
    wait,
    wait_until_used,
    wake,
)
from benthic.kernels.gluon_mla_shares import PAGE, pages_of, pieces_of, share_of
from benthic.kernels.gluon_tiles import LOG2E, load, new_bars

FORMS = {16: {"RING": 25, "REGISTERS": 168}, 32: {"RING": 22, "REGISTERS": 216}}
"""For up to so many rows: pieces in the ring (227 KiB in all), registers of a thread that sums values."""
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


@gluon.jit
def _load_piece(cache, few, token, tokens, column, bar, ring, slot):
    """A piece of a page to its place; of a page that the context ends in, sixteen tokens at a time.

    What lies wholly behind the context is not read: before the first token of the cache TMA finds zeros.
    """
    if tokens >= PAGE:
        load(cache, [token, column], bar, ring.index(slot))
    else:
        boxes = boxes_of(ring)
        for box in gl.static_range(PAGE // BOX):
            begin = gl.where(box * BOX < tokens, token + box * BOX, -BOX)
            load(few, [begin, column], bar, boxes.index(slot * (PAGE // BOX) + box))


@gluon.jit
def _produce(cache, few, table_ptr, context_ptr, stride_table, ring, bars, woken, share, RING: gl.constexpr):
    """Load the pages of a share, one after another, as places come free.

    The first pieces of a page take the places of the page three before, the last ones those of the page two
    before.
    """
    full, _weighed, empty, _ending = bars
    sequence, page, left = share
    number, base = 0, 0
    mbarrier.wait(woken, 0)
    while left > 0:
        context, pages = pages_of(context_ptr, sequence, page, left)
        row_ptr = table_ptr + sequence.to(gl.int64) * stride_table + page
        coming = gl.load(row_ptr, mask=pages > 0, other=0)
        for i in range(pages):
            token, tokens = coming * PAGE, context - (page + i) * PAGE
            coming = gl.load(row_ptr + i + 1, mask=i + 1 < pages, other=0)
            bar = full.index(number % TURNS)
            wait_until_used(empty, number - 3)
            mbarrier.expect(bar, PIECES * cache.block_type.nbytes)
            for piece in gl.static_range(PIECES):
                if piece == RING - 2 * PIECES:
                    wait_until_used(empty, number - 2)
                _load_piece(cache, few, token, tokens, piece * 64, bar, ring, slot_of(base, piece, RING))
            number += 1
            base = slot_of(base, PIECES, RING)
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit(do_not_specialize=["sequences"])
def _decode(
    cache, few, latent_ptr, rope_ptr, table_ptr, context_ptr, part_ptr, lse_ptr, ends_ptr, out_ptr,
    stride_qs, stride_qq, stride_qh, stride_rs, stride_rq, stride_rh, stride_table,
    sequences, rows, heads, scale,
    ROWS: gl.constexpr, RING: gl.constexpr, REGISTERS: gl.constexpr, LEAST: gl.constexpr, MANY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: its share of all pages."""
    dtype: gl.constexpr = cache.dtype
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], dtype)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, ROWS], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(dtype, [RING, PAGE, 64], cache.layout)
    queries = gl.allocate_shared_memory(dtype, [PIECES, ROWS, 64], rows_layout)
    weights = gl.allocate_shared_memory(dtype, [AHEAD, PAGE, ROWS], weights_layout)
    alphas = gl.allocate_shared_memory(gl.float32, [AHEAD, ROWS], plain)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], plain)
    ending = new_bars(2, 1)
    bars = (new_bars(TURNS, 1), new_bars(TURNS, 1), new_bars(TURNS, 1), (ending.index(0), ending.index(1)))
    woken = wake(cache, ring.index(RING - 1))
    wait(PDL)
    share = share_of(context_ptr, sequences, gl.program_id(0), gl.num_programs(0), LEAST, MANY)
    gl.warp_specialize([
        (score, (
            latent_ptr, rope_ptr, context_ptr, lse_ptr, ends_ptr, (stride_qs, stride_qq, stride_qh),
            (stride_rs, stride_rq, stride_rh), sequences, rows, heads, scale * LOG2E, ring, queries, weights,
            alphas, factors, bars, share, ROWS, RING, True,
        )),
        (sum_values, (
            context_ptr, part_ptr, out_ptr, rows, ring, weights, alphas, factors, bars, share, ROWS, RING,
        )),
        (_produce, (cache, few, table_ptr, context_ptr, stride_table, ring, bars, woken, share, RING)),
    ], [4, 1], [REGISTERS, 32])  # fmt: skip


def mla_decode(q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, *, scale):
    """See `benthic.kernels.ops.mla_decode`; launches follow from shapes, so a CUDA graph can hold them."""
    operands = q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S
    descriptors = pieces_of(cache_PBW, 64), pieces_of(cache_PBW, 64, BOX.value)
    return launch(_decode, descriptors, FORMS, ENTRY_REGISTERS, *operands, scale)
