"""The NVLink exchange on GPUs: the bits of the all-to-all one, repeatability, CUDA graphs.

Each rank is a process of its own on its own GPU; NCCL carries the all-to-all exchange.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (the group that the exchanges share)
from peer_checks import check_overlap_and_recomputation, check_same_bits, size_for
from routings import PER_RANK, ROUTINGS, batches, expert_weights
from spawn import spawn

from benthic.kernels import ops
from benthic.parallel.exchange_memory import PeerMemory
from benthic.parallel.exchange_nvlink import NvlinkExchange, Size

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
        same(names=ROUTINGS[:4], dtype=dtype, width=2048, fp8=True)
    check_overlap_and_recomputation(
        symmetric(rank), rank, RANKS, dtype=torch.bfloat16, width=512, device="cuda"
    )


def large(rank):
    """DeepSeek-V3's row and experts, 4096 tokens: fifty dispatches and combines give one result."""
    tokens, width, experts, top_k = 4096, 7168, 256, 8
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16()
    best = torch.rand(tokens, experts, device="cuda", generator=generator).topk(top_k, dim=1)
    size = Size(n_routed_experts=experts, top_k=top_k, hidden_size=width, dtype=x.dtype, max_tokens=tokens)
    exchange = NvlinkExchange.on(dist.group.WORLD, size, torch.device("cuda", rank))
    exact = (x.float() * best.values.sum(1, keepdim=True)).bfloat16()
    seen = set()
    for _ in range(50):
        arrived = exchange.finish_dispatch(exchange.start_dispatch(x, best.indices.int(), best.values))
        out = exchange.finish_combine(exchange.start_combine(arrived.rows_RD, arrived))
        seen.add(out.double().sum().item())
        torch.testing.assert_close(out, exact, atol=0.1, rtol=0.02)
    assert len(seen) == 1


def graph(rank):
    """A captured dispatch and combine replays with other tokens and other choices, between plain ones."""
    width = 1024
    size = size_for(RANKS, dtype=torch.bfloat16, width=width, max_tokens=64)
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


@pytest.mark.parametrize("check", [bits, large, graph], ids=lambda check: check.__name__)
def test_exchange_between_gpus(check):
    """`bits`: forward and backward equal the all-to-all exchange; `large`: repeats; `graph`: replays."""
    spawn(check, RANKS, device="cuda", seconds=280)
