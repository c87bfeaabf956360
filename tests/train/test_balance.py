from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import ShapeError
from benthic.kernels import ops
from benthic.train.balance import max_vio, update_bias


def literal_balance_loss(s_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """DeepSeek-V3 report eq. (17)-(20) for one sequence, sum by sum, without α."""
    tokens, experts = s_TE.shape
    total = torch.zeros(())
    for i in range(experts):
        f_i, p_i = 0.0, torch.zeros(())
        for t in range(tokens):
            chosen = sorted(range(experts), key=lambda j: s_TE[t, j].item(), reverse=True)[:top_k]
            f_i += (experts / (top_k * tokens)) * (i in chosen)
            p_i = p_i + s_TE[t, i] / s_TE[t].sum() / tokens
        total = total + f_i * p_i
    return total


@pytest.mark.parametrize(("rows", "tokens", "experts", "top_k"), [(1, 7, 5, 2), (3, 11, 8, 3), (2, 1, 4, 4)])
def test_balance_loss_and_its_gradient_are_those_of_the_report(
    rows: int, tokens: int, experts: int, top_k: int
) -> None:
    torch.manual_seed(0)
    scores = torch.sigmoid(torch.randn(rows * tokens, experts)).requires_grad_()
    weighted, loss = ops.balance_loss(scores, top_k=top_k, rows=rows, factor=0.5)
    (2.0 * weighted).backward()
    assert not loss.requires_grad
    ours = scores.grad
    again = scores.detach().requires_grad_()
    literal = sum(literal_balance_loss(row, top_k) for row in again.view(rows, tokens, experts))
    literal.backward()
    assert torch.allclose(loss, literal, atol=1e-6)
    assert torch.allclose(ours, again.grad, atol=1e-7)


def test_perfectly_balanced_sequence_has_loss_one() -> None:
    scores = torch.full((8, 8), 0.1) + 0.8 * torch.eye(8)
    assert ops.balance_loss(scores, top_k=1, rows=1)[1].item() == pytest.approx(1.0, abs=1e-6)


def test_collapsed_routing_costs_more() -> None:
    scores = torch.full((8, 8), 0.01)
    scores[:, 0] = 0.99
    assert ops.balance_loss(scores, top_k=1, rows=1)[1].item() > 7.0


def test_ragged_sequences_are_refused_with_both_numbers() -> None:
    with pytest.raises(ShapeError, match="7 tokens do not divide into 2 sequences"):
        ops.balance_loss(torch.rand(7, 4), top_k=2, rows=2)


@given(counts=st.lists(st.integers(0, 10**7), min_size=2, max_size=40), recentre=st.booleans())
def test_bias_update_is_that_of_the_report(counts: list[int], *, recentre: bool) -> None:
    mean = sum(counts) / len(counts)
    sign = [(c < mean) - (c > mean) for c in counts]
    shift = sum(sign) / len(sign) if recentre else 0.0
    bias = torch.linspace(-0.5, 0.5, len(counts))
    expected = bias + 0.001 * (torch.tensor(sign, dtype=torch.float32) - shift)
    update_bias(bias, torch.tensor(counts), speed=0.001, recentre=recentre)
    assert torch.allclose(bias, expected, atol=1e-8)


def test_expert_at_the_mean_stays_even_when_counts_exceed_float_precision() -> None:
    big = 2**40
    bias = torch.zeros(3)
    update_bias(bias, torch.tensor([big, big - 1, big + 1]), speed=0.001, recentre=False)
    assert torch.equal(bias, torch.tensor([0.0, 0.001, -0.001]))


def test_counts_and_violation() -> None:
    counts = torch.zeros(4, dtype=torch.int64)
    ops.count_experts(counts, torch.tensor([[0, 1], [0, 2], [0, 1]], dtype=torch.int32))
    assert counts.tolist() == [3, 2, 1, 0]
    assert max_vio(counts) == pytest.approx(1.0)
    assert max_vio(torch.tensor([5, 5])) == 0.0
    assert max_vio(torch.zeros(4, dtype=torch.int64)) == 0.0
