# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""MLA decode for Hopper in Gluon, few rows and a cache in E4M3: `gluon_mla`, and four warps that widen pages.

A warp loads thirds of pages as they lie in memory, 64 tokens x (3 x 64) bytes. Four warps make bfloat16 of
them, which is exact, and fill the ring, two pages long; scores and sums of values are those of `gluon_mla`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from benthic.kernels.gluon_mla_rows import (
    AHEAD,
    PIECES,
    TURNS,
    launch,
    score,
    sum_values,
    wait,
    wait_until_used,
    wake,
)
from benthic.kernels.gluon_mla_shares import PAGE, pages_of, pieces_of, share_of
from benthic.kernels.gluon_tiles import LOG2E, load, meet, new_bars

THIRD = gl.constexpr(3)
"""Pieces of a page that are loaded, and widened, at once."""
RING = gl.constexpr(18)
FORMS = {
    16: {"SLOTS": 4, "REGISTERS": 144, "WIDEN_REGISTERS": 96},
    32: {"SLOTS": 3, "REGISTERS": 200, "WIDEN_REGISTERS": 96},
}
"""For up to so many rows: thirds of pages as loaded; registers of a thread that sums values, that widens."""
ENTRY_REGISTERS = 128
"""Of a thread before the groups divide them: 65,536 over four groups of 128 threads."""
WIDEN = gl.constexpr("""{
.reg .b32 low, high, sign, scale;
mov.b32 scale, 0x7b807b80;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
shr.u32 low, low, 4;
and.b32 low, low, 0x07f007f0;
or.b32 low, low, sign;
and.b32 sign, high, 0x80008000;
shr.u32 high, high, 4;
and.b32 high, high, 0x07f007f0;
or.b32 high, high, sign;
mul.rn.bf16x2 $0, low, scale;
mul.rn.bf16x2 $1, high, scale;
}""")
"""Four E4M3 as bfloat16: there their bits are the number times 2^-120. NaN reads as 480: nobody stores it."""


@gluon.jit
def _produce(cache, table_ptr, context_ptr, stride_table, raw, bars, woken, share, SLOTS: gl.constexpr):
    """Load the pages of a share, a third after another, as places come free."""
    filled, taken = bars
    sequence, page, left = share
    number = 0
    mbarrier.wait(woken, 0)
    while left > 0:
        _context, pages = pages_of(context_ptr, sequence, page, left)
        row_ptr = table_ptr + sequence.to(gl.int64) * stride_table + page
        coming = gl.load(row_ptr, mask=pages > 0, other=0)
        for i in range(pages):
            token = coming * PAGE
            coming = gl.load(row_ptr + i + 1, mask=i + 1 < pages, other=0)
            for third in gl.static_range(3):
                slot = number % SLOTS
                bar = filled.index(slot)
                mbarrier.wait(taken.index(slot), ((number // SLOTS) & 1) ^ 1)
                mbarrier.expect(bar, THIRD * cache.block_type.nbytes)
                for piece in gl.static_range(THIRD):
                    column = (third * THIRD + piece) * 64
                    load(cache, [token, column], bar, raw.index(slot * THIRD + piece))
                number += 1
        sequence, page, left = sequence + 1, 0, left - pages


@gluon.jit
def _widen(raw, ring, raw_bars, bars, pages, SLOTS: gl.constexpr):
    """Pages of a share to bfloat16, one after another.

    A place is given back when its numbers are stored, and so have arrived: neither a barrier of threads nor
    an arrival waits for loads from shared memory that are under way, and TMA does not queue behind them.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    filled, taken = raw_bars
    full, _weighed, empty, _ending = bars
    for page in range(pages):
        wait_until_used(empty, page - 2)
        for third in gl.static_range(3):
            number = page * 3 + third
            slot = number % SLOTS
            mbarrier.wait(filled.index(slot), (number // SLOTS) & 1)
            values = [raw.index(slot * THIRD + piece).load(layout) for piece in (0, 1, 2)]
            for piece in gl.static_range(THIRD):
                bits = values[piece].to(gl.uint8, bitcast=True)
                wide = gl.inline_asm_elementwise(WIDEN, "=r,=r,r", [bits], gl.bfloat16, is_pure=True, pack=4)
                ring.index(page % 2 * PIECES + third * THIRD + piece).store(wide)
            fence_async_shared()
            meet()
            mbarrier.arrive(taken.index(slot), count=1)
        mbarrier.arrive(full.index(page % TURNS), count=1)


@gluon.jit(do_not_specialize=["sequences"])
def _decode(
    cache, latent_ptr, rope_ptr, table_ptr, context_ptr, part_ptr, lse_ptr, ends_ptr, out_ptr,
    stride_qs, stride_qq, stride_qh, stride_rs, stride_rq, stride_rh, stride_table,
    sequences, rows, heads, scale,
    ROWS: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr, WIDEN_REGISTERS: gl.constexpr,
    LEAST: gl.constexpr, MANY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: its share of all pages."""
    dtype: gl.constexpr = latent_ptr.dtype.element_ty
    pieces_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, 64], dtype)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], dtype)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, ROWS], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(dtype, [RING, PAGE, 64], pieces_layout)
    raw = gl.allocate_shared_memory(cache.dtype, [SLOTS * THIRD, PAGE, 64], cache.layout)
    queries = gl.allocate_shared_memory(dtype, [PIECES, ROWS, 64], rows_layout)
    weights = gl.allocate_shared_memory(dtype, [AHEAD, PAGE, ROWS], weights_layout)
    alphas = gl.allocate_shared_memory(gl.float32, [AHEAD, ROWS], plain)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], plain)
    ending, raw_bars = new_bars(2, 1), (new_bars(SLOTS, 1), new_bars(SLOTS, 1))
    bars = (new_bars(TURNS, 1), new_bars(TURNS, 1), new_bars(TURNS, 1), (ending.index(0), ending.index(1)))
    woken = wake(cache, raw.index(SLOTS * THIRD - 1))
    wait(PDL)
    share = share_of(context_ptr, sequences, gl.program_id(0), gl.num_programs(0), LEAST, MANY)
    gl.warp_specialize([
        (score, (
            latent_ptr, rope_ptr, context_ptr, lse_ptr, ends_ptr, (stride_qs, stride_qq, stride_qh),
            (stride_rs, stride_rq, stride_rh), sequences, rows, heads, scale * LOG2E, ring, queries, weights,
            alphas, factors, bars, share, ROWS, RING, False,
        )),
        (sum_values, (
            context_ptr, part_ptr, out_ptr, rows, ring, weights, alphas, factors, bars, share, ROWS, RING,
        )),
        (_widen, (raw, ring, raw_bars, bars, share[2], SLOTS)),
        (_produce, (cache, table_ptr, context_ptr, stride_table, raw, raw_bars, woken, share, SLOTS)),
    ], [4, 4, 1], [REGISTERS, WIDEN_REGISTERS, 24])  # fmt: skip


def mla_decode(q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, *, scale):
    """See `benthic.kernels.ops.mla_decode`; launches follow from shapes, so a CUDA graph can hold them."""
    operands = q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S
    return launch(_decode, (pieces_of(cache_PBW, 64),), FORMS, ENTRY_REGISTERS, *operands, scale)
