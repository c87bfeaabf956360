"""Gradients for grouped products that are given: torch's, completed in a way of a device's own, or ours."""

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
        ctx: Any,
        x_RI: Tensor,
        weight_EOI: Tensor,
        ends_E: Tensor,
        multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Save the operands; `multiply` takes rows [R, K], weights [E, N, K] in either order, and ends."""
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        ctx.multiply = multiply
        return multiply(x_RI, weight_EOI, ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of rows and weights; an expert without rows has a zero gradient."""
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        dy_RO = grads[0].contiguous()
        dx_RI = dweight_EOI = None
        if ctx.needs_input_grad[0]:
            dx_RI = ctx.multiply(dy_RO, weight_EOI.transpose(1, 2), ends_E)
        if ctx.needs_input_grad[1]:
            dweight_EOI = F.grouped_mm(dy_RO.t(), x_RI, offs=ends_E)
        return dx_RI, dweight_EOI, None, None
