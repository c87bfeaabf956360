"""The NVLink exchange against the all-to-all one, bit for bit, on whatever this process runs on.

Not collected by itself. `test_exchange_interpreter.py` runs it in Triton's CPU interpreter, where processes
share a file instead of GPU memory; `test_exchange_gpu.py` on GPUs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251 (the group that the exchanges share)
from routings import PER_RANK, TOP_K, batches, expert_weights, through, through_factors
from torch.utils.checkpoint import checkpoint

from benthic.kernels import ops
from benthic.parallel.exchange import AllToAllExchange
from benthic.parallel.exchange_memory import PeerMemory
from benthic.parallel.exchange_nvlink import NvlinkExchange
from benthic.parallel.exchange_routes import Room
from benthic.parallel.exchange_size import Size

NAMES = ("output", "gradient of tokens", "gradient of weights", "gradient at the experts")


def shared_file_memory(folder: str, rank: int, ranks: int, words: int, name: str) -> PeerMemory:
    """A file for each rank that all of them map: peer memory for processes of one machine."""
    for peer in range(ranks):
        if peer == rank:
            (Path(folder) / f"{name}-{peer}").write_bytes(bytes(4 * words))
    dist.barrier()
    mapped = [
        torch.from_file(str(Path(folder) / f"{name}-{peer}"), shared=True, size=words, dtype=torch.int32)
        for peer in range(ranks)
    ]
    dist.barrier()
    memory = PeerMemory(tuple(mapped), rank)
    dist.barrier()
    KEPT.append(memory)
    return memory


KEPT: list[PeerMemory] = []
"""Mapped files stay mapped while the process lives, as peers' GPU memory does."""


def size_for(ranks, *, dtype, width, max_tokens=64, **options) -> Size:
    return Size(
        n_routed_experts=ranks * PER_RANK,
        top_k=TOP_K,
        hidden_size=width,
        dtype=dtype,
        max_tokens=max_tokens,
        **options,
    )


def same_bits(ours, theirs, label):
    for name, mine, other in zip(NAMES, ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), f"{label}, {name}: {(mine.float() - other.float()).abs().max()}"


def check_same_bits(memory_for, rank, ranks, *, names, dtype, width, device, most=64, fixed=False, **options):
    """Outputs and all gradients over several routings through one exchange, mailboxes being used again.

    With `fixed` the host learns of no number of rows, and there is room for all copies but a few.
    """
    size = size_for(ranks, dtype=dtype, width=width, **({"max_tokens": most} | options))
    fast = NvlinkExchange(memory_for(size.words(ranks)), size)
    plain = AllToAllExchange(None, ranks * PER_RANK, fp8=size.fp8)
    if fixed:
        over = torch.zeros((), dtype=torch.int64, device=device)
        rows = ranks * size.max_tokens * min(TOP_K, PER_RANK) - 3 * (ranks > 1)
        fast.room = Room([rows] * len(names), over)
    for name in names:
        batch = batches(name, ranks, dtype=dtype, width=width, most=most, device=device)[rank]
        same_bits(through_factors(fast, batch), through_factors(plain, batch), (rank, name, dtype, options))
    assert fast.room is None or not fast.room.over


def check_overlap_and_recomputation(
    memory_for, rank, ranks, *, dtype, width, device, most=64, stream=None, **options
):
    """Two microbatches in flight both ways, the experts of both recomputed in backward: the same bits."""
    options |= {"in_flight": 2, "keep_arrivals": True}
    size = size_for(ranks, dtype=dtype, width=width, max_tokens=most, **options)
    exchange = NvlinkExchange(memory_for(size.words(ranks)), size)
    if stream is not None:
        exchange.stream = stream
    weight = expert_weights(ranks, dtype=dtype, width=width, device=device)
    weight = weight[rank * PER_RANK : (rank + 1) * PER_RANK].requires_grad_()
    found = [
        batches(name, ranks, dtype=dtype, width=width, most=most, device=device)[rank]
        for name in ("random", "one token")
    ]
    alone = [through(exchange, batch, weight) for batch in found]
    leaves = [[t.clone().requires_grad_() for t in (batch.x, batch.weight)] for batch in found]
    flights = [
        exchange.start_dispatch(x, batch.expert, w) for (x, w), batch in zip(leaves, found, strict=True)
    ]

    def experts(flight):
        arrived = exchange.finish_dispatch(flight)
        rows = ops.grouped_linear(arrived.rows_RD, weight, arrived.ends_E)
        return exchange.start_combine(rows, arrived)

    homes = [checkpoint(experts, flight, use_reentrant=False) for flight in flights]
    outs = [exchange.finish_combine(home) for home in homes]
    links = [home.tensors[0] for home in homes]
    dlinks = [
        torch.autograd.grad(out, link, batch.dout)[0]
        for out, link, batch in zip(outs, links, found, strict=True)
    ]
    for link, dlink, tokens, out, one in zip(links, dlinks, leaves, outs, alone, strict=True):
        same_bits((out, *torch.autograd.grad(link, (*tokens, weight), dlink)), one, (rank, "overlap"))
