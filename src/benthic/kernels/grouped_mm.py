"""Gradients for torch's grouped product, which a CPU and a GPU each complete in their own way.

The library leaves the rows past the last expert's end unwritten; how to clear them is the caller's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class GroupedMm(torch.autograd.Function):
    """Three grouped products: y = x W^T, dx = dy W, dW = dy^T x per expert."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, clear: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Save the operands; `clear` zeroes the rows past the last end."""
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        ctx.clear = clear
        return clear(F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of rows and weights; an expert without rows has a zero gradient."""
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        dy_RO = grads[0].contiguous()
        dx_RI = dweight_EOI = None
        if ctx.needs_input_grad[0]:
            dx_RI = ctx.clear(F.grouped_mm(dy_RO, weight_EOI, offs=ends_E), ends_E)
        if ctx.needs_input_grad[1]:
            dweight_EOI = F.grouped_mm(dy_RO.t(), x_RI, offs=ends_E)
        return dx_RI, dweight_EOI, None, None
