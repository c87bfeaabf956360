# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Blocks of keys that 64 queries meet in attention's forward pass: scores, weights, sums of values."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benthic.kernels.gluon_tiles import among_columns, meet


@gluon.jit
def weights_of(
    s, m, total, scale, first, last_seen,
    MASKED: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Powers of a block of scores, the new greatest score and sum of powers, and what old sums are worth.

    `first` is the block's first key and `last_seen` the last key that each query sees. A row that has seen no
    key keeps m = -inf; 0 is subtracted there, so that its weights are 2^-inf = 0.
    """
    if MASKED:
        s = among_columns(s, last_seen - first, float("-inf"), SCORES, False)
    m_new = gl.maximum(m, gl.max(s, axis=1))
    shift = m_new * scale
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, shift)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m * scale - shift)
    return p, m_new, total * alpha + gl.sum(p, axis=1), alpha


@gluon.jit
def scores_of(q_1, q_2, keys_1, keys_2, stage, zero, D_2: gl.constexpr):
    """Start the product of the group's queries and the block of keys in a stage of the ring."""
    s = warpgroup_mma(q_1, keys_1.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D_2 > 0:
        s = warpgroup_mma(q_2, keys_2.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def walk(
    acc, m, total, p, first, last, blocks, queries, rings, bars, zero, last_seen, scale,
    D_2: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    SCORES: gl.constexpr, OUT: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Meet blocks `first .. last` from the right, each of which has its keys in the ring already.

    Blocks are counted as the ring counts them; those of the tile end before `blocks`.
    """
    q_1, q_2 = queries
    keys_1, keys_2, values = rings
    key_full, key_empty, value_full, value_empty = bars
    for i in range(first, last):
        stage, before = i % STAGES, (i - 1) % STAGES
        s_coming = scores_of(q_1, q_2, keys_1, keys_2, stage, zero, D_2)
        mbarrier.wait(value_full.index(before), ((i - 1) // STAGES) & 1)
        acc_coming = warpgroup_mma(p, values.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_coming])
        mbarrier.arrive(key_empty.index(stage), count=1)
        block = (blocks - 1 - i) * BLOCK_N
        weights, m, total, alpha = weights_of(s, m, total, scale, block, last_seen, MASKED, SCORES)
        # Between the powers and the wait for the product, or the assembler puts the wait first.
        mbarrier.wait(key_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < blocks)
        acc, weights = warpgroup_mma_wait(0, deps=[acc_coming, weights])
        mbarrier.arrive(value_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(weights.to(p.dtype), LEFT)
    return acc, m, total, p


@gluon.jit
def clear_foreign_values(values, keys, first, BLOCK_N: gl.constexpr, V: gl.constexpr):
    """Zero what the block of values holds of the next sequence: its weights are 0, but 0 times NaN is not.

    Both groups do so, and write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // V, V // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    value = values.load(layout)
    values.store(gl.where((row < keys)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    meet()
