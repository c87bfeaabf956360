# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Flash attention forward for Hopper in Gluon: one warp loads, two warp groups of 64 queries each multiply.

A program holds 128 queries of one head and one sequence. Its loading warp brings blocks of 128 keys and
values by TMA into a ring of shared memory. Each of the other groups walks over the blocks from the right,
where the causal diagonal is, and keeps its tensor cores busy while it computes powers (FlashAttention-3,
section 3.2):

    S_i = Q K_i^T  and  O += P_(i-1) V_(i-1)  run  while  P_i = 2^(S_i - m)  waits for the first of them alone

Where there are more tiles than multiprocessors, programs take tile after tile (`gluon_attention_persistent`).
Weights P stay in registers, as the left operand of the second product. A head of 192 dims is two products,
128 + 64. The mathematics is that of `triton_attention`; the backward pass is `gluon_attention_backward`.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_attention_backward import gradients
from benthic.kernels.gluon_attention_blocks import clear_foreign_values, scores_of, walk, weights_of
from benthic.kernels.gluon_attention_persistent import forward_in_turn
from benthic.kernels.gluon_tiles import (
    LOG2E,
    bounds_of,
    load,
    loadable,
    new_bars,
    place,
    rows_of,
    store,
)
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_attention_backward import keep, split_width
from benthic.kernels.triton_pack_tiles import grid_of
from benthic.kernels.triton_tiles import multiprocessors

QUERIES = 128
KEYS = 128
STAGES = 2
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


@gluon.jit
def _consume(
    group, queries, rings, bars, query_bars, out_ptr, lse_ptr,
    start_q, rows, keys, tile, head, tokens, scale, offset, blocks, first_masked,
    HEADS: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The 64 queries of a group: scores, weights, output and log-sum-exp."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    q_1, q_2 = queries
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, _value_empty = bars
    row = tile * BLOCK_M + group * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    last_seen = gl.minimum(row + offset, keys - 1) if CAUSAL else row * 0 + (keys - 1)
    m = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, V], gl.float32, layout=OUT)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    mbarrier.wait(query_bars.index(group), 0)
    mbarrier.wait(key_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[scores_of(q_1, q_2, keys_1, keys_2, 0, zero, D_2)])
    mbarrier.arrive(key_empty.index(0), count=1)
    block = (blocks - 1) * BLOCK_N
    weights, m, total, _ = weights_of(s, m, total, scale, block, last_seen, True, SCORES)
    p = gl.convert_layout(weights.to(out_ptr.dtype.element_ty), LEFT)
    if block + BLOCK_N > keys:
        mbarrier.wait(value_full.index(0), 0)
        clear_foreign_values(values.index(0), keys, block, BLOCK_N, V)
    mbarrier.wait(key_full.index(1 % STAGES), (1 // STAGES) & 1, pred=blocks > 1)
    masked = gl.maximum(blocks - first_masked, 1)
    acc, m, total, p = walk(
        acc, m, total, p, 1, masked, blocks, queries, rings, bars, zero, last_seen, scale,
        D_2, BLOCK_N, STAGES, True, SCORES, OUT, LEFT,
    )  # fmt: skip
    acc, m, total, p = walk(
        acc, m, total, p, masked, blocks, blocks, queries, rings, bars, zero, last_seen, scale,
        D_2, BLOCK_N, STAGES, False, SCORES, OUT, LEFT,
    )  # fmt: skip
    last = (blocks - 1) % STAGES
    mbarrier.wait(value_full.index(last), ((blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, values.index(last), acc, is_async=True)])
    safe = gl.where(total == 0.0, 1.0, total)
    out = acc / gl.convert_layout(safe, gl.SliceLayout(1, OUT))[:, None]
    lse = gl.where(total == 0.0, float("-inf"), (m * scale + gl.log2(safe)) / LOG2E)
    gl.store(lse_ptr + head.to(gl.int64) * tokens + start_q + row, lse, mask=row < rows)
    store(out_ptr, out, q_1, start_q, tile * BLOCK_M + group * 64, rows, head, 0, 1.0, HEADS, V)


@gluon.jit
def _produce(
    descriptors, queries_1, queries_2, rings, bars, query_bars, first_query, start_k, columns, blocks,
    D_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries of both groups, then blocks of keys and values from the right as places come free."""
    q_1, q_2, k_1, k_2, v = descriptors
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    q_column, q_column_2, k_column, k_column_2, v_column = columns
    for group in gl.static_range(2):
        bar, at = query_bars.index(group), first_query + 64 * group
        mbarrier.expect(bar, q_1.block_type.nbytes + (q_2.block_type.nbytes if D_2 > 0 else 0))
        load(q_1, [at, q_column], bar, queries_1.index(group))
        if D_2 > 0:
            load(q_2, [at, q_column_2], bar, queries_2.index(group))
    for i in range(blocks):
        stage, phase, at = i % STAGES, (i // STAGES) & 1, start_k + (blocks - 1 - i) * BLOCK_N
        mbarrier.wait(key_empty.index(stage), phase ^ 1)
        bar = key_full.index(stage)
        mbarrier.expect(bar, k_1.block_type.nbytes + (k_2.block_type.nbytes if D_2 > 0 else 0))
        load(k_1, [at, k_column], bar, keys_1.index(stage))
        if D_2 > 0:
            load(k_2, [at, k_column_2], bar, keys_2.index(stage))
        mbarrier.wait(value_empty.index(stage), phase ^ 1)
        mbarrier.expect(value_full.index(stage), v.block_type.nbytes)
        load(v, [at, v_column], value_full.index(stage), values.index(stage))


@gluon.jit
def _nothing_seen(
    out_ptr, lse_ptr, start_q, rows, tile, head, tokens,
    HEADS: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Zeros and -inf for queries that see no key."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // V, V // 8], [4, 1], [1, 0])
    row = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    value = gl.arange(0, V, layout=gl.SliceLayout(0, layout))
    at = ((start_q + row).to(gl.int64)[:, None] * HEADS + head) * V + value[None, :]
    nothing = gl.zeros([BLOCK_M, V], out_ptr.dtype.element_ty, layout=layout)
    gl.store(out_ptr + at, nothing, mask=(row < rows)[:, None])
    blind = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, layout))
    gl.store(lse_ptr + head.to(gl.int64) * tokens + start_q + row, blind, mask=row < rows)


@remembered
@gluon.jit(do_not_specialize=["tokens"])
def _forward(
    q_1, q_2, k_1, k_2, v, out_ptr, lse_ptr, starts_q_ptr, starts_k_ptr, tiles_ptr,
    q_stride, q_stride_2, k_stride, k_stride_2, v_stride, tokens, scale,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, D_1: gl.constexpr, D_2: gl.constexpr, V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    APART: gl.constexpr, TOGETHER: gl.constexpr, LISTED: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and sequence; the descriptors see heads side by side in a row.

    APART: the last dims of queries and keys are tensors of their own, and those of keys may be all heads'.
    """
    head, tile, sequence = place(tiles_ptr, HEADS, TOGETHER, LISTED)
    start_q, end_q = bounds_of(starts_q_ptr, sequence, LISTED)
    start_k, end_k = bounds_of(starts_k_ptr, sequence, LISTED)
    queries_1 = gl.allocate_shared_memory(q_1.dtype, [2, 64, D_1], q_1.layout)
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
        of_keys, first_2 = head // GROUPS, 0 if APART else D_1
        columns = (
            head * q_stride, head * q_stride_2 + first_2,
            of_keys * k_stride, of_keys * k_stride_2 + first_2, of_keys * v_stride,
        )  # fmt: skip
        gl.warp_specialize([
            (_consume, (
                0, (queries_1.index(0), queries_2.index(0)), rings, bars, query_bars, out_ptr, lse_ptr,
                start_q, rows, keys, tile, head, tokens, scale * LOG2E, offset, blocks, first_masked,
                HEADS, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
            )),
            (_consume, (
                1, (queries_1.index(1), queries_2.index(1)), rings, bars, query_bars, out_ptr, lse_ptr,
                start_q, rows, keys, tile, head, tokens, scale * LOG2E, offset, blocks, first_masked,
                HEADS, D_2, V, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
            )),
            (_produce, (
                (q_1, q_2, k_1, k_2, v), queries_1, queries_2, rings, bars, query_bars,
                start_q + tile * BLOCK_M, start_k, columns, blocks, D_2, BLOCK_N, STAGES,
            )),
        ], [4, 1], [REGISTERS, FEW_REGISTERS])  # fmt: skip
    elif tile * BLOCK_M < rows:
        _nothing_seen(out_ptr, lse_ptr, start_q, rows, tile, head, tokens, HEADS, V, BLOCK_M)


def attention(
    q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, scale, causal, lists
):
    """See `benthic.kernels.ops.attention`; returns `(out_THv, lse_TH)`."""
    return _Attention.apply(
        q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, lists
    )


def attention_of_parts(
    q_nope_THn, q_rope_THr, k_nope_THn, k_rope_Tr, v_THv, cu_seqlens_q, cu_seqlens_k,
    *, max_seqlen_q, max_seqlen_k, scale, lists,
):  # fmt: skip
    """See `benthic.kernels.ops.attention_of_parts`."""
    del max_seqlen_k  # the grid is of queries
    queries = loadable(q_nope_THn), loadable(q_rope_THr)
    keys = loadable(k_nope_THn), loadable(k_rope_Tr.unsqueeze(1)).expand(-1, k_nope_THn.shape[1], -1)
    widths, starts = (q_nope_THn.shape[-1], q_rope_THr.shape[-1]), (cu_seqlens_q, cu_seqlens_k)
    return _attended(
        queries, keys, loadable(v_THv), starts, widths, max_seqlen_q, scale, lists, causal=True, apart=True
    )[0]


def _attended(queries, keys, v_THv, starts, widths, max_q, scale, lists, *, causal, apart):
    """Output and log-sum-exp [H, T]; `queries` and `keys` are two tensors `apart`, or one twice."""
    (q_1, q_2), (k_1, k_2), (d_1, d_2) = queries, keys, widths
    (tokens, heads, _), value = q_1.shape, v_THv.shape[-1]
    out_THv = torch.empty(tokens, heads, value, dtype=q_1.dtype, device=q_1.device)
    lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_1.device)
    if k_1.shape[0] == 0:  # a descriptor wants something to describe
        out_THv.zero_()
        lse_HT.fill_(-torch.inf)
    elif tokens and max_q:
        grid, (tiles, together, is_list) = grid_of(
            starts[0], tokens, max_q, QUERIES, heads, last_first=causal, lists=lists
        )
        described = (
            rows_of(q_1, 64, d_1), rows_of(q_2, 64, d_2 or d_1), rows_of(k_1, KEYS, d_1),
            rows_of(k_2, KEYS, d_2 or d_1), rows_of(v_THv, KEYS, value), out_THv, lse_HT, *starts, tiles,
        )  # fmt: skip
        strides = (q_1.stride(1), q_2.stride(1), k_1.stride(1), k_2.stride(1), v_THv.stride(1))
        constants = {
            "HEADS": heads, "GROUPS": heads // k_1.shape[1], "D_1": d_1, "D_2": d_2, "V": value,
            "BLOCK_M": QUERIES, "BLOCK_N": KEYS, "STAGES": STAGES, "CAUSAL": causal, "APART": apart,
            "TOGETHER": together, "LISTED": is_list, "REGISTERS": CONSUMER_REGISTERS,
            "FEW_REGISTERS": PRODUCER_REGISTERS, "num_warps": 4, "maxnreg": ENTRY_REGISTERS,
        }  # fmt: skip
        total, programs = math.prod(grid), multiprocessors(q_1.device)
        if total > programs:
            counter = torch.zeros(1, dtype=torch.int32, device=q_1.device)
            forward_in_turn[(programs,)](
                *described, counter, *strides, tokens, grid[1], total, scale, **constants
            )
        else:
            _forward[grid](*described, *strides, tokens, scale, **constants)
    return out_THv, lse_HT


class _Attention(torch.autograd.Function):
    """Attention that keeps only its output and the log-sum-exp of each row; scores are computed again."""

    @staticmethod
    def forward(ctx, q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, causal, lists):
        """Save the operands, the output and the log-sum-exp."""
        q_THd, k_THd, v_THv = (loadable(x) for x in (q_THd, k_THd, v_THv))
        starts = cu_seqlens_q, cu_seqlens_k
        out_THv, lse_HT = _attended(
            (q_THd, q_THd), (k_THd, k_THd), v_THv, starts, split_width(q_THd.shape[-1]), max_q, scale, lists,
            causal=causal, apart=False,
        )  # fmt: skip
        return keep(
            ctx,
            (q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k),
            (max_q, max_k, scale, causal, lists),
        )

    @staticmethod
    def backward(ctx, dout_THv, _dlse):
        """Gradients of queries, keys and values."""
        return gradients(ctx, dout_THv)
