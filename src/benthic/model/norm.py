"""RMSNorm (Zhang and Sennrich 2019): every norm of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.kernels import ops
from benthic.model.sockets import LateSum

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.sockets import Stream

LATENT_NORM_EPS = 1e-6
"""The norms of the two latents use this epsilon whatever `rms_norm_eps` says: the released code of every
model
of the family builds them with the default (Moonlight has `rms_norm_eps` 1e-5 and 1e-6 here)."""


class Norm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight`, statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim; the dtype of `x` is kept."""
        return ops.rms_norm(x, self.weight, self.eps)

    def with_input(self, x_TD: Stream) -> tuple[Tensor, Tensor]:
        """`(norm(x), x)`, whose gradients are added in one pass over memory; x may have to be summed."""
        if isinstance(x_TD, LateSum):
            return x_TD.normed(self.weight, self.eps)
        return ops.add_rms_norm(x_TD, None, self.weight, self.eps)

    def after_adding(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """`(norm(x + residual), x + residual)` in one pass over memory."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)
