"""Products on a GPU as the table of kernels says: those of few rows, and experts' with SwiGLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.kernels import ops
from benthic.kernels.ops.linear import FEW_MULTIPLIED
from benthic.model.local import PlainLinear

if TYPE_CHECKING:
    from torch import Tensor


class FewRowsLinear(PlainLinear):
    """Products of up to `FEW_MULTIPLIED` rows by `ops.linear`, others as `plain_linear`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        if x.dim() == 2 and x.shape[0] <= FEW_MULTIPLIED:
            return ops.linear(x, weight)
        return super().__call__(x, weight)

    def grouped_swiglu(self, rows_RI: Tensor, weight_EGI: Tensor, ends_E: Tensor) -> Tensor:
        """SwiGLU of each expert's rows times its own `weight_GI.T`, whose gates come first."""
        return ops.grouped_swiglu(rows_RI, weight_EGI, ends_E)
