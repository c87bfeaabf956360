# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Flash attention forward for Hopper in Gluon, tile after tile in one program a multiprocessor.

As `gluon_attention`, but the loading warp takes tiles from a counter, longest first, writes what the other groups
must know of a tile on a ticket in shared memory, and loads the next tile's blocks while they finish the one before.
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

from benthic.kernels.gluon_attention import _clear_foreign_values, _nothing_seen, _scores, _weights
from benthic.kernels.gluon_tickets import FIELDS, bounds, next_ticket, read_field, write_field
from benthic.kernels.gluon_tiles import LOG2E, load, new_bars

@gluon.jit
def _walk(
    acc, m, total, p, first, last, met, blocks, queries, rings, bars, zero, last_seen, scale,
    D_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    SCORES: gl.constexpr, OUT: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Meet blocks `first .. last` from the right, each of which has its keys in the ring already.

    The ring has had `met` blocks of tiles before.
    """
    q_1, q_2 = queries
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    for i in range(first, last):
        at = met + i
        stage, before = at % STAGES, (at - 1) % STAGES
        s_coming = _scores(q_1, q_2, keys_1, keys_2, stage, zero, D_2)
        mbarrier.wait(value_full.index(before), ((at - 1) // STAGES) & 1)
        acc_coming = warpgroup_mma(p, values.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_coming])
        mbarrier.arrive(key_empty.index(stage), count=1)
        block = (blocks - 1 - i) * BLOCK_N
        weights, m, total, alpha = _weights(s, m, total, scale, block, last_seen, BLOCK_N, MASKED, SCORES)
        # Between the powers and the wait for the product, or the assembler puts the wait first.
        mbarrier.wait(key_full.index((at + 1) % STAGES), ((at + 1) // STAGES) & 1, pred=i + 1 < blocks)
        acc, weights = warpgroup_mma_wait(0, deps=[acc_coming, weights])
        mbarrier.arrive(value_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(weights.to(p.dtype), LEFT)
    return acc, m, total, p


@gluon.jit
def _tile(
    group, queries, rings, bars, query_bars, out_ptr, lse_ptr,
    start_q, rows, keys, tile, head, tokens, scale, blocks, first_masked, met, turn,
    HEADS: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The 64 queries of a group in a tile: scores, weights, output and log-sum-exp."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    q_1, q_2 = queries
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    query_full, query_empty = query_bars
    row = tile * BLOCK_M + group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    last_seen = gl.minimum(row + (keys - rows), keys - 1) if CAUSAL else row * 0 + (keys - 1)
    m = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, V], gl.float32, layout=OUT)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    stage, phase = met % STAGES, (met // STAGES) & 1
    mbarrier.wait(query_full.index(group), turn & 1)
    mbarrier.wait(key_full.index(stage), phase)
    s = warpgroup_mma_wait(0, deps=[_scores(q_1, q_2, keys_1, keys_2, stage, zero, D_2)])
    mbarrier.arrive(key_empty.index(stage), count=1)
    block = (blocks - 1) * BLOCK_N
    weights, m, total, _ = _weights(s, m, total, scale, block, last_seen, BLOCK_N, True, SCORES)
    p = gl.convert_layout(weights.to(out_ptr.dtype.element_ty), LEFT)
    if block + BLOCK_N > keys:
        mbarrier.wait(value_full.index(stage), phase)
        _clear_foreign_values(values.index(stage), keys, block, BLOCK_N, V)
    mbarrier.wait(key_full.index((met + 1) % STAGES), ((met + 1) // STAGES) & 1, pred=blocks > 1)
    masked = gl.maximum(blocks - first_masked, 1)
    acc, m, total, p = _walk(
        acc, m, total, p, 1, masked, met, blocks, queries, rings, bars, zero, last_seen, scale,
        D_2, BLOCK_N, STAGES, True, SCORES, OUT, LEFT,
    )  # fmt: skip
    acc, m, total, p = _walk(
        acc, m, total, p, masked, blocks, met, blocks, queries, rings, bars, zero, last_seen, scale,
        D_2, BLOCK_N, STAGES, False, SCORES, OUT, LEFT,
    )  # fmt: skip
    mbarrier.arrive(query_empty.index(group), count=1)
    last = (met + blocks - 1) % STAGES
    mbarrier.wait(value_full.index(last), ((met + blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, values.index(last), acc, is_async=True)])
    mbarrier.arrive(value_empty.index(last), count=1)
    safe = gl.where(total == 0.0, 1.0, total)
    out = acc / gl.convert_layout(safe, gl.SliceLayout(1, OUT))[:, None]
    lse = gl.where(total == 0.0, float("-inf"), (m * scale + gl.log2(safe)) / LOG2E)
    gl.store(lse_ptr + head.to(gl.int64) * tokens + start_q + row, lse, mask=row < rows)
    row = gl.convert_layout(row, gl.SliceLayout(1, OUT))
    value = gl.arange(0, V, layout=gl.SliceLayout(0, OUT))
    at = ((start_q + row).to(gl.int64)[:, None] * HEADS + head) * V + value[None, :]
    gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


@gluon.jit
def _consume(
    group, queries, rings, bars, query_bars, tickets, ticket_bars, out_ptr, lse_ptr, tokens, scale,
    HEADS: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A group's part of every tile of which a ticket comes."""
    ticket_full, ticket_empty = ticket_bars
    met, turn, taken, tile = 0, 0, 0, 0
    while tile >= 0:
        slot = taken & 1
        mbarrier.wait(ticket_full.index(slot), (taken >> 1) & 1)
        start_q, rows, keys = read_field(tickets, slot, 0), read_field(tickets, slot, 1), read_field(tickets, slot, 2)
        tile, head = read_field(tickets, slot, 3), read_field(tickets, slot, 4)
        mbarrier.arrive(ticket_empty.index(slot), count=1)
        taken += 1
        if tile >= 0:
            blocks, first_masked = bounds(rows, keys, tile, BLOCK_M, BLOCK_N, CAUSAL)
            if blocks > 0:
                _tile(
                    group, queries, rings, bars, query_bars, out_ptr, lse_ptr,
                    start_q, rows, keys, tile, head, tokens, scale, blocks, first_masked, met, turn,
                    HEADS, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
                )  # fmt: skip
                met += blocks
                turn += 1
            else:
                _nothing_seen(out_ptr, lse_ptr, start_q, rows, tile * 2 + group, head, tokens, HEADS, V, 64)


@gluon.jit
def _produce(
    descriptors, queries_1, queries_2, rings, bars, query_bars, tickets, ticket_bars,
    starts_q_ptr, starts_k_ptr, counter_ptr, tiles, total, strides,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr,
):  # fmt: skip
    """Take tiles, write tickets, load queries of both groups and blocks of keys and values from the right."""
    q_1, q_2, k_1, k_2, v = descriptors
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    query_full, query_empty = query_bars
    ticket_full, ticket_empty = ticket_bars
    q_stride, k_stride, v_stride = strides
    PARTS: gl.constexpr = HEADS // TOGETHER
    met, turn, taken = 0, 0, 0
    place = gl.program_id(0)
    while place < total:
        coming = next_ticket(counter_ptr) + gl.num_programs(0)
        row = place // (TOGETHER * tiles)
        head, sequence = row % PARTS * TOGETHER + place % TOGETHER, row // PARTS
        tile = place // TOGETHER % tiles
        if CAUSAL:  # tiles at the end of a sequence meet the most keys
            tile = tiles - 1 - tile
        start_q, start_k = gl.load(starts_q_ptr + sequence), gl.load(starts_k_ptr + sequence)
        rows = gl.load(starts_q_ptr + sequence + 1) - start_q
        keys = gl.load(starts_k_ptr + sequence + 1) - start_k
        if tile * BLOCK_M < rows:
            slot = taken & 1
            mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
            write_field(tickets, slot, 0, start_q)
            write_field(tickets, slot, 1, rows)
            write_field(tickets, slot, 2, keys)
            write_field(tickets, slot, 3, tile)
            write_field(tickets, slot, 4, head)
            mbarrier.arrive(ticket_full.index(slot), count=1)
            taken += 1
            blocks, _first_masked = bounds(rows, keys, tile, BLOCK_M, BLOCK_N, CAUSAL)
            k_column, v_column = head // GROUPS * k_stride, head // GROUPS * v_stride
            for i in range(blocks):
                stage, phase = met % STAGES, (met // STAGES) & 1
                at = start_k + (blocks - 1 - i) * BLOCK_N
                mbarrier.wait(key_empty.index(stage), phase ^ 1)
                bar = key_full.index(stage)
                mbarrier.expect(bar, k_1.block_type.nbytes + (k_2.block_type.nbytes if D_2 > 0 else 0))
                load(k_1, [at, k_column], bar, keys_1.index(stage))
                if D_2 > 0:
                    load(k_2, [at, k_column + D_1], bar, keys_2.index(stage))
                if i == 0:
                    for group in gl.static_range(2):
                        full, first = query_full.index(group), start_q + tile * BLOCK_M + 64 * group
                        mbarrier.wait(query_empty.index(group), (turn & 1) ^ 1)
                        mbarrier.expect(
                            full, q_1.block_type.nbytes + (q_2.block_type.nbytes if D_2 > 0 else 0)
                        )
                        load(q_1, [first, head * q_stride], full, queries_1.index(group))
                        if D_2 > 0:
                            load(q_2, [first, head * q_stride + D_1], full, queries_2.index(group))
                    turn += 1
                mbarrier.wait(value_empty.index(stage), phase ^ 1)
                mbarrier.expect(value_full.index(stage), v.block_type.nbytes)
                load(v, [at, v_column], value_full.index(stage), values.index(stage))
                met += 1
        place = coming
    slot = taken & 1
    mbarrier.wait(ticket_empty.index(slot), ((taken >> 1) & 1) ^ 1)
    write_field(tickets, slot, 3, -1)
    mbarrier.arrive(ticket_full.index(slot), count=1)


@gluon.jit(do_not_specialize=["tokens", "tiles", "total"])
def forward_in_turn(
    q_1, q_2, k_1, k_2, v, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr, counter_ptr,
    q_stride, k_stride, v_stride, tokens, tiles, total, scale,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    TOGETHER: gl.constexpr, REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles, `total` of them, `tiles` a head and sequence; `counter_ptr` is at 0."""
    queries_1 = gl.allocate_shared_memory(q_1.dtype, [2, 64, D_1], q_1.layout)
    keys_1 = gl.allocate_shared_memory(k_1.dtype, [STAGES, BLOCK_N, D_1], k_1.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, V], v.layout)
    queries_2, keys_2 = queries_1, keys_1
    if D_2 > 0:
        queries_2 = gl.allocate_shared_memory(q_2.dtype, [2, 64, D_2], q_2.layout)
        keys_2 = gl.allocate_shared_memory(k_2.dtype, [STAGES, BLOCK_N, D_2], k_2.layout)
    tickets = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query_bars, ticket_bars = (new_bars(2, 1), new_bars(2, 1)), (new_bars(2, 1), new_bars(2, 2))
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    rings = (keys_1, keys_2, values)
    gl.warp_specialize([
        (_consume, (
            0, (queries_1.index(0), queries_2.index(0)), rings, bars, query_bars, tickets, ticket_bars,
            out_ptr, lse_ptr, tokens, scale * LOG2E, HEADS, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
        )),
        (_consume, (
            1, (queries_1.index(1), queries_2.index(1)), rings, bars, query_bars, tickets, ticket_bars,
            out_ptr, lse_ptr, tokens, scale * LOG2E, HEADS, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
        )),
        (_produce, (
            (q_1, q_2, k_1, k_2, v), queries_1, queries_2, rings, bars, query_bars, tickets, ticket_bars,
            starts_q_ptr, starts_k_ptr, counter_ptr, tiles, total, (q_stride, k_stride, v_stride),
            HEADS, GROUPS, D_1, D_2, BLOCK_M, BLOCK_N, STAGES, CAUSAL, TOGETHER,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
