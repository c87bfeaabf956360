"""FP8 products through cuBLAS, which wants its scales column by column and padded (Hopper, CUDA 12.9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F
from torch.nn.functional import ScalingType

from benthic.kernels.reference.fp8_linear import by_column, spaced
from benthic.kernels.reference.moe import squares_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benthic.kernels.reference.fp8_linear import Fp8


def linear(x: Fp8, weight: Fp8, ends_E: None, *, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 (no experts)
    """See `benthic.kernels.ops.fp8_linear`.

    The scales of x lie column by column, the rows padded to a multiple of 4; those of the weight row by row
    with rows of a multiple of 4. What lies so already is not copied: see `benthic.kernels.ops.spaced`.
    """
    rows = x.values.shape[0]
    values, scale = x.values, x.scale
    if rows % 4:
        values, scale = (F.pad(t, (0, 0, 0, -rows % 4)) for t in (values, scale))
    padded = spaced(weight.scale)
    if padded.shape[1] % 4:  # what lies between its rows is part of it for cuBLAS
        padded = padded.as_strided((padded.shape[0], padded.stride(0)), padded.stride())
    out: Tensor = F.scaled_mm(
        values,
        weight.values.contiguous().t(),
        by_column(scale),
        ScalingType.BlockWise1x128,
        padded.t(),
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )
    return out[:rows] if rows % 4 else out


def weight_gradient(dy: Fp8, x: Fp8, ends_E: None, *, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """See `benthic.kernels.ops.fp8_weight_gradient`; both operands have one scale per row and 128 of K."""
    scales = [by_column(operand.scale) for operand in (dy, x)]
    out: Tensor = F.scaled_mm(
        dy.values,
        x.values.t(),
        scales[0],
        ScalingType.BlockWise1x128,
        scales[1],
        ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )
    return out


def add_weight_gradient(
    into: Tensor, dy: Fp8, x: Fp8, ends_E: None, *, fresh: bool, squares: bool = False
) -> Tensor | None:
    """See `benthic.kernels.ops.add_fp8_weight_gradient`; cuBLAS writes, a second kernel adds."""
    gradient = weight_gradient(dy, x, ends_E, dtype=into.dtype)
    if fresh:
        into.copy_(gradient)
    else:
        into.add_(gradient)
    return squares_of(into) if squares else None
