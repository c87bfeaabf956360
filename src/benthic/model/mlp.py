"""The SwiGLU feed-forward network (Shazeer 2020): dense layers and shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.model.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Linear as LinearSocket


class GateUp(nn.Module):
    """The gate and the up projection side by side: `weight[0]` is the gate, `weight[1]` is up."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width, hidden_size))


class Mlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = GateUp(width, hidden_size)
        self.down = Linear(hidden_size, width)

    def forward(self, x_TD: Tensor, linear: LinearSocket) -> Tensor:
        """Feed `x_TD` forward."""
        return linear.network(x_TD, self.gate_up.weight.flatten(0, 1), self.down.weight)
