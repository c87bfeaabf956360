# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The gradients of keys and values for Hopper in Gluon; `gluon_attention_backward` describes the loop."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_key_gradients import _clear_queries, _produce_queries, _unknown, _widened
from benthic.kernels.gluon_tiles import LOG2E, clear_after, load, meet, new_bars, nothing, place, product, store


@gluon.jit
def _walk(
    dk_1, dk_2, dv, ds, first, last, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
    visible, kept, blocks, group,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, SCORES: gl.constexpr, LEFT: gl.constexpr,
    BESIDE: gl.constexpr,
):  # fmt: skip
    """Meet blocks `first .. last` of a head's queries, `met` blocks of other heads having been met."""
    PARTS: gl.constexpr = 2 if D_2 > 0 else 1
    queries_1, queries_2, douts = rings
    lses, deltas, ordinals = terms
    query_full, query_empty, dout_full, dout_empty = bars
    for block in range(first, last):
        i = met + block
        stage, phase, before = i % STAGES, (i // STAGES) & 1, gl.maximum(i - 1, 0) % STAGES
        if MASKED and (block == blocks - 1) & (kept < BLOCK_M):
            mbarrier.wait(dout_full.index(stage), phase)
            _clear_queries(rings, stage, kept, BLOCK_M, D_1, D_2, V)
        place = _unknown(group)
        s_coming = product(
            (keys_1.index(place), keys_2.index(place)),
            (queries_1.index(stage), queries_2.index(stage)),
            zero,
            D_2,
        )
        dk_1_coming = warpgroup_mma(ds, queries_1.index(before), dk_1, is_async=True)
        dk_2_coming = dk_1_coming
        if D_2 > 0:
            dk_2_coming = warpgroup_mma(ds, queries_2.index(before), dk_2, is_async=True)
        if BESIDE:
            s = warpgroup_mma_wait(PARTS, deps=[s_coming])
        elif D_2 > 0:
            s, dk_1, dk_2 = warpgroup_mma_wait(0, deps=[s_coming, dk_1_coming, dk_2_coming])
        else:
            s, dk_1 = warpgroup_mma_wait(0, deps=[s_coming, dk_1_coming])
            dk_2 = dk_1
        if MASKED and CAUSAL:
            query = block * BLOCK_M + ordinals.load(gl.SliceLayout(0, SCORES))
            key = visible + ordinals.load(gl.SliceLayout(1, SCORES))
            s = gl.where(query[None, :] >= key[:, None], s, float("-inf"))
        lse = lses.index(stage).load(gl.SliceLayout(0, SCORES))
        p = gl.convert_layout(gl.exp2(s * scale - lse[None, :]).to(ds.dtype), LEFT)
        # Between the powers and the wait for the product, or the assembler puts the wait first.
        mbarrier.wait(dout_full.index(stage), phase)
        if BESIDE:
            if D_2 > 0:
                dk_1, dk_2, p = warpgroup_mma_wait(0, deps=[dk_1_coming, dk_2_coming, p])
            else:
                dk_1, p = warpgroup_mma_wait(0, deps=[dk_1_coming, p])
                dk_2 = dk_1
        mbarrier.arrive(query_empty.index(before), count=1, pred=i > 0)
        dp_coming = warpgroup_mma(
            values.index(place), douts.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        dv = warpgroup_mma(p, douts.index(stage), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_coming])
        delta = deltas.index(stage).load(gl.SliceLayout(0, SCORES))
        ds_32 = gl.convert_layout(_widened(p), SCORES) * (dp - delta[None, :])
        mbarrier.wait(query_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        dv, ds_32 = warpgroup_mma_wait(0, deps=[dv, ds_32])
        mbarrier.arrive(dout_empty.index(stage), count=1)
        ds = gl.convert_layout(ds_32.to(ds.dtype), LEFT)
    return dk_1, dk_2, dv, ds


@gluon.jit
def _consume_queries(
    group, keys_1, keys_2, values, rings, terms, bars, key_bars, dk_ptr, dv_ptr, start_k, rows, scale,
    visible, kept, blocks,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """The gradients of the 64 keys of a group and of their values, from `blocks` of queries a head.

    The last of a head's has `kept` queries. The first query that sees the tile's first key is its `visible`.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_1, 16])
    OUT_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_2 if D_2 > 0 else D_1, 16])
    OUT_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_1, k_width=2)
    queries_1, queries_2, douts = rings
    lses, deltas, ordinals = terms
    query_full, query_empty, dout_full, dout_empty = bars
    dk_1 = gl.zeros([64, D_1], gl.float32, layout=OUT_1)
    dk_2 = dk_1
    if D_2 > 0:
        dk_2 = gl.zeros([64, D_2], gl.float32, layout=OUT_2)
    dv = gl.zeros([64, V], gl.float32, layout=OUT_V)
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=SCORES)
    ds = gl.zeros([64, BLOCK_M], dk_ptr.dtype.element_ty, layout=LEFT)
    mbarrier.wait(key_bars.index(group), 0)
    mbarrier.wait(query_full.index(0), 0)
    visible += group * 64
    total = blocks * GROUPS
    masked = 0
    if CAUSAL:
        masked = gl.minimum(gl.maximum(visible + 63 + BLOCK_M - 1, 0) // BLOCK_M, blocks)
    whole = gl.maximum(blocks - (kept < BLOCK_M).to(gl.int32), masked)
    for member in range(GROUPS):
        met = member * blocks
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, 0, masked, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, True, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, masked, whole, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, False, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, whole, blocks, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, True, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
    key_head, tile, _sequence = place(KEY_HEADS, TOGETHER)
    last, scale = (total - 1) % STAGES, scale / LOG2E
    column = tile * BLOCK_N + group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    dk_1 = warpgroup_mma(ds, queries_1.index(last), dk_1, is_async=True)
    if D_2 > 0:
        dk_2 = warpgroup_mma(ds, queries_2.index(last), dk_2, is_async=True)
        dk_1, dk_2 = warpgroup_mma_wait(0, deps=[dk_1, dk_2])
        store(dk_ptr, dk_2, start_k, column, rows, key_head, D_1, scale, KEY_HEADS, D_1 + D_2, D_2, OUT_2)
    else:
        dk_1 = warpgroup_mma_wait(0, deps=[dk_1])
    store(dk_ptr, dk_1, start_k, column, rows, key_head, 0, scale, KEY_HEADS, D_1 + D_2, D_1, OUT_1)
    store(dv_ptr, dv, start_k, column, rows, key_head, 0, 1.0, KEY_HEADS, V, V, OUT_V)


@gluon.jit(do_not_specialize=["tokens"])
def key_gradients_split(
    q_1, q_2, dout, k_1, k_2, v, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, BESIDE: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of one key head and sequence."""
    key_head, tile, sequence = place(KEY_HEADS, TOGETHER)
    start_q, start_k = gl.load(starts_q_ptr + sequence), gl.load(starts_k_ptr + sequence)
    queries = gl.load(starts_q_ptr + sequence + 1) - start_q
    rows = gl.load(starts_k_ptr + sequence + 1) - start_k
    first_query = 0
    visible = tile * BLOCK_N - (rows - queries)
    if CAUSAL:  # queries before see none of these keys
        first_query = gl.maximum(visible, 0)
    blocks = gl.maximum(queries - first_query + BLOCK_M - 1, 0) // BLOCK_M
    if tile * BLOCK_N < rows:
        if blocks > 0:
            keys_1 = gl.allocate_shared_memory(k_1.dtype, [2, 64, D_1], k_1.layout)
            values = gl.allocate_shared_memory(v.dtype, [2, 64, V], v.layout)
            queries_1 = gl.allocate_shared_memory(q_1.dtype, [STAGES, BLOCK_M, D_1], q_1.layout)
            douts = gl.allocate_shared_memory(dout.dtype, [STAGES, BLOCK_M, V], dout.layout)
            keys_2, queries_2 = keys_1, queries_1
            if D_2 > 0:
                keys_2 = gl.allocate_shared_memory(k_2.dtype, [2, 64, D_2], k_2.layout)
                queries_2 = gl.allocate_shared_memory(q_2.dtype, [STAGES, BLOCK_M, D_2], q_2.layout)
            plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], plain)
            deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], plain)
            ordinals = gl.allocate_shared_memory(gl.int32, [BLOCK_M], plain)
            ordinals.store(gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0])))
            key_bars = new_bars(2, 1)
            bars = (new_bars(STAGES, 2), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
            fence_async_shared()
            rings, terms = (queries_1, queries_2, douts), (lses, deltas, ordinals)
            columns = (q_stride, dout_stride, k_stride, v_stride)
            gl.warp_specialize([
                (_consume_queries, (
                    0, keys_1, keys_2, values, rings, terms, bars, key_bars,
                    dk_ptr, dv_ptr, start_k, rows, scale * LOG2E, visible - first_query,
                    queries - first_query - (blocks - 1) * BLOCK_M, blocks,
                    KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, BESIDE,
                )),
                (_consume_queries, (
                    1, keys_1, keys_2, values, rings, terms, bars, key_bars,
                    dk_ptr, dv_ptr, start_k, rows, scale * LOG2E, visible - first_query,
                    queries - first_query - (blocks - 1) * BLOCK_M, blocks,
                    KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, BESIDE,
                )),
                (_produce_queries, (
                    (q_1, q_2, dout, k_1, k_2, v), keys_1, keys_2, values, rings, terms, bars, key_bars,
                    lse_ptr, delta_ptr, start_k + tile * BLOCK_N, start_q, first_query, queries, blocks,
                    key_head, columns, tokens, GROUPS, D_1, D_2, BLOCK_M, STAGES,
                )),
            ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
        else:
            nothing(dk_ptr, start_k, rows, tile, key_head, KEY_HEADS, D_1 + D_2, BLOCK_N)
            nothing(dv_ptr, start_k, rows, tile, key_head, KEY_HEADS, V, BLOCK_N)
