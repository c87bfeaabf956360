# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""A Triton kernel that chooses experts: scores, groups, the best ones and their weights in one pass.

Plain torch takes a dozen kernels, which for the few rows of a decode step take longer than their work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.reference.moe import Routing
from benthic.kernels.relaunch import remembered

LOWEST = tl.constexpr(-3.0e38)
"""What an expert outside the chosen groups scores: below every score, above one that is taken."""


@triton.jit
def _best(value, index, WIDTH: tl.constexpr):
    """The first place of the greatest value."""
    return tl.min(tl.where(value == tl.max(value, axis=0), index, WIDTH), axis=0)


@triton.jit
def _kept_groups(
    choice, e, experts, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, WIDTH: tl.constexpr
):
    """Which experts belong to the `KEPT` groups with the greatest sum of `BEST` scores."""
    size = experts // GROUPS
    own = e // size
    group = tl.arange(0, triton.next_power_of_2(GROUPS))
    sums = tl.full([triton.next_power_of_2(GROUPS)], float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        inside = tl.where(own == g, choice, float("-inf"))
        total = tl.max(inside, axis=0)
        if BEST == 2:
            rest = tl.where(e == _best(inside, e, WIDTH), float("-inf"), inside)
            total += tl.where(size > 1, tl.max(rest, axis=0), 0.0)
        sums = tl.where(group == g, total, sums)
    kept = tl.zeros([WIDTH], tl.int1)
    for _ in tl.static_range(KEPT):
        winner = _best(sums, group, GROUPS)
        kept |= own == winner
        sums = tl.where(group == winner, float("-inf"), sums)
    return kept


@remembered
@triton.jit
def _route(
    logits_ptr, bias_ptr, scores_ptr, expert_ptr, weight_ptr,
    experts, stride, scale,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    TOP_K: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of one token, its `TOP_K` experts, best first, and their weights."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    here = e < experts
    logit = tl.load(logits_ptr + token * stride + e, mask=here, other=float("-inf"))
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        power = tl.exp(logit - tl.max(logit, axis=0))
        score = power / tl.sum(power, axis=0)
    tl.store(scores_ptr + token * experts + e, score, mask=here)
    choice = score
    if BIASED:
        choice += tl.load(bias_ptr + e, mask=here, other=0.0)
    choice = tl.where(choice != choice, float("inf"), choice)  # noqa: PLR0124 (a NaN, which counts as the greatest)
    choice = tl.where(here, choice, float("-inf"))
    if GROUPS > 1:
        kept = _kept_groups(choice, e, experts, GROUPS, KEPT, BEST, WIDTH)
        choice = tl.where(here & ~kept, LOWEST, choice)
    k = tl.arange(0, CHOSEN)
    chosen, weight = tl.zeros([CHOSEN], tl.int32), tl.zeros([CHOSEN], tl.float32)
    for place in tl.static_range(TOP_K):
        winner = _best(choice, e, WIDTH)
        chosen = tl.where(k == place, winner, chosen)
        weight = tl.where(k == place, tl.sum(tl.where(e == winner, score, 0.0), axis=0), weight)
        choice = tl.where(e == winner, float("-inf"), choice)
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    tl.store(expert_ptr + token * TOP_K + k, chosen, mask=k < TOP_K)
    tl.store(weight_ptr + token * TOP_K + k, weight * scale, mask=k < TOP_K)


@remembered
@triton.jit
def _route_backward(
    scores_ptr, expert_ptr, dscores_ptr, dweight_ptr, dlogits_ptr, experts, scale,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, SCORES: tl.constexpr, WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of one token's logits, through its scores and through the weights of its choice."""
    token = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, WIDTH), tl.arange(0, CHOSEN)
    here = e < experts
    score = tl.load(scores_ptr + token * experts + e, mask=here, other=0.0)
    dscore = tl.zeros([WIDTH], tl.float32)
    if SCORES:
        dscore += tl.load(dscores_ptr + token * experts + e, mask=here, other=0.0)
    if WEIGHTS:
        chosen = tl.load(expert_ptr + token * TOP_K + k, mask=k < TOP_K, other=-1)
        dweight = scale * tl.load(dweight_ptr + token * TOP_K + k, mask=k < TOP_K, other=0.0)
        own = chosen[:, None] == e[None, :]
        if NORMALISE:
            weight = tl.sum(tl.where(own, score[None, :], 0.0), axis=1)
            total = tl.sum(weight, axis=0) + 1e-20
            dweight = (dweight - tl.sum(dweight * weight, axis=0) / total) / total
        dscore += tl.sum(tl.where(own, dweight[:, None], 0.0), axis=0)
    if SIGMOID:  # noqa: SIM108 (Triton compiles one branch)
        dlogit = dscore * score * (1.0 - score)
    else:
        dlogit = score * (dscore - tl.sum(dscore * score, axis=0))
    tl.store(dlogits_ptr + token * experts + e, dlogit, mask=here)


def differentiable_route(logits_TE, bias_E, **gate):
    """See `benthic.kernels.ops.route`."""
    return Routing(*_Route.apply(logits_TE, bias_E, gate))


def route(logits_TE, bias_E, **gate):
    """See `benthic.kernels.ops.route`; of equal scores the first wins. Computes no gradients."""
    return _routed(logits_TE, bias_E, **gate)


def _routed(
    logits_TE,
    bias_E,
    *,
    scoring_func,
    topk_method,
    top_k,
    n_group,
    topk_group,
    norm_topk_prob,
    routed_scaling_factor,
):
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    scores_TE = torch.empty(tokens, experts, dtype=torch.float32, device=logits_TE.device)
    expert_TK = torch.empty(tokens, top_k, dtype=torch.int32, device=logits_TE.device)
    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    grouped = n_group > 1 and topk_method != "greedy"
    if tokens:
        _route[(tokens,)](
            logits_TE, logits_TE if bias_E is None else bias_E, scores_TE, expert_TK, weight_TK,
            experts, logits_TE.stride(0), routed_scaling_factor,
            SIGMOID=scoring_func == "sigmoid", BIASED=bias_E is not None, NORMALISE=norm_topk_prob,
            GROUPS=n_group if grouped else 1, KEPT=topk_group, BEST=2 if topk_method == "noaux_tc" else 1,
            TOP_K=top_k, CHOSEN=next_power_of_2(top_k), WIDTH=next_power_of_2(experts),
            num_warps=1 if experts <= 64 else 4, **early(logits_TE.device, tokens),
        )  # fmt: skip
    return Routing(scores_TE, expert_TK, weight_TK)


class _Route(torch.autograd.Function):
    """Scores, choice and weights; gradients of scores and weights reach the logits in one pass."""

    @staticmethod
    def forward(ctx, logits_TE, bias_E, gate):
        """Save scores and choice."""
        routing = _routed(logits_TE, bias_E, **gate)
        ctx.save_for_backward(routing.scores_TE, routing.expert_TK)
        ctx.gate = gate
        ctx.mark_non_differentiable(routing.expert_TK)
        ctx.set_materialize_grads(False)
        return tuple(routing)

    @staticmethod
    def backward(ctx, dscores_TE, _, dweight_TK):
        """Of the logits."""
        scores_TE, expert_TK = ctx.saved_tensors
        (tokens, experts), top_k, gate = scores_TE.shape, expert_TK.shape[1], ctx.gate
        dlogits_TE = torch.empty(tokens, experts, dtype=torch.float32, device=scores_TE.device)
        given = [None if grad is None else grad.contiguous() for grad in (dscores_TE, dweight_TK)]
        if tokens:
            _route_backward[(tokens,)](
                scores_TE, expert_TK, *(scores_TE if grad is None else grad for grad in given), dlogits_TE,
                experts, gate["routed_scaling_factor"],
                SIGMOID=gate["scoring_func"] == "sigmoid", NORMALISE=gate["norm_topk_prob"],
                SCORES=given[0] is not None, WEIGHTS=given[1] is not None,
                TOP_K=top_k, CHOSEN=next_power_of_2(top_k), WIDTH=next_power_of_2(experts),
                num_warps=1 if experts <= 64 else 4,
            )  # fmt: skip
        return dlogits_TE, None, None
