"""The definition of a plain product."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """See `benthic.kernels.ops.linear`."""
    return x_TI @ weight_OI.t()
