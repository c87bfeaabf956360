"""The NVLink exchange on GPUs: the bits of the all-to-all one, repeatability, CUDA graphs, work beside it.

Each rank is a process of its own on its own GPU; NCCL carries the all-to-all exchange.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (the group that the exchanges share)
from peer_checks import check_overlap_and_recomputation, check_same_bits, size_for
from routings import PER_RANK, ROUTINGS, TOP_K, batches, expert_weights
from spawn import spawn

from benthic.kernels import ops
from benthic.parallel.exchange_memory import PeerMemory
from benthic.parallel.exchange_nvlink import NvlinkExchange
from benthic.parallel.exchange_size import Size

pytestmark = pytest.mark.multigpu
RANKS = min(4, torch.cuda.device_count())


def symmetric(rank):
    return lambda words: PeerMemory.symmetric(dist.group.WORLD, words, torch.device("cuda", rank))


def bits(rank):
    same = functools.partial(check_same_bits, symmetric(rank), rank, RANKS, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        same(names=ROUTINGS, dtype=dtype, width=256)
        same(names=ROUTINGS, dtype=dtype, width=256, max_tokens=700)  # rows in one piece
        same(names=ROUTINGS[:4], dtype=dtype, width=7168)
        same(names=ROUTINGS[:4], dtype=dtype, width=2048, exact_rows=True)
        same(names=ROUTINGS[:1], dtype=dtype, width=2048, exact_rows=True, fixed=True)
        same(names=ROUTINGS[:4], dtype=dtype, width=2048, fp8=True)
        same(names=ROUTINGS, dtype=dtype, width=256, copies=True)
        same(names=ROUTINGS[:4], dtype=dtype, width=2048, exact_rows=True, copies=True)
        same(names=ROUTINGS[:4], dtype=dtype, width=2048, fp8=True, copies=True)
    for copies in (False, True):
        check_overlap_and_recomputation(
            symmetric(rank), rank, RANKS, dtype=torch.bfloat16, width=512, device="cuda", copies=copies
        )


def large(rank, copies):
    """DeepSeek-V3's row and experts, 4096 tokens: fifty dispatches and combines give one result."""
    tokens, width, experts, top_k = 4096, 7168, 256, 8
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
    best = torch.rand(tokens, experts, device="cuda", generator=generator).topk(top_k, dim=1)
    size = Size(
        n_routed_experts=experts,
        top_k=top_k,
        hidden_size=width,
        dtype=x.dtype,
        max_tokens=tokens,
        copies=copies,
    )
    exchange = NvlinkExchange.on(dist.group.WORLD, size, torch.device("cuda", rank))
    exact = (x.float() * best.values.sum(1, keepdim=True)).bfloat16()
    seen = set()
    for _ in range(50):
        arrived = exchange.finish_dispatch(exchange.start_dispatch(x, best.indices.int(), best.values))
        out = exchange.finish_combine(exchange.start_combine(arrived.rows_RD, arrived))
        seen.add(out.double().sum().item())
        torch.testing.assert_close(out, exact, atol=0.1, rtol=0.02)
    assert len(seen) == 1


def graph(rank, copies):
    """A captured dispatch and combine replays with other tokens and other choices, between plain ones."""
    width = 1024
    size = size_for(RANKS, dtype=torch.bfloat16, width=width, max_tokens=64, copies=copies)
    exchange = NvlinkExchange.on(dist.group.WORLD, size, torch.device("cuda", rank))
    weight = expert_weights(RANKS, dtype=torch.bfloat16, width=width, device="cuda")
    weight = weight[rank * PER_RANK : (rank + 1) * PER_RANK]

    def layer(batch):
        arrived = exchange.finish_dispatch(exchange.start_dispatch(batch.x, batch.expert, batch.weight))
        rows = ops.grouped_linear(arrived.rows_RD, weight, arrived.ends_E)
        return exchange.finish_combine(exchange.start_combine(rows, arrived))

    found = {
        name: batches(name, RANKS, dtype=torch.bfloat16, width=width, most=40, device="cuda")[rank]
        for name in ("random", "random again", "one expert takes every token")
    }
    inputs = type(found["random"])(*(tensor.clone() for tensor in found["random"]))
    with torch.no_grad():
        expected = {name: layer(batch) for name, batch in found.items()}
        torch.cuda.synchronize()
        dist.barrier()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = layer(inputs)
        for name in (*found, *reversed(found)):
            for kept, new in zip(inputs, found[name], strict=True):
                kept.copy_(new)
            captured.replay()
            assert torch.equal(out, expected[name]), name
            assert torch.equal(layer(found[name]), expected[name]), name


def computing(square):
    """Products, and rows of NaN in memory that was given up."""
    for rows in (2048, RANKS * 2048 * TOP_K) * 6:
        torch.full((rows, 2048), torch.nan, device="cuda", dtype=torch.bfloat16)
        torch.mm(square, square)


def two_at_once(exchange, found, square):
    """Both batches through the exchange, started before either is finished; inputs are given up at once."""

    def home(flight):
        arrived = exchange.finish_dispatch(flight)
        return exchange.start_combine(arrived.rows_RD * 2, arrived)

    flights, homes = [], []
    for batch in found:
        flights.append(exchange.start_dispatch(*(tensor.clone() for tensor in batch)))
        computing(square)
    for flight in flights:
        homes.append(home(flight))
        computing(square)
    return [exchange.finish_combine(each) for each in homes]


def beside(rank, copies):
    """Two transfers each way while the GPU computes; inputs' memory is taken again, eager and captured."""
    tokens, width = 2048, 2048
    size = size_for(RANKS, dtype=torch.bfloat16, width=width, max_tokens=tokens, in_flight=2, copies=copies)
    exchange = NvlinkExchange.on(dist.group.WORLD, size, torch.device("cuda", rank))
    generator = torch.Generator("cuda").manual_seed(rank)
    found = []
    for count in (tokens, tokens - 500 * rank):
        x = torch.randn(count, width, device="cuda", generator=generator).bfloat16()
        best = torch.rand(count, RANKS * PER_RANK, device="cuda", generator=generator).topk(TOP_K, dim=1)
        found.append((x, best.indices.int(), best.values))
    square = torch.randn(4096, 4096, device="cuda", generator=generator).bfloat16()

    def same(outs):
        return all(torch.equal(out, expected) for out, expected in zip(outs, alone, strict=True))

    with torch.no_grad():
        alone = [two_at_once(exchange, [batch], square)[0] for batch in found]
        assert not any(out.isnan().any() for out in alone)
        assert all(same(two_at_once(exchange, found, square)) for _ in range(5))
        torch.cuda.synchronize()
        dist.barrier()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            outs = two_at_once(exchange, found, square)
        for _ in range(5):
            captured.replay()
            assert same(outs)
            assert same(two_at_once(exchange, found, square))


CHECKS = {"bits": (bits,)} | {
    f"{check.__name__}-{name}": (check, name == "copies")
    for check in (large, graph, beside)
    for name in ("kernels", "copies")
}


@pytest.mark.parametrize("name", CHECKS)
def test_exchange_between_gpus(name):
    """`bits`: both directions equal the all-to-all exchange; `large`: repeats; `graph`: replays; `beside`."""
    check, *copies = CHECKS[name]
    spawn(check, RANKS, *copies, device="cuda", seconds=280)
