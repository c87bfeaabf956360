"""Weight gradients through torch's products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from benthic.kernels.wide_product import add_product

if TYPE_CHECKING:
    from torch import Tensor


def mm_wide(dy_RO: Tensor, x_RI: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `benthic.kernels.ops.weight_gradient`; CUDA, where a product may leave in a wider dtype."""
    if dtype == x_RI.dtype:
        return dy_RO.t() @ x_RI
    return torch.mm(dy_RO.t(), x_RI, out_dtype=dtype)


def grouped_mm(dy_RO: Tensor, x_RI: Tensor, ends_E: Tensor, *, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """See `benthic.kernels.ops.weight_gradient`; one dtype in and out."""
    return F.grouped_mm(dy_RO.contiguous().t(), x_RI, offs=ends_E)


def add(into: Tensor, dy_RO: Tensor, x_RI: Tensor, *, fresh: bool) -> None:
    """See `benthic.kernels.ops.add_weight_gradient`."""
    add_product(into, dy_RO.t(), x_RI, fresh=fresh)
