"""A small model trained until its prediction modules draft well, in seconds."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from small_engine import SHALLOW, random_model
from torch.nn import functional as F

from benthic.model.local import packed_sockets, plain_linear

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek

LENGTH, COPIES, VOCAB = 48, 6, 64


def texts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Walks t -> 5 t + 3 mod 64 that jump now and then: learnable, and never quite certain."""
    token = torch.randint(VOCAB, (count,), generator=generator)
    rows = []
    for _ in range(LENGTH):
        rows.append(token)
        jump = torch.rand(count, generator=generator) < 0.08
        token = torch.where(
            jump, torch.randint(VOCAB, (count,), generator=generator), (5 * token + 3) % VOCAB
        )
    return torch.stack(rows, dim=1)


@functools.cache
def trained_model(depth: int = 1, steps: int = 60) -> DeepSeek:
    """The `nano` model with `depth` prediction modules after some steps of AdamW on main and MTP loss."""
    model = random_model(replace(SHALLOW, num_nextn_predict_layers=depth, initializer_range=0.05))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bounds = torch.arange(0, COPIES * LENGTH + 1, LENGTH, dtype=torch.int32)
    sockets = packed_sockets(bounds, LENGTH, n_routed_experts=model.config.n_routed_experts)
    positions_T = torch.arange(LENGTH).repeat(COPIES)
    for _ in range(steps):
        tokens = texts(COPIES, generator)
        hidden = model(tokens.flatten(), positions_T, sockets)
        loss = _loss(model, hidden, tokens, 1)
        for k in range(depth):
            ahead = tokens.roll(-1 - k, dims=1)
            hidden = model.predict_ahead(k, model.mtp_input(hidden), ahead.flatten(), positions_T, sockets)
            loss = loss + 0.5 * _loss(model, hidden, tokens, 2 + k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(requires_grad=False)


def _loss(model, hidden, tokens, shift):
    logits = model.logits(hidden.hidden_TD, plain_linear).view(COPIES, LENGTH, -1)
    return F.cross_entropy(logits[:, :-shift].flatten(0, 1), tokens[:, shift:].flatten())


def starts(count: int, *, seed: int = 0, longest: int = 30) -> list[list[int]]:
    """Prompts of such texts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [row[:n].tolist() for row, n in zip(texts(count, generator), lengths, strict=True)]
