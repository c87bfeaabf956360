"""Shards of a network together compute what the whole one does: forward, logits, and each piece alone."""

from __future__ import annotations

import pytest
import torch
from spawn import spawn

from benthic.model.initialise import initialise
from benthic.model.local import LocalExchange, packed_sockets, plain_linear
from benthic.model.network import DeepSeek
from benthic.model.sharded import hold
from benthic.model.sockets import Sockets
from benthic.parallel.divided import OwnExperts, divide, exchange_for
from benthic.parallel.team import Team
from benthic.spec import presets
from benthic.spec.parameters import parameters
from benthic.spec.shard import Shard


def routed(generator: torch.Generator, tokens: int, experts: int, top_k: int):
    expert_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.int()
    return torch.randn(tokens, 12, generator=generator), expert_TK, torch.rand(tokens, top_k)


@pytest.mark.parametrize("size", [2, 4])
def test_own_experts_of_all_ranks_sum_to_what_all_experts_on_one_give(size: int) -> None:
    x_TD, expert_TK, weight_TK = routed(torch.Generator().manual_seed(size), 31, 8, 3)
    weight_EOI = torch.randn(8, 12, 12)

    def through(exchange: LocalExchange, weight_EOI: torch.Tensor) -> torch.Tensor:
        arrived = exchange.finish_dispatch(exchange.start_dispatch(x_TD, expert_TK, weight_TK))
        rows_RD = plain_linear.grouped(arrived.rows_RD, weight_EOI, arrived.ends_E)
        return exchange.finish_combine(exchange.start_combine(rows_RD, arrived))

    held = 8 // size
    parts = [
        through(OwnExperts(8, first, held), weight_EOI[first : first + held]) for first in range(0, 8, held)
    ]
    torch.testing.assert_close(sum(parts), through(LocalExchange(8), weight_EOI))
    assert all(part.abs().sum() > 0 for part in parts)


def ranks_agree(rank: int, ranks: int, whole_experts) -> None:
    """Forward of the shards beside the whole model's, on every rank; the residual stream bit by bit alike."""
    config = presets.get("nano")
    whole, shard = DeepSeek(config), Shard(index=rank, size=ranks, whole_experts=whole_experts)
    initialise(whole, 0)
    with torch.device("meta"):
        model = DeepSeek(config)
    hold(model, shard)
    state = whole.state_dict()
    state = {param.name: state[param.name][shard.box(param)] for param in parameters(config)}
    model.load_state_dict(state, assign=True)
    model.rotary.to("cpu")
    team = Team(rank, ranks, torch.device("cpu"))
    divide(model, team)
    tokens_T, positions_T = torch.arange(40) * 7 % config.vocab_size, torch.arange(40)
    plain = packed_sockets(
        torch.tensor([0, 40], dtype=torch.int32), 40, n_routed_experts=config.n_routed_experts
    )
    own = Sockets(plain.attend, exchange_for(config, shard), plain.linear)
    with torch.inference_mode():
        expected, found = whole(tokens_T, positions_T, plain), model(tokens_T, positions_T, own)
        torch.testing.assert_close(found.hidden_TD, expected.hidden_TD, rtol=1e-4, atol=1e-5)
        logits = model.logits(found.hidden_TD, plain_linear)
        torch.testing.assert_close(
            logits, whole.logits(expected.hidden_TD, plain_linear), rtol=1e-4, atol=1e-5
        )
        ahead = model.predict_ahead(0, model.mtp_input(found), tokens_T, positions_T, own)
        wanted = whole.predict_ahead(0, whole.mtp_input(expected), tokens_T, positions_T, plain)
        torch.testing.assert_close(ahead.hidden_TD, wanted.hidden_TD, rtol=1e-4, atol=1e-5)
        first = team.told(found.pre_norm_TD.clone())
    assert torch.equal(first, found.pre_norm_TD), "ranks differ in a bit"
    assert team.least(10 + rank) == 10


@pytest.mark.dist
@pytest.mark.parametrize("whole_experts", [False, True], ids=["by width", "whole experts"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_compute_what_the_whole_network_does(ranks: int, whole_experts) -> None:
    spawn(ranks_agree, ranks, ranks, whole_experts)
