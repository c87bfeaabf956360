from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (subgroups of the spawned processes)
from routings import PER_RANK, ROUTINGS, Batch, batches, expert_weights, through
from small_models import BASE, random_model
from spawn import RankError, spawn
from torch.utils.checkpoint import checkpoint

from benthic.errors import ConfigError, ShapeError
from benthic.kernels import ops
from benthic.model.block import Attended
from benthic.model.local import LocalExchange, plain_linear
from benthic.model.sockets import Sockets
from benthic.parallel.exchange import AllToAllExchange, experts_per_rank

pytestmark = pytest.mark.dist

NAMES = ("output", "gradient of tokens", "gradient of weights", "gradient of experts")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def expected(found: list[Batch], weight, rank):
    """All experts on one rank and all tokens in one batch; then this rank's share."""
    whole = Batch(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    out, dx, dweight, dexperts = through(LocalExchange(weight.shape[0]), whole, weight)
    sizes = [len(batch.x) for batch in found]
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    return *(each.split(sizes)[rank] for each in (out, dx, dweight)), dexperts[mine]


def close(actual, exact, tolerance, label):
    for name, ours, theirs in zip(NAMES, actual, exact, strict=True):
        assert ours.dtype == theirs.dtype, (label, name)
        size = theirs.abs().max().item() if theirs.numel() else 0.0
        where = f"{label}, {name}: {{}}".format
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * (size + 1e-6), msg=where)


def subgroups(rank):
    """A group of 4, one of 2 and one of 1: `(group, this rank in it, ranks)`."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([each]) for each in range(4)]
    return [(None, rank, 4), (pairs[rank // 2], rank % 2, 2), (alone[rank], 0, 1)]


def equals_the_local_exchange(rank):
    for group, place, ranks in subgroups(rank):
        exchange = AllToAllExchange(group, ranks * PER_RANK)
        for name in ROUTINGS:
            for dtype, tolerance in TOLERANCE.items():
                found = batches(name, ranks, dtype=dtype)
                weight = expert_weights(ranks, dtype=dtype)
                mine = weight[place * PER_RANK : (place + 1) * PER_RANK]
                actual = through(exchange, found[place], mine)
                close(actual, expected(found, weight, place), tolerance, (ranks, name, dtype))


def test_outputs_and_gradients_equal_those_of_all_experts_on_one_rank():
    spawn(equals_the_local_exchange, 4)


def quantised(x):
    values, scale = ops.quantise_fp8_rows(x, power_of_two=True)
    return ops.dequantise_fp8_rows(values, scale, dtype=x.dtype)


def sends_fp8(rank):
    for width in (63, 260):
        found = batches("random", 2, dtype=torch.float32, width=width)
        weight = expert_weights(2, dtype=torch.float32, width=width)
        mine = weight[rank * PER_RANK : (rank + 1) * PER_RANK]
        actual = through(AllToAllExchange(None, 2 * PER_RANK, fp8=True), found[rank], mine)
        rounded = [b._replace(x=quantised(b.x), dout=quantised(b.dout)) for b in found]
        close(actual, expected(rounded, weight, rank), 2e-5, width)
        # what comes home is not quantised: a second rounding would show
        assert not torch.equal(actual[0], quantised(actual[0]))


def repeats_and_overlaps(rank):
    """Two microbatches in flight at once, gradients cut at the link, and recomputation of the experts."""
    exchange = AllToAllExchange(None, 2 * PER_RANK)
    weight = expert_weights(2, dtype=torch.float32)[rank * PER_RANK : (rank + 1) * PER_RANK].requires_grad_()
    found = [batches(name, 2, dtype=torch.float32)[rank] for name in ("random", "one token")]
    alone = [through(exchange, batch, weight) for batch in found]

    leaves = [[t.clone().requires_grad_() for t in (batch.x, batch.weight)] for batch in found]
    out_flights = [
        exchange.start_dispatch(x, batch.expert, w) for (x, w), batch in zip(leaves, found, strict=True)
    ]

    def experts(flight):
        arrived = exchange.finish_dispatch(flight)
        rows = ops.grouped_linear(arrived.rows_RD, weight, arrived.ends_E)
        return exchange.start_combine(rows, arrived)

    home_flights = [checkpoint(experts, f, use_reentrant=False) for f in out_flights]
    outs = [exchange.finish_combine(flight) for flight in home_flights]
    links = [flight.tensors[0] for flight in home_flights]
    # backward of both combines is in flight before that of either dispatch
    dlinks = [
        torch.autograd.grad(out, link, batch.dout)[0].clone()
        for out, link, batch in zip(outs, links, found, strict=True)
    ]
    for link, dlink, tokens, out, one in zip(links, dlinks, leaves, outs, alone, strict=True):
        gradients = torch.autograd.grad(link, (*tokens, weight), dlink)
        for name, ours, theirs in zip(NAMES, (out, *gradients), one, strict=True):
            assert torch.equal(ours, theirs), name


def both_with_two_ranks(rank):
    sends_fp8(rank)
    repeats_and_overlaps(rank)


def test_fp8_rounds_tokens_and_output_gradients_and_two_microbatches_overlap_without_changing_a_bit():
    spawn(both_with_two_ranks, 2)


def fails_on_rank_one(rank):
    if rank == 1:
        msg = "rank one is unwell"
        raise ShapeError(msg)
    dist.barrier()


def test_the_launcher_reports_the_traceback_of_the_rank_that_failed():
    with pytest.raises(RankError, match=r"rank 1 of 2:[\s\S]*rank one is unwell"):
        spawn(fails_on_rank_one, 2)


def test_experts_that_do_not_divide_by_the_ranks_are_refused():
    with pytest.raises(ConfigError, match="10 routed experts cannot be split evenly over the 4 ranks"):
        experts_per_rank(10, 4)


def small_block():
    return BASE, random_model(BASE).blocks[-1]


def layer_with_sharded_experts(rank):
    config, whole = small_block()
    _, mine = small_block()
    per_rank = config.n_routed_experts // 2
    for name, weight in list(mine.moe.experts.named_parameters()):
        setattr(
            mine.moe.experts,
            name,
            torch.nn.Parameter(weight[rank * per_rank : (rank + 1) * per_rank].detach()),
        )
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(9 + 14, config.hidden_size, generator=generator)
    dout_TD = torch.randn(9 + 14, config.hidden_size, generator=generator)
    tokens = slice(0, 9) if rank == 0 else slice(9, 23)

    def moe(block, x, exchange, dout):
        attended = Attended(x, block.ffn_norm(x))
        sockets = Sockets(None, exchange, plain_linear)
        out = block.combine(block.experts(block.dispatch(attended, sockets), sockets), sockets)
        out.backward(dout)
        return out.detach()

    leaves = [x_TD.clone().requires_grad_(), x_TD[tokens].clone().requires_grad_()]
    exact = moe(whole, leaves[0], LocalExchange(config.n_routed_experts), dout_TD)
    ours = moe(mine, leaves[1], AllToAllExchange(None, config.n_routed_experts), dout_TD[tokens])
    torch.testing.assert_close(ours, exact[tokens])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad[tokens])
    for (name, theirs), (_, own) in zip(whole.named_parameters(), mine.named_parameters(), strict=True):
        if theirs.grad is None or ".shared." in name:
            continue
        if "experts" in name:
            torch.testing.assert_close(
                own.grad, theirs.grad[rank * per_rank : (rank + 1) * per_rank], msg=name
            )
        else:
            dist.all_reduce(own.grad)
            torch.testing.assert_close(own.grad, theirs.grad, msg=name)


def counts_collectives(rank):
    """Recomputing the experts sends nothing again: 3 collectives for dispatch, 1, 1 and 2 for the rest."""
    batch = batches("random", 2, dtype=torch.float32)[rank]
    weight = expert_weights(2, dtype=torch.float32)[rank * PER_RANK : (rank + 1) * PER_RANK].requires_grad_()
    exchange = AllToAllExchange(None, 2 * PER_RANK)
    x, weight_TK = batch.x.requires_grad_(), batch.weight.requires_grad_()

    def experts(flight):
        arrived = exchange.finish_dispatch(flight)
        return exchange.start_combine(ops.grouped_linear(arrived.rows_RD, weight, arrived.ends_E), arrived)

    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sends:
        flight = checkpoint(experts, exchange.start_dispatch(x, batch.expert, weight_TK), use_reentrant=False)
        out = exchange.finish_combine(flight)
        assert sends.call_count == 4
        out.backward(batch.dout)
        assert sends.call_count == 7


def layer_and_collectives(rank):
    layer_with_sharded_experts(rank)
    counts_collectives(rank)


def test_a_layer_with_sharded_experts_equals_the_whole_one_and_recomputation_sends_nothing():
    spawn(layer_and_collectives, 2)
