"""The gate and the movement of rows: published rules, properties, round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ShapeError
from benthic.kernels import ops


def gate(logits, bias=None, **changes):
    rules = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "top_k": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    return ops.route(logits, bias, **(rules | changes))


def logits(tokens=63, experts=32, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def slow_gate(row, bias, *, groups, kept, top_k, best):
    """The rule of the report, one token at a time, in plain Python."""
    scores = [1 / (1 + 2.718281828459045 ** -float(x)) for x in row]
    biased = [score + float(b) for score, b in zip(scores, bias, strict=True)]
    size = len(biased) // groups
    strength = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:best]) for g in range(groups)]
    open_groups = sorted(range(groups), key=lambda g: -strength[g])[:kept]
    allowed = [e for e in range(len(biased)) if e // size in open_groups]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
    total = sum(scores[e] for e in chosen)
    return chosen, [scores[e] / total * 2.5 for e in chosen]


@pytest.mark.parametrize(("method", "best"), [("noaux_tc", 2), ("group_limited_greedy", 1)])
def test_the_gate_follows_the_rule_of_the_report(method, best):
    bias = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.1
    routing = gate(logits(), bias, topk_method=method)
    for token, row in enumerate(logits()):
        chosen, weights = slow_gate(row, bias, groups=4, kept=2, top_k=4, best=best)
        assert routing.expert_TK[token].tolist() == chosen
        assert routing.weight_TK[token].tolist() == pytest.approx(weights, rel=1e-5)
    assert routing.expert_TK.dtype == torch.int32


def test_a_bias_steers_the_choice_but_not_the_weights():
    bias = torch.zeros(32)
    bias[5] = 10.0
    routing = gate(logits(), bias, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    assert (routing.expert_TK[:, 0] == 5).all()
    torch.testing.assert_close(routing.weight_TK[:, 0], torch.sigmoid(logits()[:, 5]))


def test_a_masked_expert_never_wins_even_when_all_biased_scores_are_negative():
    routing = gate(logits(), torch.full((32,), -5.0))
    groups = routing.expert_TK // 8
    assert (groups.max(dim=1).values - groups.min(dim=1).values <= 3).all()
    assert all(len(set(row.tolist())) <= 2 for row in groups)


def test_softmax_greedy_is_the_gate_of_version_2():
    routing = gate(
        logits(),
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    )
    best = torch.softmax(logits(), dim=-1).topk(4)
    assert torch.equal(routing.expert_TK.long(), best.indices)
    torch.testing.assert_close(routing.weight_TK, best.values * 16)


def test_normalised_weights_sum_to_the_scaling_factor():
    torch.testing.assert_close(gate(logits()).weight_TK.sum(dim=1), torch.full((63,), 2.5))


def test_gradients_reach_the_logits_through_the_weights_alone():
    bias = torch.zeros(32, requires_grad=True)
    leaf = logits().double().requires_grad_()
    weight = gate(leaf, bias.double()).weight_TK
    (gradient,) = torch.autograd.grad(weight.square().sum(), leaf)
    chosen = torch.zeros(63, 32, dtype=torch.bool).scatter_(1, gate(leaf).expert_TK.long(), value=True)
    assert (gradient[chosen] != 0).all()
    assert (gradient[~chosen] == 0).all()
    assert torch.autograd.gradcheck(lambda x: gate(x).weight_TK, logits(3).double().requires_grad_())


def test_a_gate_whose_numbers_disagree_is_refused():
    with pytest.raises(ShapeError, match="top_k=17 exceeds the 16 experts of 2 groups"):
        gate(logits(), top_k=17)
    with pytest.raises(ShapeError, match="32 experts, n_group=5"):
        gate(logits(), n_group=5)
    with pytest.raises(ShapeError, match="float32"):
        gate(logits().bfloat16())


@st.composite
def routings(draw):
    tokens, experts = draw(st.integers(0, 20)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    rows = [draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int32).view(tokens, top_k), experts


@settings(max_examples=60, deadline=None)
@given(routings(), st.sampled_from(["torch", "reference"]))
def test_unpermute_undoes_permute(routing, impl):
    expert, experts = routing
    tokens, top_k = expert.shape
    x = torch.arange(tokens * 3, dtype=torch.float32).view(tokens, 3)
    permuted = ops.permute(x, expert, experts, impl=impl)
    weight = torch.full((tokens, top_k), 1 / top_k)
    torch.testing.assert_close(ops.unpermute(permuted.rows_RD, permuted.maps, weight, impl=impl), x)
    owners = expert.flatten()[permuted.maps.copy_R]
    assert torch.equal(owners, owners.sort().values)
    assert torch.equal(permuted.maps.copy_R[permuted.maps.row_TK.flatten()], torch.arange(tokens * top_k))
    counts = torch.bincount(expert.flatten(), minlength=experts)
    assert torch.equal(permuted.ends_E, counts.cumsum(0).to(torch.int32))


@pytest.mark.parametrize("op", ["permute", "unpermute"])
def test_moving_rows_has_the_gradients_of_the_definition(op):
    expert = gate(logits()).expert_TK
    results = []
    for impl, dtype in (("torch", torch.float32), ("reference", torch.float64)):
        x = logits(63, 12, seed=2).to(dtype).requires_grad_()
        weight = logits(63, 4, seed=3).to(dtype).requires_grad_()
        permuted = ops.permute(x, expert, 32, impl=impl)
        if op == "permute":
            leaves, out = [x], permuted.rows_RD
        else:
            leaves, out = [x, weight], ops.unpermute(permuted.rows_RD.sin(), permuted.maps, weight, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)
