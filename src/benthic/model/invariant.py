"""A model whose rows do not feel each other: every product in one order of summation.

Norms, rotations, SwiGLU, routing and the sums over a token's experts take rows one by one anyway. What is
left are products: those of the `linear` socket, the gate's, and those that move queries into the latent space
and outputs out of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.model.mla import Attention, LatentUp
from benthic.model.moe import Gate
from benthic.model.sockets import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.network import DeepSeek


class InvariantLinear(Linear):
    """The `linear` socket whose products give a row the bits it has alone; see `ops.linear_by_row`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        return ops.linear_by_row(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`."""
        return ops.grouped_linear_by_row(rows_RI, weight_EOI, ends_E)


class InvariantUp(LatentUp):
    """`LatentUp` with products by row."""

    def absorb_query(self, q_nope_THn: Tensor) -> Tensor:
        """Queries moved into the latent space, `q_THC`."""
        w_uk_HnC, _ = self._halves()
        return ops.heads_linear_by_row(q_nope_THn, w_uk_HnC.transpose(1, 2))

    def absorb_value(self, out_THC: Tensor) -> Tensor:
        """Outputs moved from the latent space, `out_THv`."""
        _, w_uv_HvC = self._halves()
        return ops.heads_linear_by_row(out_THC, w_uv_HvC)

    def _halves(self) -> tuple[Tensor, Tensor]:
        w_HnvC = self.weight.unflatten(0, (-1, self.nope_dim + self.v_dim))
        return w_HnvC[:, : self.nope_dim], w_HnvC[:, self.nope_dim :]


def invariant_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The gate's product by row, in float32; operands of several dtypes are widened first."""
    if x_TD.dtype is not weight_ED.dtype:
        x_TD, weight_ED = x_TD.float(), weight_ED.float()
    return ops.linear_by_row(x_TD, weight_ED, dtype=torch.float32)


def make_invariant(model: DeepSeek) -> InvariantLinear:
    """Take products by row, in place, where no socket decides; returns the socket for the others."""
    for module in model.modules():
        if isinstance(module, Gate):
            module.logits = invariant_logits
        elif isinstance(module, Attention):
            module.latent_up = InvariantUp
    return InvariantLinear()
