"""Choices of experts that exchanges have to survive, the same on every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDTH = 20
TOP_K = 3
PER_RANK = 5


class Batch(NamedTuple):
    """One rank's tokens, their experts and weights, and the gradient of its output."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    dout: torch.Tensor


def scores(name: str, tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    found = torch.rand(tokens, experts, generator=generator)
    if name == "half the experts empty":
        found[:, experts // 2 :] -= 2
    if name == "one expert takes every token":
        found[:, experts - 2] += 2
    if name == "every token to the first rank":
        found[:, :PER_RANK] += 2
    return found


def tokens_of(name: str, rank: int, most: int) -> int:
    counts = {
        "a rank without tokens": (63, 0, 17, 5),
        "one token": (1, 0, 0, 0),
        "no tokens at all": (0, 0, 0, 0),
    }
    return min(most, counts.get(name, (63, 40, 17, 64))[rank])


ROUTINGS = (
    "random",
    "random again",
    "half the experts empty",
    "one expert takes every token",
    "every token to the first rank",
    "a rank without tokens",
    "one token",
    "no tokens at all",
)


def batches(
    name: str,
    ranks: int,
    *,
    dtype: torch.dtype,
    width: int = WIDTH,
    most: int = 64,
    device: str = "cpu",
) -> list[Batch]:
    """What every rank brings to the exchange."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    found = []
    for rank in range(ranks):
        tokens = tokens_of(name, rank, most)
        best = scores(name, tokens, ranks * PER_RANK, generator).topk(TOP_K, dim=1)
        batch = Batch(
            torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype),
            best.indices.to(torch.int32),
            best.values.clone(),
            torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype),
        )
        found.append(Batch(*(tensor.to(device) for tensor in batch)))
    return found


def expert_weights(
    ranks: int, *, dtype: torch.dtype, width: int = WIDTH, device: str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(ranks * PER_RANK, width, width, generator=generator, dtype=torch.float64)
    return (weight / width**0.5).to(device, dtype)


def through(exchange, batch: Batch, weight: torch.Tensor):
    """Output and gradients of tokens, weights and experts, each expert being one product."""
    from benthic.kernels import ops

    x, weight_TK, weight = (t.detach().clone().requires_grad_() for t in (batch.x, batch.weight, weight))
    arrived = exchange.finish_dispatch(exchange.start_dispatch(x, batch.expert, weight_TK))
    rows = ops.grouped_linear(arrived.rows_RD, weight, arrived.ends_E)
    out = exchange.finish_combine(exchange.start_combine(rows, arrived))
    return out.detach(), *torch.autograd.grad(out, (x, weight_TK, weight), batch.dout)


def through_factors(exchange, batch: Batch):
    """As `through`, each expert being one factor: rows are independent, so that bits can be compared.

    The last result is the gradient of the rows that arrived.
    """
    x, weight_TK = (t.detach().clone().requires_grad_() for t in (batch.x, batch.weight))
    arrived = exchange.finish_dispatch(exchange.start_dispatch(x, batch.expert, weight_TK))
    rows = torch.arange(arrived.rows_RD.shape[0], device=x.device, dtype=torch.int32)
    expert = torch.searchsorted(arrived.ends_E, rows, right=True)
    results = arrived.rows_RD * (1 + expert.unsqueeze(1) / 7).to(x.dtype)
    out = exchange.finish_combine(exchange.start_combine(results, arrived))
    *grads, drows = torch.autograd.grad(out, (x, weight_TK, arrived.rows_RD), batch.dout)
    return out.detach(), *grads, drows[: int(arrived.ends_E[-1])]
