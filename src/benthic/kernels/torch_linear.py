"""The library's product of rows with a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """See `benthic.kernels.ops.linear`."""
    return F.linear(x_TI, weight_OI)
