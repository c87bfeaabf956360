# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The gradient of queries for Hopper in Gluon; `gluon_attention_backward` describes the loop."""

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
def _walk_keys(
    dq_1, dq_2, ds, first, last, blocks, queries, dout, rings, bars, zero, lse, delta, last_seen, scale,
    D_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    SCORES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Meet blocks of keys `first .. last` from the right, each of which has its keys in the ring already."""
    PARTS: gl.constexpr = 2 if D_2 > 0 else 1
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    for i in range(first, last):
        stage, before = i % STAGES, gl.maximum(i - 1, 0) % STAGES
        s_coming = product(queries, (keys_1.index(stage), keys_2.index(stage)), zero, D_2)
        mbarrier.wait(value_full.index(stage), (i // STAGES) & 1)
        dp_coming = product((dout, dout), (values.index(stage), values.index(stage)), zero, 0)
        dq_1_coming = warpgroup_mma(ds, keys_1.index(before), dq_1, is_async=True)
        dq_2_coming = dq_1_coming
        if D_2 > 0:
            dq_2_coming = warpgroup_mma(ds, keys_2.index(before), dq_2, is_async=True)
        s = warpgroup_mma_wait(1 + PARTS, deps=[s_coming])
        p = gl.exp2(s * scale - lse[:, None])
        dp = warpgroup_mma_wait(PARTS, deps=[dp_coming])
        mbarrier.arrive(value_empty.index(stage), count=1)
        ds_32 = p * (dp - delta[:, None])
        if MASKED:
            block = (blocks - 1 - i) * BLOCK_N
            key = block + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
            ds_32 = gl.where(key[None, :] <= last_seen[:, None], ds_32, 0.0)
        # Between the powers and the wait for the product, or the assembler puts the wait first.
        mbarrier.wait(key_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
        if D_2 > 0:
            dq_1, dq_2, ds_32 = warpgroup_mma_wait(0, deps=[dq_1_coming, dq_2_coming, ds_32])
        else:
            dq_1, ds_32 = warpgroup_mma_wait(0, deps=[dq_1_coming, ds_32])
            dq_2 = dq_1
        mbarrier.arrive(key_empty.index(before), count=1, pred=i > 0)
        ds = gl.convert_layout(ds_32.to(ds.dtype), LEFT)
    return dq_1, dq_2, ds


@gluon.jit
def _consume_keys(
    group, queries, douts, rings, bars, query_bars, dq_ptr, lse_ptr, delta_ptr,
    start_q, rows, keys, tile, head, tokens, scale, offset, blocks, first_masked,
    HEADS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The gradient of the 64 queries of a group."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_1, 16])
    OUT_2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_2 if D_2 > 0 else D_1, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_1, k_width=2)
    keys_1, keys_2, _values = rings
    key_full = bars[0]
    first_row = tile * BLOCK_M + group * 64
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    last_seen = gl.minimum(row + offset, keys - 1) if CAUSAL else row * 0 + (keys - 1)
    per_row = head.to(gl.int64) * tokens + start_q + row
    lse = gl.load(lse_ptr + per_row, mask=row < rows, other=float("inf")) * LOG2E
    lse = gl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees no key has no gradient
    delta = gl.load(delta_ptr + per_row, mask=row < rows, other=0.0)
    dq_1 = gl.zeros([64, D_1], gl.float32, layout=OUT_1)
    dq_2 = dq_1
    if D_2 > 0:
        dq_2 = gl.zeros([64, D_2], gl.float32, layout=OUT_2)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    ds = gl.zeros([64, BLOCK_N], dq_ptr.dtype.element_ty, layout=LEFT)
    mbarrier.wait(query_bars.index(group), 0)
    mbarrier.wait(key_full.index(0), 0)
    kept = keys - (blocks - 1) * BLOCK_N
    if kept < BLOCK_N:
        clear_after(keys_1.index(0), kept, BLOCK_N, D_1)
        if D_2 > 0:
            clear_after(keys_2.index(0), kept, BLOCK_N, D_2)
        fence_async_shared()
        meet()
    masked = gl.maximum(blocks - first_masked, 0)
    dq_1, dq_2, ds = _walk_keys(
        dq_1, dq_2, ds, 0, masked, blocks, queries, douts, rings, bars, zero, lse, delta, last_seen,
        scale * LOG2E, D_2, BLOCK_N, STAGES, True, SCORES, LEFT,
    )  # fmt: skip
    dq_1, dq_2, ds = _walk_keys(
        dq_1, dq_2, ds, masked, blocks, blocks, queries, douts, rings, bars, zero, lse, delta, last_seen,
        scale * LOG2E, D_2, BLOCK_N, STAGES, False, SCORES, LEFT,
    )  # fmt: skip
    last = (blocks - 1) % STAGES
    dq_1 = warpgroup_mma(ds, keys_1.index(last), dq_1, is_async=True)
    if D_2 > 0:
        dq_2 = warpgroup_mma(ds, keys_2.index(last), dq_2, is_async=True)
        dq_1, dq_2 = warpgroup_mma_wait(0, deps=[dq_1, dq_2])
        store(dq_ptr, dq_2, queries[1], start_q, first_row, rows, head, D_1, scale, HEADS, D_1 + D_2)
    else:
        dq_1 = warpgroup_mma_wait(0, deps=[dq_1])
    store(dq_ptr, dq_1, queries[0], start_q, first_row, rows, head, 0, scale, HEADS, D_1 + D_2)


@gluon.jit
def _produce_keys(
    descriptors, queries_1, queries_2, douts, rings, bars, query_bars, first_query, start_k, columns, blocks,
    D_1: gl.constexpr, D_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries of both groups, then blocks of keys and values from the right as places come free."""
    q_1, q_2, dout, k_1, k_2, v = descriptors
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    q_column, dout_column, k_column, v_column = columns
    for group in gl.static_range(2):
        bar, at = query_bars.index(group), first_query + 64 * group
        mbarrier.expect(
            bar, q_1.block_type.nbytes + dout.block_type.nbytes + (q_2.block_type.nbytes if D_2 > 0 else 0)
        )
        load(q_1, [at, q_column], bar, queries_1.index(group))
        if D_2 > 0:
            load(q_2, [at, q_column + D_1], bar, queries_2.index(group))
        load(dout, [at, dout_column], bar, douts.index(group))
    for i in range(blocks):
        stage, phase, at = i % STAGES, (i // STAGES) & 1, start_k + (blocks - 1 - i) * BLOCK_N
        mbarrier.wait(key_empty.index(stage), phase ^ 1)
        bar = key_full.index(stage)
        mbarrier.expect(bar, k_1.block_type.nbytes + (k_2.block_type.nbytes if D_2 > 0 else 0))
        load(k_1, [at, k_column], bar, keys_1.index(stage))
        if D_2 > 0:
            load(k_2, [at, k_column + D_1], bar, keys_2.index(stage))
        mbarrier.wait(value_empty.index(stage), phase ^ 1)
        mbarrier.expect(value_full.index(stage), v.block_type.nbytes)
        load(v, [at, v_column], value_full.index(stage), values.index(stage))


@remembered
@gluon.jit(do_not_specialize=["tokens"])
def query_gradient(
    q_1, q_2, dout, k_1, k_2, v, dq_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, tiles_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, scale,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, LISTED: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries of one head and sequence."""
    head, tile, sequence = place(tiles_ptr, HEADS, TOGETHER, LISTED)
    start_q, end_q = bounds_of(starts_q_ptr, sequence, LISTED)
    start_k, end_k = bounds_of(starts_k_ptr, sequence, LISTED)
    queries_1 = gl.allocate_shared_memory(q_1.dtype, [2, 64, D_1], q_1.layout)
    douts = gl.allocate_shared_memory(dout.dtype, [2, 64, V], dout.layout)
    keys_1 = gl.allocate_shared_memory(k_1.dtype, [STAGES, BLOCK_N, D_1], k_1.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, V], v.layout)
    queries_2, keys_2 = queries_1, keys_1
    if D_2 > 0:
        queries_2 = gl.allocate_shared_memory(q_2.dtype, [2, 64, D_2], q_2.layout)
        keys_2 = gl.allocate_shared_memory(k_2.dtype, [STAGES, BLOCK_N, D_2], k_2.layout)
    query_bars = new_bars(2, 1)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    rings = (keys_1, keys_2, values)
    rows, keys = end_q - start_q, end_k - start_k
    # Causal tiles at the end of a sequence meet the most keys: start them first.
    if CAUSAL and not LISTED:
        tile = gl.num_programs(1) - 1 - tile
    offset, end, first_masked = keys - rows, keys, keys // BLOCK_N
    if CAUSAL:
        end = gl.minimum(keys, gl.maximum((tile + 1) * BLOCK_M + offset, 0))
        first_masked = gl.minimum(first_masked, gl.maximum(tile * BLOCK_M + offset + 1, 0) // BLOCK_N)
    blocks = (end + BLOCK_N - 1) // BLOCK_N
    if (tile * BLOCK_M < rows) & (blocks > 0):
        columns = (
            head * q_stride, head * dout_stride, head // GROUPS * k_stride, head // GROUPS * v_stride
        )  # fmt: skip
        gl.warp_specialize([
            (_consume_keys, (
                0, (queries_1.index(0), queries_2.index(0)), douts.index(0), rings, bars, query_bars,
                dq_ptr, lse_ptr, delta_ptr, start_q, rows, keys, tile, head, tokens, scale, offset,
                blocks, first_masked, HEADS, D_1, D_2, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
            )),
            (_consume_keys, (
                1, (queries_1.index(1), queries_2.index(1)), douts.index(1), rings, bars, query_bars,
                dq_ptr, lse_ptr, delta_ptr, start_q, rows, keys, tile, head, tokens, scale, offset,
                blocks, first_masked, HEADS, D_1, D_2, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
            )),
            (_produce_keys, (
                (q_1, q_2, dout, k_1, k_2, v), queries_1, queries_2, douts, rings, bars, query_bars,
                start_q + tile * BLOCK_M, start_k, columns, blocks, D_1, D_2, BLOCK_N, STAGES,
            )),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    elif tile * BLOCK_M < rows:
        nothing(dq_ptr, start_q, rows, tile, head, HEADS, D_1 + D_2, BLOCK_M)
