"""Definition of the output head's loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels.reference.norm import wide


class Wanted(NamedTuple):
    """Which gradients are made."""

    hidden: bool
    weight: bool


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """`-log softmax(W h)[target]` per token and the best token, through the whole logits matrix.

    Returns `(loss_T, argmax_T)`; a token whose target is `ignore_index` has loss 0.
    """
    del chunk  # the definition has no chunks
    logits_TV = (hidden_TD @ weight_VD.T).to(wide(hidden_TD.dtype))
    loss_T = F.cross_entropy(logits_TV, target_T.long(), reduction="none", ignore_index=ignore_index)
    return loss_T, torch.argmax(logits_TV, dim=-1)


def linear_cross_entropy_sum(  # noqa: PLR0913 (the loss, and where its gradients go)
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    factor: float | Tensor,
    ignore_index: int,
    chunk: int | None,
    into_VD: Tensor | None,
    fresh: bool,
    wanted: Wanted,
) -> tuple[Tensor, Tensor]:
    """`factor` times the sum of all losses, and that sum without a gradient.

    With `into`, the gradient of the weight is added there when the backward pass reaches it.
    """
    if into_VD is not None and wanted.weight:
        if fresh:
            into_VD.zero_()
        weight_VD = _AddedTo.apply(weight_VD, into_VD)
    loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, target_T, ignore_index=ignore_index, chunk=chunk)
    total = loss_T.sum()
    return total * factor, total.detach()


class _AddedTo(torch.autograd.Function):
    """The weight itself, whose gradient goes into a sum and no further."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, into: Tensor) -> Tensor:
        """Remember the sum."""
        ctx.into = into
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        """Add."""
        ctx.into.add_(grads[0])
        return None, None
