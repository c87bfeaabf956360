"""One multi-token-prediction module (DeepSeek-V3 report eq. (21)-(23))."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.model.block import block_for
from benthic.model.linear import Linear
from benthic.model.norm import Norm

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.moe import Routing
    from benthic.model.rope import Angles
    from benthic.model.sockets import Sockets, Stream
    from benthic.spec.model import ModelConfig


class Mtp(nn.Module):
    """A projection of (next token's embedding, previous depth's hidden state), one block, a norm.

    The report writes the hidden state first; released weights multiply the embedding first, and so does this
    module. Embedding and head are the main model's.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm = Norm(size, eps)
        self.hidden_norm = Norm(size, eps)
        self.proj = Linear(size, 2 * size)
        self.block = block_for(config, config.num_hidden_layers + depth)
        self.norm = Norm(size, eps)

    def project(self, embedded_TD: Tensor, previous_TD: Tensor, sockets: Sockets) -> Tensor:
        """What enters the block: eq. (21)."""
        pair_TD2 = torch.cat((self.embed_norm(embedded_TD), self.hidden_norm(previous_TD)), dim=-1)
        return self.proj(pair_TD2, sockets.linear)

    def forward(
        self, embedded_TD: Tensor, previous_TD: Tensor, angles: Angles, sockets: Sockets
    ) -> tuple[Stream, Routing | None]:
        """The block's output before `norm`, and its routing."""
        x_TD, routing = self.block(self.project(embedded_TD, previous_TD, sockets), angles, sockets)
        return x_TD, routing
