"""A product that is written where it is wanted, so that no copy follows: the logits of a recorded step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.kernels.ops.linear import FEW_MULTIPLIED, OUTPUTS
from benthic.model.block_scaled import BlockScaledLinear
from benthic.model.local import PlainLinear
from benthic.model.sockets import Linear
from benthic.serve.table_linear import TableLinear

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Into(Linear):
    """The products of `linear`; those of `out_TO`'s shape that are the library's are written there.

    Of 256 rows of 163,840 logits in bfloat16 a copy takes an H200 41 us.
    """

    linear: Linear
    out_TO: Tensor

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_TI @ weight_OI.T`, to the bit what `linear` gives."""
        fits = self.out_TO.shape == (x.shape[0], weight.shape[0]) and self.out_TO.dtype == x.dtype
        if fits and by_library(self.linear, x, weight):
            return torch.mm(x, weight.t(), out=self.out_TO)
        return self.linear(x, weight)

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """As `linear`."""
        return self.linear.grouped(rows_RI, weight_EOI, ends_E)


def by_library(linear: Linear, x: Tensor, weight: Tensor) -> bool:
    """Whether a socket leaves a product to torch's library as it is."""
    if x.dim() != 2:
        return False
    if isinstance(linear, BlockScaledLinear):
        return weight.data_ptr() not in linear.parts
    if isinstance(linear, TableLinear):
        return x.shape[0] > FEW_MULTIPLIED or (weight.is_cuda and weight.shape[0] > OUTPUTS)
    return type(linear) is PlainLinear
