"""Triton kernels that watch over how evenly experts are loaded.

The loss of every sequence is summed in a fixed order: tile by tile of its tokens, then over the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered

_ELEMENTS = 2048


@remembered
@triton.jit
def _loads(
    scores_ptr, part_ptr, tokens, experts, tiles,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one tile of a sequence: how often each expert is among the highest, and the sum of its shares."""
    sequence, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, e = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    here = (t < tokens)[:, None] & (e < experts)[None, :]
    at = (sequence * tokens + t)[:, None] * experts + e[None, :]
    score = tl.load(scores_ptr + at, mask=here, other=0.0)
    share = tl.where(here, score / tl.sum(score, axis=1)[:, None], 0.0)
    left, count = tl.where(here, score, float("-inf")), tl.zeros([TOKENS, WIDTH], tl.float32)
    for _ in tl.static_range(TOP_K):
        highest = left == tl.max(left, axis=1)[:, None]
        taken = e[None, :] == tl.min(tl.where(highest, e[None, :], WIDTH), axis=1)[:, None]
        count += tl.where(taken & here, 1.0, 0.0)
        left = tl.where(taken, float("-inf"), left)
    at = part_ptr + (sequence * tiles + tile) * 2 * experts + e
    tl.store(at, tl.sum(count, axis=0), mask=e < experts)
    tl.store(at + experts, tl.sum(share, axis=0), mask=e < experts)


@remembered
@triton.jit
def _sequence_loads(
    part_ptr, loads_ptr, sequences, experts, tiles, scale, whole, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of one sequence: f (counts times `scale`) and P (shares over `whole` tokens)."""
    sequence, e = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    count, share = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for first in range(0, tiles, ROWS):
        tile = first + tl.arange(0, ROWS)
        here = (tile < tiles)[:, None] & (e < experts)[None, :]
        at = part_ptr + (sequence * tiles + tile)[:, None] * 2 * experts + e[None, :]
        count += tl.sum(tl.load(at, mask=here, other=0.0), axis=0)
        share += tl.sum(tl.load(at + experts, mask=here, other=0.0), axis=0)
    at = loads_ptr + sequence * experts + e
    tl.store(at, count * scale, mask=e < experts)
    tl.store(at + sequences * experts, share / whole, mask=e < experts)


@remembered
@triton.jit
def _loss(loads_ptr, weighted_ptr, found_ptr, count, factor, BLOCK: tl.constexpr):
    """`sum f P` of all sequences."""
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        f = tl.load(loads_ptr + at, mask=at < count, other=0.0)
        acc += f * tl.load(loads_ptr + count + at, mask=at < count, other=0.0)
    loss = tl.sum(acc, axis=0)
    tl.store(found_ptr, loss)
    tl.store(weighted_ptr, loss * factor)


@remembered
@triton.jit
def _balance_backward(
    scores_ptr, loads_ptr, dloss_ptr, dscores_ptr, rows, tokens, experts, factor, whole,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`ds_j = dloss (f_j - sum_e f_e s_e / S) / (S tokens)` with S the sum of a token's scores."""
    t, e = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64), tl.arange(0, WIDTH)
    here = (t < rows)[:, None] & (e < experts)[None, :]
    at = t[:, None] * experts + e[None, :]
    score = tl.load(scores_ptr + at, mask=here, other=0.0)
    f = tl.load(loads_ptr + (t // tokens)[:, None] * experts + e[None, :], mask=here, other=0.0)
    total = tl.where(t < rows, tl.sum(score, axis=1), 1.0)[:, None]
    mean = tl.sum(f * score, axis=1)[:, None] / total
    slope = tl.load(dloss_ptr) * factor / whole
    tl.store(dscores_ptr + at, slope * (f - mean) / total, mask=here)


@remembered
@triton.jit(do_not_specialize=["copies"])
def _count(expert_ptr, count_ptr, copies, BLOCK: tl.constexpr):
    """`count_e += ` the copies of expert e, one program an expert."""
    expert = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, copies, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += (tl.load(expert_ptr + at, mask=at < copies, other=-1) == expert).to(tl.int32)
    total = tl.load(count_ptr + expert) + tl.sum(found, axis=0).to(tl.int64)
    tl.store(count_ptr + expert, total)


def balance_loss(scores_TE, *, top_k, rows, factor, mean):
    """See `benthic.kernels.ops.balance_loss`; of equal scores the first counts."""
    return _Balance.apply(scores_TE.contiguous(), top_k, rows, factor, mean)


def count_experts(count_E, expert_TK):
    """See `benthic.kernels.ops.count_experts`."""
    copies = expert_TK.numel()
    block = min(max(next_power_of_2(copies), 16), 4096)
    _count[(count_E.numel(),)](
        expert_TK.contiguous(), count_E, copies, BLOCK=block, num_warps=min(8, max(1, block // 256))
    )


class _Balance(torch.autograd.Function):
    """The loss times a factor, and as it is; its gradient flows through the shares."""

    @staticmethod
    def forward(ctx, scores_TE, top_k, rows, factor, mean):
        """Save the scores and how often each expert was among the highest."""
        device, (total, experts) = scores_TE.device, scores_TE.shape
        tokens, (height, width) = total // rows, _tile(experts)
        tiles = cdiv(tokens, height)
        part = torch.empty(rows, tiles, 2, experts, dtype=torch.float32, device=device)
        loads = torch.empty(2, rows, experts, dtype=torch.float32, device=device)
        weighted = torch.empty((), dtype=torch.float32, device=device)
        found = torch.empty((), dtype=torch.float32, device=device)
        _loads[(rows, tiles)](
            scores_TE, part, tokens, experts, tiles, TOP_K=top_k, TOKENS=height, WIDTH=width, num_warps=4
        )
        _sequence_loads[(rows,)](
            part, loads, rows, experts, tiles, experts / (tokens * top_k), float(tokens),
            ROWS=height, WIDTH=width, num_warps=4,
        )  # fmt: skip
        if mean is not None:
            loads[0].copy_(mean(loads[0]))
        _loss[(1,)](loads, weighted, found, rows * experts, factor, BLOCK=1024, num_warps=4)
        ctx.save_for_backward(scores_TE, loads)
        ctx.tokens, ctx.factor = tokens, factor
        ctx.mark_non_differentiable(found)
        ctx.set_materialize_grads(False)
        return weighted, found

    @staticmethod
    def backward(ctx, dweighted, _):
        """Of the scores."""
        if dweighted is None:
            return (None,) * 5
        scores_TE, loads = ctx.saved_tensors
        rows, experts = scores_TE.shape
        height, width = _tile(experts)
        dscores_TE = torch.empty(rows, experts, dtype=torch.float32, device=scores_TE.device)
        _balance_backward[(cdiv(rows, height),)](
            scores_TE, loads, dweighted, dscores_TE, rows, ctx.tokens, experts, ctx.factor,
            float(ctx.tokens), TOKENS=height, WIDTH=width, num_warps=4,
        )  # fmt: skip
        return dscores_TE, None, None, None, None


def _tile(experts):
    """Tokens and padded experts of a program."""
    width = next_power_of_2(experts)
    return max(1, _ELEMENTS // width), width
