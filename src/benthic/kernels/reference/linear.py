"""The definitions of a plain product, and of one with SwiGLU behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.kernels.reference.norm import swiglu

if TYPE_CHECKING:
    from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """See `benthic.kernels.ops.linear`."""
    return x_TI @ weight_OI.t()


def linear_swiglu(x_TI: Tensor, weight_GI: Tensor) -> Tensor:
    """See `benthic.kernels.ops.linear_swiglu`."""
    return swiglu(linear(x_TI, weight_GI))
