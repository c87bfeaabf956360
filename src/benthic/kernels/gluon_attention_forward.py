# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Flash attention's forward pass for Hopper: one warp loads, two warp groups of 64 queries each multiply.

A program on each multiprocessor takes tile after tile: 128 queries of one head and one sequence. Its loading
warp gets their numbers from a counter, brings blocks of 128 keys and values by TMA into a ring of shared
memory, and leaves there what the other groups must know of a tile (its facts). Each of those walks over the
blocks from the right, where the causal diagonal is, and keeps its tensor cores busy while it computes powers
(FlashAttention-3, section 3.2; `gluon_attention_blocks`):

    S_i = Q K_i^T  and  O += P_(i-1) V_(i-1)  run  while  P_i = 2^(S_i - m)  waits for the first of them alone

also between two tiles, whose first S and last O are the products then; the output leaves beside what follows.
Weights P stay in registers, as the left operand of the second product. A head of 192 dims is two products,
128 + 64.
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

from benthic.kernels.gluon_attention_blocks import clear_foreign_values, scores_of, walk, weights_of
from benthic.kernels.gluon_queue import answered, asked, read_number, write_number
from benthic.kernels.gluon_tiles import LOG2E, bounds_of, load, new_bars
from benthic.kernels.relaunch import remembered

FACTS = gl.constexpr(7)
"""Of a tile: its blocks of keys (0: no more tiles), how many of them are cut, the sequence's keys, the tile's
first row, rows from there to the sequence's end, the head, and the last key that the first row sees."""


@gluon.jit
def _last_seen(first, keys, group, SCORES: gl.constexpr, CAUSAL: gl.constexpr):
    """The last key that each query of a group sees."""
    row = group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    return gl.minimum(first + row, keys - 1) if CAUSAL else row * 0 + (keys - 1)


@gluon.constexpr_function
def _rows_layout(width):
    """Of 64 rows: a warp has those that a product leaves it, and a thread eight dims of a row at a time."""
    registers = [[0, 1], [0, 2], [0, 4], *([0, at] for at in (32, 64) if at < width), [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.jit
def _write(
    out_ptr, lse_ptr, acc, m, total, first, left, head, group, tokens, scale,
    HEADS: gl.constexpr, V: gl.constexpr, OUT: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a group's rows, as many as are left, 16 bytes a thread."""
    ROWS: gl.constexpr = _rows_layout(V)
    safe = gl.where(total == 0.0, 1.0, total)
    out = acc / gl.convert_layout(safe, gl.SliceLayout(1, OUT))[:, None]
    lse = gl.where(total == 0.0, float("-inf"), (m * scale + gl.log2(safe)) / LOG2E)
    row = group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + head.to(gl.int64) * tokens + first + row, lse, mask=row < left)
    row = group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    dim = gl.arange(0, V, layout=gl.SliceLayout(0, ROWS))
    at = ((first + row).to(gl.int64)[:, None] * HEADS + head) * V + dim[None, :]
    gl.store(
        out_ptr + at, gl.convert_layout(out.to(out_ptr.dtype.element_ty), ROWS), mask=(row < left)[:, None]
    )


@gluon.jit
def _consume_tiles(
    group, queries_1, queries_2, rings, bars, query_full, facts, out_ptr, lse_ptr, tokens, scale,
    HEADS: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The 64 queries of a group in every tile: scores, weights, output and log-sum-exp."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    unseen = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    none = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    met, given = 0, 0
    mbarrier.wait(query_full, 0)
    blocks, cut, keys = read_number(facts, 0), read_number(facts, 1), read_number(facts, 2)
    first, left, head = read_number(facts, 3), read_number(facts, 4), read_number(facts, 5)
    last_seen = _last_seen(read_number(facts, 6), keys, group, SCORES, CAUSAL)
    queries = queries_1.index(group), queries_2.index(group)
    q_1, q_2 = queries
    if blocks > 0:
        mbarrier.wait(key_full.index(0), 0)
        s = warpgroup_mma_wait(0, deps=[scores_of(q_1, q_2, keys_1, keys_2, 0, zero, D_2)])
        mbarrier.arrive(key_empty.index(0), count=1)
        weights, m, total, _ = weights_of(
            s, unseen, none, scale, (blocks - 1) * BLOCK_N, last_seen, True, SCORES
        )
        p = gl.convert_layout(weights.to(DTYPE), LEFT)
        while blocks > 0:
            end = met + blocks
            last, after = (end - 1) % STAGES, end % STAGES
            if blocks * BLOCK_N > keys:
                mbarrier.wait(value_full.index(met % STAGES), (met // STAGES) & 1)
                clear_foreign_values(values.index(met % STAGES), keys, (blocks - 1) * BLOCK_N, BLOCK_N, V)
            mbarrier.wait(key_full.index((met + 1) % STAGES), ((met + 1) // STAGES) & 1, pred=blocks > 1)
            acc = gl.zeros([64, V], gl.float32, layout=OUT)
            # The walks place blocks by `end - 1 - i`.
            acc, m, total, p = walk(
                acc, m, total, p, met + 1, met + cut, end, queries, rings, bars, zero, last_seen, scale,
                D_2, BLOCK_N, STAGES, True, SCORES, OUT, LEFT,
            )  # fmt: skip
            acc, m, total, p = walk(
                acc, m, total, p, met + cut, end, end, queries, rings, bars, zero, last_seen, scale,
                D_2, BLOCK_N, STAGES, False, SCORES, OUT, LEFT,
            )  # fmt: skip
            given += 1
            mbarrier.wait(query_full, given & 1)
            old_m, old_total, old_first, old_left, old_head = m, total, first, left, head
            blocks, cut, keys = read_number(facts, 0), read_number(facts, 1), read_number(facts, 2)
            first, left, head = read_number(facts, 3), read_number(facts, 4), read_number(facts, 5)
            last_seen = _last_seen(read_number(facts, 6), keys, group, SCORES, CAUSAL)
            mbarrier.wait(value_full.index(last), ((end - 1) // STAGES) & 1)
            if blocks > 0:
                mbarrier.wait(key_full.index(after), (end // STAGES) & 1)
                s_coming = scores_of(q_1, q_2, keys_1, keys_2, after, zero, D_2)
                acc_coming = warpgroup_mma(p, values.index(last), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_coming])
                mbarrier.arrive(key_empty.index(after), count=1)
                weights, m, total, _ = weights_of(
                    s, unseen, none, scale, (blocks - 1) * BLOCK_N, last_seen, True, SCORES
                )
                # As in `walk`: it keeps the wait for the product behind the powers.
                mbarrier.wait(key_full.index((end + 1) % STAGES), ((end + 1) // STAGES) & 1, pred=blocks > 1)
                acc, weights = warpgroup_mma_wait(0, deps=[acc_coming, weights])
                mbarrier.arrive(value_empty.index(last), count=1)
                p = gl.convert_layout(weights.to(DTYPE), LEFT)
            else:
                acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, values.index(last), acc, is_async=True)])
            _write(
                out_ptr, lse_ptr, acc, old_m, old_total, old_first, old_left, old_head, group, tokens, scale,
                HEADS, V, OUT, SCORES,
            )  # fmt: skip
            met = end


@gluon.jit
def _blank(
    out_ptr, lse_ptr, first, left, head, tokens, HEADS: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr
):
    """Zeros and -inf for a tile that sees no key, by a single warp."""
    ROWS: gl.constexpr = 256 // V
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [ROWS, V // 8], [1, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    dim = gl.arange(0, V, layout=gl.SliceLayout(0, layout))
    nothing = gl.zeros([ROWS, V], out_ptr.dtype.element_ty, layout=layout)
    for before in range(0, BLOCK_M, ROWS):
        row = before + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        at = ((first + row).to(gl.int64)[:, None] * HEADS + head) * V + dim[None, :]
        gl.store(out_ptr + at, nothing, mask=(row < left)[:, None])
    for before in range(0, BLOCK_M, 32):
        row = before + gl.arange(0, 32, layout=flat)
        blind = gl.full([32], float("-inf"), gl.float32, layout=flat)
        gl.store(lse_ptr + head.to(gl.int64) * tokens + first + row, blind, mask=row < left)


@gluon.jit
def _place_of(
    number, tiles_ptr, tiles, HEADS: gl.constexpr, TOGETHER: gl.constexpr, CAUSAL: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    """Head, ordinal of the tile and sequence of a number; see `gluon_tiles.place` and its grid."""
    PARTS: gl.constexpr = HEADS // TOGETHER
    tile, part = number // TOGETHER % tiles, number // TOGETHER // tiles
    if LISTED:
        at = tiles_ptr + 2 * tile
        sequence, tile = gl.load(at), gl.load(at + 1)
    else:
        sequence, part = part // PARTS, part % PARTS
        if CAUSAL:  # tiles at the end of a sequence meet the most keys
            tile = tiles - 1 - tile
    return part * TOGETHER + number % TOGETHER, tile, sequence


@gluon.jit
def _wait_for_place(key_empty, met, STAGES: gl.constexpr):
    """Wait until both groups have left the facts and the queries of the tile before.

    They have when they have read the keys of its last block, `met - 1` of the ring.
    """
    block = gl.maximum(met - 1, 0)
    mbarrier.wait(key_empty.index(block % STAGES), (block // STAGES) & 1, pred=met > 0)


@gluon.jit
def _tile_of(
    number, starts_q_ptr, starts_k_ptr, tiles_ptr, tiles, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    HEADS: gl.constexpr, TOGETHER: gl.constexpr, CAUSAL: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Facts of a number, and where the sequence's keys start; no rows are left where there is no tile."""
    head, tile, sequence = _place_of(number, tiles_ptr, tiles, HEADS, TOGETHER, CAUSAL, LISTED)
    start_q, end_q = bounds_of(starts_q_ptr, sequence, LISTED)
    start_k, end_k = bounds_of(starts_k_ptr, sequence, LISTED)
    first, left, keys = start_q + tile * BLOCK_M, end_q - start_q - tile * BLOCK_M, end_k - start_k
    seen, end, whole = keys - left, keys, keys // BLOCK_N
    if CAUSAL:
        end = gl.minimum(keys, gl.maximum(seen + BLOCK_M, 0))
        whole = gl.minimum(whole, gl.maximum(seen + 1, 0) // BLOCK_N)
    blocks = (end + BLOCK_N - 1) // BLOCK_N
    return blocks, gl.maximum(blocks - whole, 1), keys, first, left, head, seen, start_k


@gluon.jit
def _load_queries(
    descriptors, queries_1, queries_2, bar, first, head, strides,
    D_2: gl.constexpr, FIRST_2: gl.constexpr,
):  # fmt: skip
    """Load the queries of both groups."""
    q_1, q_2, _k_1, _k_2, _v = descriptors
    mbarrier.expect(bar, 2 * (q_1.block_type.nbytes + (q_2.block_type.nbytes if D_2 > 0 else 0)))
    for group in gl.static_range(2):
        at = first + 64 * group
        load(q_1, [at, head * strides[0]], bar, queries_1.index(group))
        if D_2 > 0:
            load(q_2, [at, head * strides[1] + FIRST_2], bar, queries_2.index(group))


@gluon.jit
def _load_blocks(
    descriptors, rings, bars, first, last, at, of_keys, strides,
    D_2: gl.constexpr, FIRST_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load blocks `first .. last` of the ring, leftwards from a row, as places come free."""
    _q_1, _q_2, k_1, k_2, v = descriptors
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    for i in range(first, last):
        stage, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(key_empty.index(stage), phase ^ 1)
        bar = key_full.index(stage)
        mbarrier.expect(bar, k_1.block_type.nbytes + (k_2.block_type.nbytes if D_2 > 0 else 0))
        load(k_1, [at, of_keys * strides[2]], bar, keys_1.index(stage))
        if D_2 > 0:
            load(k_2, [at, of_keys * strides[3] + FIRST_2], bar, keys_2.index(stage))
        mbarrier.wait(value_empty.index(stage), phase ^ 1)
        mbarrier.expect(value_full.index(stage), v.block_type.nbytes)
        load(v, [at, of_keys * strides[4]], value_full.index(stage), values.index(stage))
        at -= BLOCK_N


@gluon.jit
def _produce_tiles(
    descriptors, queries_1, queries_2, rings, bars, query_full, facts, out_ptr, lse_ptr,
    starts_q_ptr, starts_k_ptr, tiles_ptr, counter_ptr, strides, tokens, tiles, total,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, APART: gl.constexpr, TOGETHER: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Take tiles, tell the groups of each, and load what it needs.

    The next tile is looked for before a tile's last block, while the groups have two blocks left.
    """
    FIRST_2: gl.constexpr = 0 if APART else D_1
    _key_full, key_empty, _value_full, _value_empty = bars
    met = 0
    number = gl.program_id(0)
    blocks, cut, keys, first, left, head, seen, start_k = _tile_of(
        number, starts_q_ptr, starts_k_ptr, tiles_ptr, tiles, BLOCK_M, BLOCK_N,
        HEADS, TOGETHER, CAUSAL, LISTED,
    )  # fmt: skip
    while number < total:
        loaded = gl.where(left > 0, blocks, 0)
        last_row, of_keys = start_k, head // GROUPS
        if loaded > 0:
            _wait_for_place(key_empty, met, STAGES)
            write_number(facts, 0, blocks)
            write_number(facts, 1, cut)
            write_number(facts, 2, keys)
            write_number(facts, 3, first)
            write_number(facts, 4, left)
            write_number(facts, 5, head)
            write_number(facts, 6, seen)
            mbarrier.arrive(query_full, count=1)
            _load_queries(descriptors, queries_1, queries_2, query_full, first, head, strides, D_2, FIRST_2)
            _load_blocks(
                descriptors, rings, bars, met, met + loaded - 1, start_k + (loaded - 1) * BLOCK_N, of_keys,
                strides, D_2, FIRST_2, BLOCK_N, STAGES,
            )  # fmt: skip
        elif left > 0:
            _blank(out_ptr, lse_ptr, first, left, head, tokens, HEADS, V, BLOCK_M)
        number = total
        if total > gl.num_programs(0):
            number = gl.num_programs(0) + answered(asked(counter_ptr))
        blocks, cut, keys, first, left, head, seen, start_k = _tile_of(
            gl.minimum(number, total - 1), starts_q_ptr, starts_k_ptr, tiles_ptr, tiles, BLOCK_M, BLOCK_N,
            HEADS, TOGETHER, CAUSAL, LISTED,
        )  # fmt: skip
        _load_blocks(
            descriptors, rings, bars, met + gl.maximum(loaded - 1, 0), met + loaded, last_row, of_keys,
            strides, D_2, FIRST_2, BLOCK_N, STAGES,
        )  # fmt: skip
        met += loaded
    _wait_for_place(key_empty, met, STAGES)
    write_number(facts, 0, 0)
    mbarrier.arrive(query_full, count=2)


@remembered
@gluon.jit(do_not_specialize=["tokens", "tiles", "total"])
def attention_forward(
    q_1, q_2, k_1, k_2, v, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr, tiles_ptr, counter_ptr,
    q_stride, q_stride_2, k_stride, k_stride_2, v_stride, tokens, tiles, total, scale,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, APART: gl.constexpr, TOGETHER: gl.constexpr, LISTED: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All `total` tiles, `tiles` of them in a column of `grid_of`.

    The counter is at 0; nobody asks it where each tile has a program. The descriptors see heads side by side
    in a row.
    APART: the last dims of queries and keys are tensors of their own, and those of keys may be all heads'.
    """
    queries_1 = gl.allocate_shared_memory(q_1.dtype, [2, 64, D_1], q_1.layout)
    keys_1 = gl.allocate_shared_memory(k_1.dtype, [STAGES, BLOCK_N, D_1], k_1.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, V], v.layout)
    queries_2, keys_2 = queries_1, keys_1
    if D_2 > 0:
        queries_2 = gl.allocate_shared_memory(q_2.dtype, [2, 64, D_2], q_2.layout)
        keys_2 = gl.allocate_shared_memory(k_2.dtype, [STAGES, BLOCK_N, D_2], k_2.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    facts = gl.allocate_shared_memory(gl.int32, [FACTS, 1], plain)
    query_full = new_bars(1, 2).index(0)
    bars = (new_bars(STAGES, 1), new_bars(STAGES, 2), new_bars(STAGES, 1), new_bars(STAGES, 2))
    fence_async_shared()
    rings = (keys_1, keys_2, values)
    gl.warp_specialize([
        (_consume_tiles, (
            0, queries_1, queries_2, rings, bars, query_full, facts, out_ptr, lse_ptr, tokens, scale * LOG2E,
            HEADS, D_2, V, BLOCK_N, STAGES, CAUSAL,
        )),
        (_consume_tiles, (
            1, queries_1, queries_2, rings, bars, query_full, facts, out_ptr, lse_ptr, tokens, scale * LOG2E,
            HEADS, D_2, V, BLOCK_N, STAGES, CAUSAL,
        )),
        (_produce_tiles, (
            (q_1, q_2, k_1, k_2, v), queries_1, queries_2, rings, bars, query_full, facts, out_ptr, lse_ptr,
            starts_q_ptr, starts_k_ptr, tiles_ptr, counter_ptr,
            (q_stride, q_stride_2, k_stride, k_stride_2, v_stride), tokens, tiles, total,
            HEADS, GROUPS, D_1, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL, APART, TOGETHER,
            LISTED,
        )),
    ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
