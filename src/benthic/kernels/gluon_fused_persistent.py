# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""`gluon_fused_gradients` tile after tile in one program a multiprocessor, as `gluon_attention_persistent`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_fused_gradients import HALF, _add, _partial
from benthic.kernels.gluon_key_gradients import _unknown, _widened
from benthic.kernels.gluon_tickets import FIELDS, next_ticket, read_field, write_field
from benthic.kernels.gluon_tiles import LOG2E, clear_after, load, meet, new_bars, nothing, store


@gluon.jit
def _walk(
    dk, dv, ds, at, coming, first, last, begun, met, total, keys, values, rings, terms, weights, bars,
    zero, scale, visible, kept, blocks, step,
    SUMS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, STAGES_O: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """Meet blocks `first .. last` of a head's queries, `met` blocks of other heads having been met.

    `at` is where sums of the block before lie, `coming` where those of this one do. The tile's first is `begun`. Without `CAUSAL`, `visible` is the number of the keys.
    """
    queries, douts = rings
    lses, deltas, ordinals = terms
    query_full, query_empty, dout_full, dout_empty, ds_full = bars
    for block in range(first, last):
        i = met + block
        stage, before = i % STAGES, (i - (i > begun).to(gl.int32)) % STAGES
        stage_o, phase_o = i % STAGES_O, (i // STAGES_O) & 1
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
        mbarrier.arrive(query_empty.index(before), count=1, pred=i > begun)
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
            mbarrier.wait(ds_full.index((i + 2) % 3), ((i + 2) // 3 & 1) ^ 1, pred=i > begun)
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
        at = coming
        coming += step
    return dk, dv, ds, at, coming


@gluon.jit
def _tile(
    GROUP: gl.constexpr, keys, values, rings, terms, weights, bars, key_bars, dk_ptr, dv_ptr, sum_ptr,
    start_k, rows, scale, visible, kept, blocks, first_block, tile, key_head, begun, turn,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
    CAUSAL: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The gradients of the 64 keys of a group and of their values, and half the dims of dQ."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    queries = rings[0]
    query_full, ds_full = bars[0], bars[4]
    query_empty = bars[1]
    key_full, key_empty = key_bars
    dk = gl.zeros([64, D], gl.float32, layout=OUT)
    dv = gl.zeros([64, V], gl.float32, layout=OUT)
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=HALF)
    ds = gl.zeros([64, BLOCK_M], dk_ptr.dtype.element_ty, layout=LEFT)
    mbarrier.wait(key_full.index(GROUP), turn & 1)
    left = rows - tile * BLOCK_N - GROUP * 64
    if left < 64:
        clear_after(keys.index(GROUP), left, 64, D)
        clear_after(values.index(GROUP), left, 64, V)
        fence_async_shared()
        meet()
    mbarrier.wait(key_full.index(1 - GROUP), turn & 1)
    mbarrier.wait(query_full.index(begun % STAGES), (begun // STAGES) & 1)
    if CAUSAL:
        bound = visible + GROUP * 64
        masked = gl.minimum(gl.maximum(bound + 63 + BLOCK_M - 1, 0) // BLOCK_M, blocks)
    else:
        bound = left
        masked = gl.where(left < 64, blocks, 0)
    whole = gl.maximum(blocks - (kept < BLOCK_M).to(gl.int32), masked)
    total = begun + blocks * GROUPS
    step = KEY_HEADS * GROUPS * BLOCK_M * D
    at = sum_ptr  # a place that nobody reads: the block before the first has no sums
    for member in range(GROUPS):
        met, head = begun + member * blocks, key_head * GROUPS + member
        coming = sum_ptr + (first_block.to(gl.int64) * (KEY_HEADS * GROUPS) + head) * (BLOCK_M * D) + GROUP * 64 * 64
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, 0, masked, begun, met, total, keys, values, rings, terms, weights, bars,
            zero, scale, bound, kept, blocks, step,
            SUMS, GROUP, GROUPS, True, CAUSAL, BLOCK_M, STAGES, STAGES_O, D, V,
        )  # fmt: skip
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, masked, whole, begun, met, total, keys, values, rings, terms, weights, bars,
            zero, scale, bound, kept, blocks, step,
            SUMS, GROUP, GROUPS, False, CAUSAL, BLOCK_M, STAGES, STAGES_O, D, V,
        )  # fmt: skip
        dk, dv, ds, at, coming = _walk(
            dk, dv, ds, at, coming, whole, blocks, begun, met, total, keys, values, rings, terms, weights, bars,
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
    mbarrier.arrive(query_empty.index(last), count=1)
    mbarrier.arrive(key_empty.index(0), count=1)
    column = tile * BLOCK_N + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, HALF))
    store(dk_ptr, dk, start_k, column, rows, key_head, 0, scale / LOG2E, KEY_HEADS, D, D, OUT)
    store(dv_ptr, dv, start_k, column, rows, key_head, 0, 1.0, KEY_HEADS, V, V, OUT)


@gluon.jit
def _first_query(queries_left, rows, tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """The first query that a tile of keys meets, and how many blocks of them."""
    first_query = 0
    if CAUSAL:  # blocks before see none of these keys
        first_query = gl.maximum(tile * BLOCK_N - (rows - queries_left), 0) // BLOCK_M * BLOCK_M
    return first_query, gl.maximum(queries_left - first_query + BLOCK_M - 1, 0) // BLOCK_M


@gluon.jit
def _consume(
    GROUP: gl.constexpr, keys, values, rings, terms, weights, bars, key_bars, tickets, ticket_bars,
    dk_ptr, dv_ptr, sum_ptr, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
    CAUSAL: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """A group's part of every tile of which a ticket comes."""
    ticket_full, ticket_empty = ticket_bars
    begun, turn, taken, tile = 0, 0, 0, 0
    while tile >= 0:
        slot = taken & 1
        mbarrier.wait(ticket_full.index(slot), (taken >> 1) & 1)
        start_k, rows = read_field(tickets, slot, 0), read_field(tickets, slot, 1)
        queries_left, tile = read_field(tickets, slot, 2), read_field(tickets, slot, 3)
        key_head, block_before = read_field(tickets, slot, 4), read_field(tickets, slot, 5)
        mbarrier.arrive(ticket_empty.index(slot), count=1)
        taken += 1
        if tile >= 0:
            first_query, blocks = _first_query(queries_left, rows, tile, BLOCK_M, BLOCK_N, CAUSAL)
            if blocks > 0:
                _tile(
                    GROUP, keys, values, rings, terms, weights, bars, key_bars, dk_ptr, dv_ptr, sum_ptr,
                    start_k, rows, scale, tile * BLOCK_N - (rows - queries_left) - first_query,
                    queries_left - first_query - (blocks - 1) * BLOCK_M, blocks,
                    block_before + first_query // BLOCK_M, tile, key_head, begun, turn,
                    KEY_HEADS, GROUPS, D, V, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, SUMS,
                )  # fmt: skip
                begun += blocks * GROUPS
                turn += 1
            else:
                nothing(dk_ptr, start_k, rows, tile * 2 + GROUP, key_head, KEY_HEADS, D, 64)
                nothing(dv_ptr, start_k, rows, tile * 2 + GROUP, key_head, KEY_HEADS, V, 64)


@gluon.jit
def _produce(
    descriptors, keys, values, rings, terms, bars, key_bars, tickets, ticket_bars, lse_ptr, delta_ptr,
    starts_q_ptr, starts_k_ptr, counter_ptr, tiles, total, columns, tokens,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, STAGES_O: gl.constexpr, CAUSAL: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Take tiles, write tickets, load keys and values of both groups, then blocks of queries of each head."""
    q, dout, k, v = descriptors
    queries, douts = rings
    lses, deltas, _ordinals = terms
    query_full, query_empty, dout_full, dout_empty, _ds_full = bars
    key_full, key_empty = key_bars
    ticket_full, ticket_empty = ticket_bars
    q_stride, dout_stride, k_stride, v_stride = columns
    PARTS: gl.constexpr = KEY_HEADS // TOGETHER
    met, turn, taken = 0, 0, 0
    place = gl.program_id(0)
    while place < total:
        coming = next_ticket(counter_ptr) + gl.num_programs(0)
        line = place // (TOGETHER * tiles)
        key_head, sequence = line % PARTS * TOGETHER + place % TOGETHER, line // PARTS
        tile = place // TOGETHER % tiles
        start_q, start_k = gl.load(starts_q_ptr + sequence), gl.load(starts_k_ptr + sequence)
        queries_left = gl.load(starts_q_ptr + sequence + 1) - start_q
        rows = gl.load(starts_k_ptr + sequence + 1) - start_k
        if tile * BLOCK_N < rows:
            slot = taken & 1
            mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
            write_field(tickets, slot, 0, start_k)
            write_field(tickets, slot, 1, rows)
            write_field(tickets, slot, 2, queries_left)
            write_field(tickets, slot, 3, tile)
            write_field(tickets, slot, 4, key_head)
            write_field(tickets, slot, 5, 1 + start_q // BLOCK_M + 2 * sequence)
            mbarrier.arrive(ticket_full.index(slot), count=1)
            taken += 1
            first_query, blocks = _first_query(queries_left, rows, tile, BLOCK_M, BLOCK_N, CAUSAL)
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
                    # Queries past the end and those that see no key have a sum of +inf: their weights are 0.
                    term = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([2], [32], [1], [0]))
                    kept = row + term < queries_left
                    per_row = head.to(gl.int64) * tokens + start_q + row + term
                    lse = gl.load(lse_ptr + per_row, mask=kept, other=float("inf")) * LOG2E
                    lses.index(stage).store(gl.where(lse == float("-inf"), float("inf"), lse))
                    deltas.index(stage).store(gl.load(delta_ptr + per_row, mask=kept, other=0.0))
                    mbarrier.arrive(bar, count=1)
                    met += 1
                    if (i == 0) & (member == 0):
                        mbarrier.wait(key_empty.index(0), (turn & 1) ^ 1)
                        for group in gl.static_range(2):
                            full, first = key_full.index(group), start_k + tile * BLOCK_N + 64 * group
                            mbarrier.expect(full, k.block_type.nbytes + v.block_type.nbytes)
                            load(k, [first, key_head * k_stride], full, keys.index(group))
                            load(v, [first, key_head * v_stride], full, values.index(group))
                        turn += 1
        place = coming
    slot = taken & 1
    mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
    write_field(tickets, slot, 3, -1)
    mbarrier.arrive(ticket_full.index(slot), count=1)


@gluon.jit(do_not_specialize=["tokens", "tiles", "total"])
def fused_gradients_in_turn(
    q, dout, k, v, dk_ptr, dv_ptr, sum_ptr, lse_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, counter_ptr,
    q_stride, dout_stride, k_stride, v_stride, tokens, tiles, total, scale,
    KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STAGES_O: gl.constexpr,
    CAUSAL: gl.constexpr, TOGETHER: gl.constexpr, SUMS: gl.constexpr, REGISTERS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles, `total` of them, `tiles` a key head and sequence; `counter_ptr` is at 0."""
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
    tickets = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], plain)
    key_bars, ticket_bars = (new_bars(2, 1), new_bars(1, 2)), (new_bars(2, 1), new_bars(2, 2))
    bars = (
        new_bars(STAGES, 2), new_bars(STAGES, 2), new_bars(STAGES_O, 1), new_bars(STAGES_O, 2), new_bars(3, 2)
    )  # fmt: skip
    fence_async_shared()
    rings, terms = (queries, douts), (lses, deltas, ordinals)
    gl.warp_specialize([
        (_consume, (
            0, keys, values, rings, terms, weights, bars, key_bars, tickets, ticket_bars, dk_ptr, dv_ptr, sum_ptr,
            scale * LOG2E, KEY_HEADS, GROUPS, D, V, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, SUMS,
        )),
        (_consume, (
            1, keys, values, rings, terms, weights, bars, key_bars, tickets, ticket_bars, dk_ptr, dv_ptr, sum_ptr,
            scale * LOG2E, KEY_HEADS, GROUPS, D, V, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, SUMS,
        )),
        (_produce, (
            (q, dout, k, v), keys, values, rings, terms, bars, key_bars, tickets, ticket_bars, lse_ptr, delta_ptr,
            starts_q_ptr, starts_k_ptr, counter_ptr, tiles, total, (q_stride, dout_stride, k_stride, v_stride),
            tokens, KEY_HEADS, GROUPS, BLOCK_M, BLOCK_N, STAGES, STAGES_O, CAUSAL, TOGETHER,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
