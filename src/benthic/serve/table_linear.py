"""Products on a GPU as the table of kernels says: of few rows, of two weights at once, with SwiGLU inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.kernels import ops
from benthic.kernels.ops.linear import FEW_MULTIPLIED
from benthic.model.joined import as_one
from benthic.model.local import PlainLinear

if TYPE_CHECKING:
    from torch import Tensor


class TableLinear(PlainLinear):
    """The `linear` socket for bfloat16 on a GPU, where nothing is kept for gradients."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`: up to `FEW_MULTIPLIED` rows by `ops.linear`, others as `plain_linear`."""
        if x.dim() == 2 and x.shape[0] <= FEW_MULTIPLIED:
            return ops.linear(x, weight)
        return super().__call__(x, weight)

    def together(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """See `benthic.model.sockets.Linear`."""
        joined = as_one(weights)
        return None if joined is None else self(x, joined).split([each.shape[0] for each in weights], -1)

    def network(self, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """See `benthic.model.sockets.Linear`; with SwiGLU inside the product, of experts and of many rows."""
        if ends_E is None:
            return self(ops.linear_swiglu(x_RD, gate_up), down)
        return self.grouped(ops.grouped_swiglu(x_RD, gate_up, ends_E), down, ends_E)
