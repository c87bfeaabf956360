"""A weight and nothing else: what is multiplied, while the `linear` socket says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Linear as LinearSocket


class Linear(nn.Module):
    """`x_..I @ weight_OI.T`, without a bias: no model of this architecture has one."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, linear: LinearSocket) -> Tensor:
        """Multiply `x_..I` in the precision of the socket."""
        return linear(x, self.weight)


class Embedding(nn.Module):
    """One row of `weight_VD` per token id."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Look up `tokens_T` (any integer dtype): `[tokens, hidden_size]`."""
        return torch.embedding(self.weight, tokens_T)
