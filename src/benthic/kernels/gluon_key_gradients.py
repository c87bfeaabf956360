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

from benthic.kernels.gluon_tiles import (
    LOG2E,
    among_columns,
    bounds_of,
    clear_after,
    load,
    meet,
    new_bars,
    nothing,
    place,
    product,
    store,
)
from benthic.kernels.relaunch import remembered


@gluon.jit
def _widened(p):
    """Float32 of weights in 16 bits, from the pairs in which a product reads them.

    Written for each weight, the compiler would keep 32 registers of them beside the 16 of pairs.
    """
    WIDEN: gl.constexpr = (
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        if p.dtype == gl.bfloat16
        else "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
    )
    OUTPUTS: gl.constexpr = "=r,=r,r" if p.dtype == gl.bfloat16 else "=f,=f,r"
    return gl.inline_asm_elementwise(WIDEN, OUTPUTS, [p], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _unknown(x):
    """`x`, of which the compiler knows nothing, so that it keeps no addresses that follow from it."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _clear_queries(rings, stage, kept, BLOCK_M: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr,
                   V: gl.constexpr):  # fmt: skip
    """Zero what a block of queries and of their output's gradients holds of the next sequence."""
    queries_1, queries_2, douts = rings
    clear_after(queries_1.index(stage), kept, BLOCK_M, D_1)
    if D_2 > 0:
        clear_after(queries_2.index(stage), kept, BLOCK_M, D_2)
    clear_after(douts.index(stage), kept, BLOCK_M, V)
    fence_async_shared()
    meet()


@gluon.jit
def _walk_queries(
    dk_1, dk_2, dv, ds, first, last, met, blocks, total, group, keys, values, rings, terms, bars, zero,
    scale, visible, kept,
    D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, SOME: gl.constexpr, SCORES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Meet a head's blocks of queries `first .. last`, of which it has `blocks`, after `met` of other heads.

    MASKED: the diagonal may cut them; SOME: it need not.
    """
    keys_1, keys_2 = keys
    queries_1, queries_2, douts = rings
    lses, deltas = terms
    query_full, query_empty, dout_full, dout_empty = bars
    for block in range(first, last):
        i = met + block
        stage, phase, before = i % STAGES, (i // STAGES) & 1, gl.maximum(i - 1, 0) % STAGES
        if (block == blocks - 1) & (kept < BLOCK_M):
            mbarrier.wait(dout_full.index(stage), phase)
            _clear_queries(rings, stage, kept, BLOCK_M, D_1, D_2, V)
        mine = _unknown(group)
        s_coming = product(
            (keys_1.index(mine), keys_2.index(mine)),
            (queries_1.index(stage), queries_2.index(stage)),
            zero,
            D_2,
        )
        dk_coming = warpgroup_mma(ds, queries_1.index(before), dk_1, is_async=True)
        if D_2 > 0:
            dk_2 = warpgroup_mma(ds, queries_2.index(before), dk_2, is_async=True)
            s, dk_1, dk_2 = warpgroup_mma_wait(0, deps=[s_coming, dk_coming, dk_2])
            mbarrier.arrive(query_empty.index(before), count=1, pred=i > 0)
        else:
            s = warpgroup_mma_wait(1, deps=[s_coming])
        # The first query that sees all 64 keys is `visible + 63`.
        if MASKED and (not SOME or block * BLOCK_M < visible + 63):
            first_seen = visible - block * BLOCK_M + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
            s = among_columns(s, first_seen, float("-inf"), SCORES, True)
        lse = lses.index(stage).load(gl.SliceLayout(0, SCORES))
        p = gl.convert_layout(gl.exp2(s * scale - lse[None, :]).to(ds.dtype), LEFT)
        mbarrier.wait(dout_full.index(stage), phase)
        dp_coming = warpgroup_mma(
            values.index(mine), douts.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        dv = warpgroup_mma(p, douts.index(stage), dv, is_async=True)
        if D_2 > 0:
            dp = warpgroup_mma_wait(1, deps=[dp_coming])
        else:
            dp, dk_1 = warpgroup_mma_wait(1, deps=[dp_coming, dk_coming])
            dk_2 = dk_1
            mbarrier.arrive(query_empty.index(before), count=1, pred=i > 0)
        delta = deltas.index(stage).load(gl.SliceLayout(0, SCORES))
        ds_32 = gl.convert_layout(_widened(p), SCORES) * (dp - delta[None, :])
        mbarrier.wait(query_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        dv, ds_32 = warpgroup_mma_wait(0, deps=[dv, ds_32])
        mbarrier.arrive(dout_empty.index(stage), count=1)
        ds = gl.convert_layout(ds_32.to(ds.dtype), LEFT)
    return dk_1, dk_2, dv, ds


@gluon.jit
def _consume_queries(
    group, keys_1, keys_2, values, rings, terms, bars, key_bars, dk_ptr, dv_ptr, tiles_ptr,
    start_k, rows, scale, visible, kept, blocks,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """The gradients of the 64 keys of a group and of their values, from `blocks` of queries a head.

    The last of a head's has `kept` queries. The first query that sees the tile's first key is its `visible`.
    """
    DIMS: gl.constexpr = D_1 + D_2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_1, 16])
    OUT_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_2 if D_2 > 0 else D_1, 16])
    OUT_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_1, k_width=2)
    queries_1, queries_2, _douts = rings
    keys = keys_1, keys_2
    query_full = bars[0]
    dk_1 = gl.zeros([64, D_1], gl.float32, layout=OUT_1)
    dk_2 = dk_1
    if D_2 > 0:
        dk_2 = gl.zeros([64, D_2], gl.float32, layout=OUT_2)
    dv = gl.zeros([64, V], gl.float32, layout=OUT_V)
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=SCORES)
    ds = gl.zeros([64, BLOCK_M], dk_ptr.dtype.element_ty, layout=LEFT)
    mbarrier.wait(key_bars.index(group), 0)
    mbarrier.wait(query_full.index(0), 0)
    total = blocks * GROUPS
    # Where registers allow, what the diagonal cuts has a loop of its own: a branch would end products.
    SPLIT: gl.constexpr = D_2 == 0 and CAUSAL
    visible += group * 64
    cut = gl.minimum(gl.maximum(visible + 63 + BLOCK_M - 1, 0) // BLOCK_M, blocks) if SPLIT else 0
    for member in range(GROUPS):
        met = member * blocks
        if SPLIT:
            dk_1, dk_2, dv, ds = _walk_queries(
                dk_1, dk_2, dv, ds, 0, cut, met, blocks, total, group, keys, values, rings, terms, bars, zero,
                scale, visible, kept, D_1, D_2, V, BLOCK_M, STAGES, True, False, SCORES, LEFT,
            )  # fmt: skip
        dk_1, dk_2, dv, ds = _walk_queries(
            dk_1, dk_2, dv, ds, cut, blocks, met, blocks, total, group, keys, values, rings, terms, bars,
            zero, scale, visible, kept, D_1, D_2, V, BLOCK_M, STAGES, CAUSAL and not SPLIT, True, SCORES,
            LEFT,
        )  # fmt: skip
    key_head, tile, _sequence = place(tiles_ptr, KEY_HEADS, TOGETHER, LISTED)
    last, scale = (total - 1) % STAGES, scale / LOG2E
    column = tile * BLOCK_N + group * 64
    dk_1 = warpgroup_mma(ds, queries_1.index(last), dk_1, is_async=True)
    if D_2 > 0:
        dk_2 = warpgroup_mma(ds, queries_2.index(last), dk_2, is_async=True)
        dk_1, dk_2 = warpgroup_mma_wait(0, deps=[dk_1, dk_2])
        store(dk_ptr, dk_2, keys_2.index(group), start_k, column, rows, key_head, D_1, scale, KEY_HEADS, DIMS)
    else:
        dk_1 = warpgroup_mma_wait(0, deps=[dk_1])
    store(dk_ptr, dk_1, keys_1.index(group), start_k, column, rows, key_head, 0, scale, KEY_HEADS, DIMS)
    store(dv_ptr, dv, values.index(group), start_k, column, rows, key_head, 0, 1.0, KEY_HEADS, V)


@gluon.jit
def _produce_queries(
    descriptors, keys_1, keys_2, values, rings, terms, bars, key_bars, lse_ptr, delta_ptr,
    first_key, start_q, first_query, queries, blocks, key_head, columns, tokens,
    GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of both groups, then blocks of queries of each head as places come free."""
    q_1, q_2, dout, k_1, k_2, v = descriptors
    queries_1, queries_2, douts = rings
    lses, deltas = terms
    query_full, query_empty, dout_full, dout_empty = bars
    q_stride, dout_stride, k_stride, v_stride = columns
    for group in gl.static_range(2):
        bar, at = key_bars.index(group), first_key + 64 * group
        mbarrier.expect(
            bar, k_1.block_type.nbytes + v.block_type.nbytes + (k_2.block_type.nbytes if D_2 > 0 else 0)
        )
        load(k_1, [at, key_head * k_stride], bar, keys_1.index(group))
        if D_2 > 0:
            load(k_2, [at, key_head * k_stride + D_1], bar, keys_2.index(group))
        load(v, [at, key_head * v_stride], bar, values.index(group))
    term = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([2], [32], [1], [0]))
    met = 0
    for member in range(GROUPS):
        head = key_head * GROUPS + member
        for i in range(blocks):
            stage, phase, row = met % STAGES, (met // STAGES) & 1, first_query + i * BLOCK_M
            mbarrier.wait(query_empty.index(stage), phase ^ 1)
            bar = query_full.index(stage)
            mbarrier.expect(bar, q_1.block_type.nbytes + (q_2.block_type.nbytes if D_2 > 0 else 0))
            load(q_1, [start_q + row, head * q_stride], bar, queries_1.index(stage))
            if D_2 > 0:
                load(q_2, [start_q + row, head * q_stride + D_1], bar, queries_2.index(stage))
            mbarrier.wait(dout_empty.index(stage), phase ^ 1)
            mbarrier.expect(dout_full.index(stage), dout.block_type.nbytes)
            load(dout, [start_q + row, head * dout_stride], dout_full.index(stage), douts.index(stage))
            # Queries past the end have a sum of +inf, so their weights are 2^-inf = 0.
            kept = row + term < queries
            per_row = head.to(gl.int64) * tokens + start_q + row + term
            lse = gl.load(lse_ptr + per_row, mask=kept, other=float("inf")) * LOG2E
            lses.index(stage).store(lse)
            deltas.index(stage).store(gl.load(delta_ptr + per_row, mask=kept, other=0.0))
            mbarrier.arrive(bar, count=1)
            met += 1


@remembered
@gluon.jit(do_not_specialize=["tokens"])
def key_gradients(
    q_1, q_2, dout, k_1, k_2, v, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, tiles_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, LISTED: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of one key head and sequence."""
    key_head, tile, sequence = place(tiles_ptr, KEY_HEADS, TOGETHER, LISTED)
    start_q, end_q = bounds_of(starts_q_ptr, sequence, LISTED)
    start_k, end_k = bounds_of(starts_k_ptr, sequence, LISTED)
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
    key_bars = new_bars(2, 1)
    bars = (new_bars(STAGES, 2), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    rings, terms = (queries_1, queries_2, douts), (lses, deltas)
    queries, rows = end_q - start_q, end_k - start_k
    first_query = 0
    visible = tile * BLOCK_N - (rows - queries)
    if CAUSAL:  # queries before see none of these keys
        first_query = gl.maximum(visible, 0)
    blocks = gl.maximum(queries - first_query + BLOCK_M - 1, 0) // BLOCK_M
    if (tile * BLOCK_N < rows) & (blocks > 0):
        columns = (q_stride, dout_stride, k_stride, v_stride)
        gl.warp_specialize([
            (_consume_queries, (
                0, keys_1, keys_2, values, rings, terms, bars, key_bars,
                dk_ptr, dv_ptr, tiles_ptr if LISTED else 0, start_k, rows, scale * LOG2E,
                visible - first_query, queries - first_query - (blocks - 1) * BLOCK_M, blocks,
                KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, LISTED,
            )),
            (_consume_queries, (
                1, keys_1, keys_2, values, rings, terms, bars, key_bars,
                dk_ptr, dv_ptr, tiles_ptr if LISTED else 0, start_k, rows, scale * LOG2E,
                visible - first_query, queries - first_query - (blocks - 1) * BLOCK_M, blocks,
                KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, LISTED,
            )),
            (_produce_queries, (
                (q_1, q_2, dout, k_1, k_2, v), keys_1, keys_2, values, rings, terms, bars, key_bars,
                lse_ptr, delta_ptr, start_k + tile * BLOCK_N, start_q, first_query, queries, blocks,
                key_head, columns, tokens, GROUPS, D_1, D_2, BLOCK_M, STAGES,
            )),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    elif tile * BLOCK_N < rows:
        nothing(dk_ptr, start_k, rows, tile, key_head, KEY_HEADS, D_1 + D_2, BLOCK_N)
        nothing(dv_ptr, start_k, rows, tile, key_head, KEY_HEADS, V, BLOCK_N)
