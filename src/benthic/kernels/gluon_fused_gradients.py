# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""All gradients of attention in one pass for Hopper in Gluon: five products a block, sums of dQ by atomics.

A program holds 128 keys of one head, 64 a group of warps, and walks over blocks of 64 queries, as in
`gluon_key_gradients`. What a group starts before it waits (the dims of dQ are divided over both groups):

    S_i^T = K Q_i^T,  dK += dS_(i-1)^T Q_(i-1)
    dP_i^T = V dO_i^T                                 then  P_i^T = 2^(S_i^T - lse)
    dV += P_i^T dO_i,  dQ_(i-1) = dS_(i-1) K          then  dS_i^T = P_i^T (dP_i^T - delta)

dS goes through shared memory, because dQ wants all 128 keys. Sums of dQ are float32, in the order in which a
thread holds them, so that 32 lanes add 512 bytes in a row; `finish` puts them in their places. The order in
which tiles of keys add is not fixed: dQ may differ in its last bits from call to call.
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

from benthic.kernels.gluon_key_gradients import _unknown, _widened
from benthic.kernels.gluon_tiles import LOG2E, clear_after, load, meet, new_bars, nothing, place, store

HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""64 queries by 64 dims of dQ, and 64 keys by 64 queries of scores."""


@gluon.jit
def _in_order_of_threads():
    """Where a sum of 64 by 64 lies: four of a thread side by side, then its warp's others, then its next four."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, HALF))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, HALF))[None, :]
    lane = row % 8 * 4 + column % 8 // 2
    return column // 8 * 512 + row // 16 * 128 + lane * 4 + row // 8 % 2 * 2 + column % 2


@gluon.jit
def _add(at, sums):
    """Add 64 by 64 sums to memory from `at` on, four of a thread at once."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$8], {$4, $5, $6, $7};"
        " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,f,f,f,f,l,l,l,l",
        [sums, (at + _in_order_of_threads()).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _partial(keys, weights, buffer, GROUP: gl.constexpr, zero):
    """Start a group's 64 dims of dQ from the gradients of scores of both groups."""
    dq = warpgroup_mma(
        weights.index(2 * buffer).permute((1, 0)), keys.index(0).slice(64 * GROUP, 64, dim=1), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    return warpgroup_mma(
        weights.index(2 * buffer + 1).permute((1, 0)), keys.index(1).slice(64 * GROUP, 64, dim=1), dq,
        is_async=True,
    )  # fmt: skip


@gluon.jit
def _walk(
    dk, dv, ds, at, coming, first, last, met, total, keys, values, rings, terms, weights, bars,
    zero, scale, visible, kept, blocks, step,
    SUMS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, STAGES_O: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Meet blocks `first .. last` of a head's queries, `met` blocks of other heads having been met.

    `at` is where sums of the block before lie, and with several heads `coming` where those of the next do. Without `CAUSAL`, `visible` is the number of the keys.
    """
    queries, douts = rings
    lses, deltas, ordinals = terms
    query_full, query_empty, dout_full, dout_empty, ds_full = bars
    for block in range(first, last):
        i = met + block
        stage, before, stage_o, phase_o = i % STAGES, gl.maximum(i - 1, 0) % STAGES, i % STAGES_O, (i // STAGES_O) & 1
        if MASKED and (block == blocks - 1) & (kept < BLOCK_M):
            mbarrier.wait(dout_full.index(stage_o), phase_o)
            clear_after(queries.index(stage), kept, BLOCK_M, D)
            clear_after(douts.index(stage_o), kept, BLOCK_M, V)
            fence_async_shared()
            meet()
        mine = _unknown(gl.to_tensor(GROUP))
        s_coming = warpgroup_mma(
            keys.index(mine), queries.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        dk_coming = warpgroup_mma(ds, queries.index(before), dk, is_async=True)
        s, dk = warpgroup_mma_wait(0, deps=[s_coming, dk_coming])
        mbarrier.arrive(query_empty.index(before), count=1, pred=i > 0)
        if MASKED:
            key = ordinals.load(gl.SliceLayout(1, HALF))
            if CAUSAL:
                query = block * BLOCK_M + ordinals.load(gl.SliceLayout(0, HALF))
                s = gl.where(query[None, :] >= (visible + key)[:, None], s, float("-inf"))
            else:
                s = gl.where((key < visible)[:, None], s, float("-inf"))
        lse = lses.index(stage).load(gl.SliceLayout(0, HALF))
        mbarrier.wait(dout_full.index(stage_o), phase_o)
        dp_coming = warpgroup_mma(
            values.index(mine), douts.index(stage_o).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        p = gl.convert_layout(gl.exp2(s * scale - lse[None, :]).to(ds.dtype), ds.type.layout)
        dv_coming = warpgroup_mma(p, douts.index(stage_o), dv, is_async=True)
        if SUMS:
            mbarrier.wait(ds_full.index((i + 2) % 3), ((i + 2) // 3 & 1) ^ 1, pred=i > 0)
            dq_coming = _partial(keys, weights, (i + 2) % 3, GROUP, zero)
            dp = warpgroup_mma_wait(3, deps=[dp_coming])
        else:
            dp = warpgroup_mma_wait(1, deps=[dp_coming])
        delta = deltas.index(stage).load(gl.SliceLayout(0, HALF))
        ds_16 = (gl.convert_layout(_widened(p), HALF) * (dp - delta[None, :])).to(ds.dtype)
        if SUMS:
            weights.index(i % 3 * 2 + GROUP).store(ds_16)
            fence_async_shared()
            meet()
            mbarrier.arrive(ds_full.index(i % 3), count=1)
        mbarrier.wait(query_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        if SUMS:
            dv, dq, ds_16 = warpgroup_mma_wait(0, deps=[dv_coming, dq_coming, ds_16])
            _add(at, dq)
        else:
            dv, ds_16 = warpgroup_mma_wait(0, deps=[dv_coming, ds_16])
        mbarrier.arrive(dout_empty.index(stage_o), count=1)
        ds = gl.convert_layout(ds_16, ds.type.layout)
        if GROUPS == 1:
            at += step
        else:
            at = coming
            coming += step
    return dk, dv, ds, at, coming


@gluon.jit
def _consume(
    GROUP: gl.constexpr, keys, values, rings, terms, weights, bars, key_bars, dk_ptr, dv_ptr, sum_ptr,
    start_k, rows, scale, visible, kept, blocks, first_block,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
    CAUSAL: gl.constexpr, TOGETHER: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The gradients of the 64 keys of a group and of their values, and half the dims of dQ."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    queries = rings[0]
    query_full, ds_full = bars[0], bars[4]
    key_head, tile, _sequence = place(KEY_HEADS, TOGETHER)
    dk = gl.zeros([64, D], gl.float32, layout=OUT)
    dv = gl.zeros([64, V], gl.float32, layout=OUT)
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=HALF)
    ds = gl.zeros([64, BLOCK_M], dk_ptr.dtype.element_ty, layout=LEFT)
    mbarrier.wait(key_bars.index(GROUP), 0)
    left = rows - tile * BLOCK_N - GROUP * 64
    if left < 64:
        clear_after(keys.index(GROUP), left, 64, D)
        clear_after(values.index(GROUP), left, 64, V)
        fence_async_shared()
        meet()
    mbarrier.wait(key_bars.index(1 - GROUP), 0)
    mbarrier.wait(query_full.index(0), 0)
    if CAUSAL:
        bound = visible + GROUP * 64
        masked = gl.minimum(gl.maximum(bound + 63 + BLOCK_M - 1, 0) // BLOCK_M, blocks)
    else:
        bound = left
        masked = gl.where(left < 64, blocks, 0)
    whole = gl.maximum(blocks - (kept < BLOCK_M).to(gl.int32), masked)
    total = blocks * GROUPS
    step = KEY_HEADS * GROUPS * BLOCK_M * D
    at, coming = sum_ptr, sum_ptr  # a place that nobody reads
    for member in range(GROUPS):
        met, head = member * blocks, key_head * GROUPS + member
        coming = sum_ptr + (first_block.to(gl.int64) * (KEY_HEADS * GROUPS) + head) * (BLOCK_M * D) + GROUP * 64 * 64
        if GROUPS == 1:
            at = coming - step  # the first block adds zeros to what lies before
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, 0, masked, met, total, keys, values, rings, terms, weights, bars,
            zero, scale, bound, kept, blocks, step,
            SUMS, GROUP, GROUPS, True, CAUSAL, BLOCK_M, STAGES, STAGES_O, D, V,
        )  # fmt: skip
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, masked, whole, met, total, keys, values, rings, terms, weights, bars,
            zero, scale, bound, kept, blocks, step,
            SUMS, GROUP, GROUPS, False, CAUSAL, BLOCK_M, STAGES, STAGES_O, D, V,
        )  # fmt: skip
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, whole, blocks, met, total, keys, values, rings, terms, weights, bars,
            zero, scale, bound, kept, blocks, step,
            SUMS, GROUP, GROUPS, True, CAUSAL, BLOCK_M, STAGES, STAGES_O, D, V,
        )  # fmt: skip
    last, buffer = (total - 1) % STAGES, (total - 1) % 3
    dk = warpgroup_mma(ds, queries.index(last), dk, is_async=True)
    if SUMS:
        mbarrier.wait(ds_full.index(buffer), ((total - 1) // 3) & 1)
        dq = _partial(keys, weights, buffer, GROUP, zero)
        dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
        _add(at, dq)
    else:
        dk = warpgroup_mma_wait(0, deps=[dk])
    column = tile * BLOCK_N + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, HALF))
    store(dk_ptr, dk, start_k, column, rows, key_head, 0, scale / LOG2E, KEY_HEADS, D, D, OUT)
    store(dv_ptr, dv, start_k, column, rows, key_head, 0, 1.0, KEY_HEADS, V, V, OUT)


@gluon.jit
def _produce(
    descriptors, keys, values, rings, terms, bars, key_bars, lse_ptr, delta_ptr,
    first_key, start_q, first_query, queries_left, blocks, key_head, columns, tokens,
    GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of both groups, then blocks of queries of each head as places come free."""
    q, dout, k, v = descriptors
    queries, douts = rings
    lses, deltas, _ordinals = terms
    query_full, query_empty, dout_full, dout_empty, _ds_full = bars
    q_stride, dout_stride, k_stride, v_stride = columns
    for group in gl.static_range(2):
        bar, at = key_bars.index(group), first_key + 64 * group
        mbarrier.expect(bar, k.block_type.nbytes + v.block_type.nbytes)
        load(k, [at, key_head * k_stride], bar, keys.index(group))
        load(v, [at, key_head * v_stride], bar, values.index(group))
    term = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([2], [32], [1], [0]))
    met = 0
    for member in range(GROUPS):
        head = key_head * GROUPS + member
        for i in range(blocks):
            stage, row, stage_o = met % STAGES, first_query + i * BLOCK_M, met % STAGES_O
            mbarrier.wait(query_empty.index(stage), ((met // STAGES) & 1) ^ 1)
            bar = query_full.index(stage)
            mbarrier.expect(bar, q.block_type.nbytes)
            load(q, [start_q + row, head * q_stride], bar, queries.index(stage))
            mbarrier.wait(dout_empty.index(stage_o), ((met // STAGES_O) & 1) ^ 1)
            mbarrier.expect(dout_full.index(stage_o), dout.block_type.nbytes)
            load(dout, [start_q + row, head * dout_stride], dout_full.index(stage_o), douts.index(stage_o))
            # Queries past the end and those that see no key have a sum of +inf: their weights are 2^-inf = 0.
            kept = row + term < queries_left
            per_row = head.to(gl.int64) * tokens + start_q + row + term
            lse = gl.load(lse_ptr + per_row, mask=kept, other=float("inf")) * LOG2E
            lses.index(stage).store(gl.where(lse == float("-inf"), float("inf"), lse))
            deltas.index(stage).store(gl.load(delta_ptr + per_row, mask=kept, other=0.0))
            mbarrier.arrive(bar, count=1)
            met += 1


@gluon.jit(do_not_specialize=["tokens"])
def fused_gradients(
    q, dout, k, v, dk_ptr, dv_ptr, sum_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
    CAUSAL: gl.constexpr, TOGETHER: gl.constexpr, SUMS: gl.constexpr, REGISTERS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of one key head, added to those of the queries they meet."""
    key_head, tile, sequence = place(KEY_HEADS, TOGETHER)
    start_q, start_k = gl.load(starts_q_ptr + sequence), gl.load(starts_k_ptr + sequence)
    queries_left = gl.load(starts_q_ptr + sequence + 1) - start_q
    rows = gl.load(starts_k_ptr + sequence + 1) - start_k
    first_query = 0
    visible = tile * BLOCK_N - (rows - queries_left)
    if CAUSAL:  # blocks before see none of these keys
        first_query = gl.maximum(visible, 0) // BLOCK_M * BLOCK_M
    blocks = gl.maximum(queries_left - first_query + BLOCK_M - 1, 0) // BLOCK_M
    first_block = 1 + start_q // BLOCK_M + 2 * sequence + first_query // BLOCK_M
    if tile * BLOCK_N < rows:
        if blocks > 0:
            keys = gl.allocate_shared_memory(k.dtype, [2, 64, D], k.layout)
            values = gl.allocate_shared_memory(v.dtype, [2, 64, V], v.layout)
            queries = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, D], q.layout)
            douts = gl.allocate_shared_memory(dout.dtype, [STAGES_O, BLOCK_M, V], dout.layout)
            squares: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], k.dtype)
            weights = gl.allocate_shared_memory(k.dtype, [6 if SUMS else 1, 64, BLOCK_M], squares)
            plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], plain)
            deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], plain)
            ordinals = gl.allocate_shared_memory(gl.int32, [BLOCK_M], plain)
            ordinals.store(gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0])))
            key_bars = new_bars(2, 1)
            bars = (
                new_bars(STAGES, 2), new_bars(STAGES, 2), new_bars(STAGES_O, 1), new_bars(STAGES_O, 2),
                new_bars(3, 2),
            )  # fmt: skip
            if SUMS:
                nothing_yet = gl.zeros([64, BLOCK_M], k.dtype, layout=gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
                for half in gl.static_range(2):  # what the first block finds of a block before
                    weights.index(4 + half).store(nothing_yet)
            fence_async_shared()
            rings, terms = (queries, douts), (lses, deltas, ordinals)
            gl.warp_specialize([
                (_consume, (
                    0, keys, values, rings, terms, weights, bars, key_bars, dk_ptr, dv_ptr, sum_ptr,
                    start_k, rows, scale * LOG2E, visible - first_query,
                    queries_left - first_query - (blocks - 1) * BLOCK_M, blocks, first_block,
                    KEY_HEADS, GROUPS, D, V, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, TOGETHER, SUMS,
                )),
                (_consume, (
                    1, keys, values, rings, terms, weights, bars, key_bars, dk_ptr, dv_ptr, sum_ptr,
                    start_k, rows, scale * LOG2E, visible - first_query,
                    queries_left - first_query - (blocks - 1) * BLOCK_M, blocks, first_block,
                    KEY_HEADS, GROUPS, D, V, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, TOGETHER, SUMS,
                )),
                (_produce, (
                    (q, dout, k, v), keys, values, rings, terms, bars, key_bars, lse_ptr, delta_ptr,
                    start_k + tile * BLOCK_N, start_q, first_query, queries_left, blocks, key_head,
                    (q_stride, dout_stride, k_stride, v_stride), tokens, GROUPS, BLOCK_M, STAGES, STAGES_O,
                )),
            ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
        else:
            nothing(dk_ptr, start_k, rows, tile, key_head, KEY_HEADS, D, BLOCK_N)
            nothing(dv_ptr, start_k, rows, tile, key_head, KEY_HEADS, V, BLOCK_N)


@gluon.jit
def finish(sum_ptr, dq_ptr, starts_q_ptr, scale, HEADS: gl.constexpr, D: gl.constexpr):
    """Put the sums of 64 queries of a head in their places, times the scale."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head, tile, sequence = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    start = gl.load(starts_q_ptr + sequence)
    rows = gl.load(starts_q_ptr + sequence + 1) - start
    row = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, OUT))
    at = sum_ptr + ((1 + start // 64 + 2 * sequence + tile).to(gl.int64) * HEADS + head) * (64 * D)
    if tile * 64 < rows:
        for first in gl.static_range(0, D, 64):
            sums = gl.inline_asm_elementwise(
                "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l,l,l,l",
                [(at + first * 64 + _in_order_of_threads()).to(gl.int64)],
                dtype=gl.float32, is_pure=False, pack=4,
            )  # fmt: skip
            value = gl.convert_layout((sums * scale).to(dq_ptr.dtype.element_ty), OUT)
            place_of = ((start + row).to(gl.int64)[:, None] * HEADS + head) * D + first + column[None, :]
            gl.store(dq_ptr + place_of, value, mask=(row < rows)[:, None])
