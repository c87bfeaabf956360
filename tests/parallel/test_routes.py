from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.parallel.exchange_routes import arrivals, choice, departures


@st.composite
def chosen_experts(draw):
    ranks, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(4, ranks * per_rank)))
    token = st.lists(st.integers(0, ranks * per_rank - 1), min_size=top_k, max_size=top_k, unique=True)
    tokens = draw(st.lists(token, max_size=12))
    return torch.tensor(tokens, dtype=torch.int32).view(-1, top_k), ranks, per_rank


@settings(max_examples=60, deadline=None)
@given(chosen_experts())
def test_a_token_leaves_once_for_each_rank_of_its_experts(case):
    expert_TK, ranks, per_rank = case
    chosen = choice(expert_TK, per_rank=per_rank, ranks=ranks)
    wanted = [
        (rank, token)
        for rank in range(ranks)
        for token, experts in enumerate(expert_TK.tolist())
        if any(expert // per_rank == rank for expert in experts)
    ]
    leaving = departures(chosen.goes_Tn, len(wanted))
    assert leaving.token_S.tolist() == [token for _, token in wanted]
    for slot, (rank, token) in enumerate(wanted):
        assert leaving.slot_Tn[token, rank] == slot
    assert (leaving.slot_Tn >= 0).sum() == len(wanted)
    assert chosen.counts_n2[:, 0].tolist() == [sum(r == rank for r, _ in wanted) for rank in range(ranks)]
    assert chosen.counts_n2[:, 1].sum() == expert_TK.numel()


@settings(max_examples=60, deadline=None)
@given(chosen_experts(), st.integers(0, 5))
def test_arrived_copies_are_sorted_by_expert_and_then_by_arrival(case, spare):
    expert_AK, ranks, per_rank = case
    rank = ranks - 1
    first, top_k = rank * per_rank, expert_AK.shape[1]
    wanted = sorted(
        (expert - first, token, k)
        for token, experts in enumerate(expert_AK.tolist())
        for k, expert in enumerate(experts)
        if expert >= first
    )
    rows = min(len(wanted) + spare, expert_AK.numel())
    found = arrivals(expert_AK, first=first, experts=per_rank, rows=rows)
    assert found.copy_R.shape == (rows,)
    assert found.copy_R[: len(wanted)].tolist() == [token * top_k + k for _, token, k in wanted]
    assert found.ends_E.tolist() == [sum(e <= expert for e, _, _ in wanted) for expert in range(per_rank)]
    for row, (_, token, k) in enumerate(wanted):
        assert found.row_AK[token, k] == row
    assert (found.row_AK >= 0).sum() == len(wanted)


@pytest.mark.parametrize("top_k", [1, 3])
def test_expert_minus_one_is_a_copy_that_never_arrives(top_k):
    found = arrivals(torch.full((4, top_k), -1), first=0, experts=2, rows=0)
    assert found.ends_E.tolist() == [0, 0]
    assert (found.row_AK == -1).all()
