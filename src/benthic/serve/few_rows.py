"""Products on a GPU as the table of kernels says: those of few rows, and experts' with SwiGLU.

The latent's product is one with the query's first, for side by side they would wait for each other's tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.kernels.ops.linear import FEW_MULTIPLIED, MANY_MULTIPLIED
from benthic.model.local import PlainLinear
from benthic.model.mla import Attention

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.network import DeepSeek


class FewRowsLinear(PlainLinear):
    """Products of up to `FEW_MULTIPLIED` rows by `ops.linear`, others as `plain_linear`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        if x.dim() == 2 and x.shape[0] <= FEW_MULTIPLIED:
            return ops.linear(x, weight)
        return super().__call__(x, weight)

    def together(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """See `benthic.model.sockets.Linear`."""
        joined = joined_weight(weights)
        return None if joined is None else self(x, joined).split([each.shape[0] for each in weights], -1)

    def network(self, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """See `benthic.model.sockets.Linear`; those of experts and of many rows have SwiGLU inside."""
        if ends_E is None:
            if x_RD.shape[0] < MANY_MULTIPLIED:
                return super().network(x_RD, gate_up, down)
            return self(ops.linear_swiglu(x_RD, gate_up), down)
        return self.grouped(ops.grouped_swiglu(x_RD, gate_up, ends_E), down, ends_E)


def join_latents(model: DeepSeek) -> None:
    """Store the first weight of queries and the latent's side by side, one pair at a time."""
    for module in model.modules():
        if isinstance(module, Attention):
            weights = module.first.weight, module.kv_a.weight
            both = torch.cat([weight.data for weight in weights])
            for weight, part in zip(weights, both.split([each.shape[0] for each in weights]), strict=True):
                weight.data = part


def joined_weight(weights: tuple[Tensor, ...]) -> Tensor | None:
    """The one weight that several are, by rows; None where they do not lie so in memory."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        apart = weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return first.as_strided((sum(each.shape[0] for each in weights), first.shape[1]), first.stride())
