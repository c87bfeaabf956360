# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""`gluon_key_gradients_split` tile after tile in one program a multiprocessor, as `gluon_attention_persistent`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_key_gradients import _clear_queries, _unknown, _widened
from benthic.kernels.gluon_tickets import FIELDS, next_ticket, read_field, write_field
from benthic.kernels.gluon_tiles import LOG2E, clear_after, load, meet, new_bars, nothing, place, product, store


@gluon.jit
def _walk(
    dk_1, dk_2, dv, ds, first, last, begun, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
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
        stage, phase, before = i % STAGES, (i // STAGES) & 1, gl.maximum(i - 1, begun) % STAGES
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
        mbarrier.arrive(query_empty.index(before), count=1, pred=i > begun)
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
def _tile(
    group, keys_1, keys_2, values, rings, terms, bars, key_bars, dk_ptr, dv_ptr, start_k, rows, scale,
    visible, kept, blocks, tile, key_head, begun, turn,
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
    key_full, key_empty = key_bars
    mbarrier.wait(key_full.index(group), turn & 1)
    mbarrier.wait(query_full.index(begun % STAGES), (begun // STAGES) & 1)
    visible += group * 64
    total = begun + blocks * GROUPS
    masked = 0
    if CAUSAL:
        masked = gl.minimum(gl.maximum(visible + 63 + BLOCK_M - 1, 0) // BLOCK_M, blocks)
    whole = gl.maximum(blocks - (kept < BLOCK_M).to(gl.int32), masked)
    for member in range(GROUPS):
        met = begun + member * blocks
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, 0, masked, begun, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, True, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, masked, whole, begun, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, False, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
        dk_1, dk_2, dv, ds = _walk(
            dk_1, dk_2, dv, ds, whole, blocks, begun, met, total, keys_1, keys_2, values, rings, terms, bars, zero, scale,
            visible, kept, blocks, group, True, CAUSAL, BLOCK_M, STAGES, D_1, D_2, V, SCORES, LEFT,
            BESIDE,
        )  # fmt: skip
    last, scale = (total - 1) % STAGES, scale / LOG2E
    column = tile * BLOCK_N + group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    dk_1 = warpgroup_mma(ds, queries_1.index(last), dk_1, is_async=True)
    if D_2 > 0:
        dk_2 = warpgroup_mma(ds, queries_2.index(last), dk_2, is_async=True)
        dk_1, dk_2 = warpgroup_mma_wait(0, deps=[dk_1, dk_2])
    else:
        dk_1 = warpgroup_mma_wait(0, deps=[dk_1])
    mbarrier.arrive(query_empty.index(last), count=1)
    mbarrier.arrive(key_empty.index(group), count=1)
    if D_2 > 0:
        store(dk_ptr, dk_2, start_k, column, rows, key_head, D_1, scale, KEY_HEADS, D_1 + D_2, D_2, OUT_2)
    store(dk_ptr, dk_1, start_k, column, rows, key_head, 0, scale, KEY_HEADS, D_1 + D_2, D_1, OUT_1)
    store(dv_ptr, dv, start_k, column, rows, key_head, 0, 1.0, KEY_HEADS, V, V, OUT_V)


@gluon.jit
def _first_query(queries, rows, tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """The first query that a tile of keys meets, and how many blocks of them."""
    first_query = 0
    if CAUSAL:  # queries before see none of these keys
        first_query = gl.maximum(tile * BLOCK_N - (rows - queries), 0)
    return first_query, gl.maximum(queries - first_query + BLOCK_M - 1, 0) // BLOCK_M


@gluon.jit
def _consume(
    group, keys_1, keys_2, values, rings, terms, bars, key_bars, tickets, ticket_bars, dk_ptr, dv_ptr, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """A group's part of every tile of which a ticket comes."""
    ticket_full, ticket_empty = ticket_bars
    begun, turn, taken, tile = 0, 0, 0, 0
    while tile >= 0:
        slot = taken & 1
        mbarrier.wait(ticket_full.index(slot), (taken >> 1) & 1)
        start_k, rows = read_field(tickets, slot, 0), read_field(tickets, slot, 1)
        queries, tile, key_head = read_field(tickets, slot, 2), read_field(tickets, slot, 3), read_field(tickets, slot, 4)
        mbarrier.arrive(ticket_empty.index(slot), count=1)
        taken += 1
        if tile >= 0:
            first_query, blocks = _first_query(queries, rows, tile, BLOCK_M, BLOCK_N, CAUSAL)
            if blocks > 0:
                _tile(
                    group, keys_1, keys_2, values, rings, terms, bars, key_bars, dk_ptr, dv_ptr, start_k, rows, scale,
                    tile * BLOCK_N - (rows - queries) - first_query,
                    queries - first_query - (blocks - 1) * BLOCK_M, blocks, tile, key_head, begun, turn,
                    KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, BESIDE,
                )  # fmt: skip
                begun += blocks * GROUPS
                turn += 1
            else:
                nothing(dk_ptr, start_k, rows, tile * 2 + group, key_head, KEY_HEADS, D_1 + D_2, 64)
                nothing(dv_ptr, start_k, rows, tile * 2 + group, key_head, KEY_HEADS, V, 64)


@gluon.jit
def _produce(
    descriptors, keys_1, keys_2, values, rings, terms, bars, key_bars, tickets, ticket_bars, lse_ptr, delta_ptr,
    starts_q_ptr, starts_k_ptr, counter_ptr, tiles, sum_of_tiles, columns, tokens,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Take tiles, write tickets, load blocks of queries of each head, and keys and values once the first is on its way."""
    q_1, q_2, dout, k_1, k_2, v = descriptors
    queries_1, queries_2, douts = rings
    lses, deltas, _ordinals = terms
    query_full, query_empty, dout_full, dout_empty = bars
    key_full, key_empty = key_bars
    ticket_full, ticket_empty = ticket_bars
    q_stride, dout_stride, k_stride, v_stride = columns
    PARTS: gl.constexpr = KEY_HEADS // TOGETHER
    met, turn, taken = 0, 0, 0
    place = gl.program_id(0)
    while place < sum_of_tiles:
        coming = next_ticket(counter_ptr) + gl.num_programs(0)
        line = place // (TOGETHER * tiles)
        key_head, sequence = line % PARTS * TOGETHER + place % TOGETHER, line // PARTS
        tile = place // TOGETHER % tiles
        start_q, start_k = gl.load(starts_q_ptr + sequence), gl.load(starts_k_ptr + sequence)
        queries = gl.load(starts_q_ptr + sequence + 1) - start_q
        rows = gl.load(starts_k_ptr + sequence + 1) - start_k
        if tile * BLOCK_N < rows:
            slot = taken & 1
            mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
            write_field(tickets, slot, 0, start_k)
            write_field(tickets, slot, 1, rows)
            write_field(tickets, slot, 2, queries)
            write_field(tickets, slot, 3, tile)
            write_field(tickets, slot, 4, key_head)
            mbarrier.arrive(ticket_full.index(slot), count=1)
            taken += 1
            first_query, blocks = _first_query(queries, rows, tile, BLOCK_M, BLOCK_N, CAUSAL)
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
                    term = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([2], [32], [1], [0]))
                    kept = row + term < queries
                    per_row = head.to(gl.int64) * tokens + start_q + row + term
                    lse = gl.load(lse_ptr + per_row, mask=kept, other=float("inf")) * LOG2E
                    lses.index(stage).store(lse)
                    deltas.index(stage).store(gl.load(delta_ptr + per_row, mask=kept, other=0.0))
                    mbarrier.arrive(bar, count=1)
                    met += 1
                    if (i == 0) & (member == 0):
                        for group in gl.static_range(2):
                            full, first = key_full.index(group), start_k + tile * BLOCK_N + 64 * group
                            mbarrier.wait(key_empty.index(group), (turn & 1) ^ 1)
                            mbarrier.expect(
                                full,
                                k_1.block_type.nbytes + v.block_type.nbytes
                                + (k_2.block_type.nbytes if D_2 > 0 else 0),
                            )  # fmt: skip
                            load(k_1, [first, key_head * k_stride], full, keys_1.index(group))
                            if D_2 > 0:
                                load(k_2, [first, key_head * k_stride + D_1], full, keys_2.index(group))
                            load(v, [first, key_head * v_stride], full, values.index(group))
                        turn += 1
        place = coming
    slot = taken & 1
    mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
    write_field(tickets, slot, 3, -1)
    mbarrier.arrive(ticket_full.index(slot), count=1)


@gluon.jit(do_not_specialize=["tokens", "tiles", "total"])
def key_gradients_in_turn(
    q_1, q_2, dout, k_1, k_2, v, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, counter_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, tiles, total, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, BESIDE: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles, `total` of them, `tiles` a key head and sequence; `counter_ptr` is at 0."""
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
    tickets = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], plain)
    key_bars, ticket_bars = (new_bars(2, 1), new_bars(2, 1)), (new_bars(2, 1), new_bars(2, 2))
    bars = (new_bars(STAGES, 2), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    rings, terms = (queries_1, queries_2, douts), (lses, deltas, ordinals)
    gl.warp_specialize([
        (_consume, (
            0, keys_1, keys_2, values, rings, terms, bars, key_bars, tickets, ticket_bars, dk_ptr, dv_ptr,
            scale * LOG2E, KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, BESIDE,
        )),
        (_consume, (
            1, keys_1, keys_2, values, rings, terms, bars, key_bars, tickets, ticket_bars, dk_ptr, dv_ptr,
            scale * LOG2E, KEY_HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER, BESIDE,
        )),
        (_produce, (
            (q_1, q_2, dout, k_1, k_2, v), keys_1, keys_2, values, rings, terms, bars, key_bars, tickets, ticket_bars,
            lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, counter_ptr, tiles, total,
            (q_stride, dout_stride, k_stride, v_stride), tokens,
            KEY_HEADS, GROUPS, D_1, D_2, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
