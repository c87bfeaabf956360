"""Text from a model that is still in training: the whole prefix is computed again for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.model.local import packed_sockets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear


@torch.no_grad()
def sample(
    model: DeepSeek,
    prompt: Sequence[int],
    *,
    count: int,
    temperature: float,
    seed: int,
    eos_token_id: int,
    linear: Linear,
) -> list[int]:
    """Up to `count` tokens that follow `prompt`, drawn at `temperature` (0: the most likely ones).

    Only the last `max_position_embeddings` tokens are seen. Cost: one forward pass of the prefix per token;
    this is a glance at a run, `benthic serve` is for serving.
    """
    device, window = model.head_weight().device, model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        seen_T = torch.tensor(tokens[-window:], device=device)
        borders = torch.tensor([0, len(seen_T)], dtype=torch.int32, device=device)
        sockets = packed_sockets(
            borders, len(seen_T), n_routed_experts=model.config.n_routed_experts, linear=linear
        )
        hidden = model(seen_T, torch.arange(len(seen_T), device=device), sockets)
        logits_V = model.logits(hidden.hidden_TD[-1:], linear)[0].float().cpu()
        token = _draw(logits_V, temperature, generator)
        if token == eos_token_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _draw(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))
