"""Rows of all ranks through the experts of all ranks give what all experts on one rank give each its own."""

from __future__ import annotations

import pytest
import torch
from spawn import spawn

from benthic.model.local import LocalExchange, plain_linear
from benthic.parallel.gathered import GatheredExperts
from benthic.parallel.team import Team
from benthic.spec import presets
from benthic.spec.parameters import parameters
from benthic.spec.shard import Shard

EXPERTS, WIDTH, TOP_K = 8, 12, 3


def through(exchange: LocalExchange, rows: tuple[torch.Tensor, ...], weight_EOI: torch.Tensor):
    arrived = exchange.finish_dispatch(exchange.start_dispatch(*rows))
    rows_RD = plain_linear.grouped(arrived.rows_RD, weight_EOI, arrived.ends_E)
    return exchange.finish_combine(exchange.start_combine(rows_RD, arrived))


def compare(rank: int, ranks: int) -> None:
    weight_EOI = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    team, held = Team(rank, ranks, torch.device("cpu")), EXPERTS // ranks
    own = weight_EOI[rank * held : (rank + 1) * held]
    ragged = tuple(1 + 5 * other for other in range(ranks))
    for counts in ((), ragged, ragged[::-1]):
        generator = torch.Generator().manual_seed(1 + rank)
        tokens = counts[rank] if counts else 7
        expert_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.int()
        rows = (torch.randn(tokens, WIDTH, generator=generator), expert_TK, torch.rand(tokens, TOP_K))
        for dtype in (torch.float32, torch.bfloat16):
            cast = (rows[0].to(dtype), *rows[1:])
            exchange = GatheredExperts(EXPERTS, rank * held, held, team.group, counts)
            found = through(exchange, cast, own.to(dtype))
            assert found.dtype == dtype
            expected = through(LocalExchange(EXPERTS), cast, weight_EOI.to(dtype))
            near = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(found, expected, rtol=near, atol=near)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_of_all_ranks_visit_all_experts_in_equal_and_in_different_numbers(ranks: int) -> None:
    spawn(compare, ranks, ranks)


def test_a_rank_with_tokens_of_its_own_holds_everything_but_other_ranks_experts() -> None:
    config = presets.get("nano")
    shard = Shard(index=1, size=2, whole_experts=True, own_tokens=True)
    for param in parameters(config):
        box = shard.box(param)
        sizes = tuple(piece.stop - piece.start for piece in box)
        if "expert" in param.axes:
            at = param.axes.index("expert")
            assert box[at] == slice(config.n_routed_experts // 2, config.n_routed_experts)
            sizes = (*sizes[:at], sizes[at] * 2, *sizes[at + 1 :])
        assert sizes == param.shape
