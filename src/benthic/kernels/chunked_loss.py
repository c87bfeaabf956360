"""The output head's loss with gradients made in the forward pass, a chunk of logits at a time.

Where the weight of the loss is known before, gradients need not wait for the backward pass, for which logits
would be computed again: three products instead of four. How a chunk of logits becomes losses and their
gradients is the caller's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from benthic.kernels.reference.norm import wide
from benthic.kernels.wide_product import add_product

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.loss import Wanted


class Turn(Protocol):
    """Turns a chunk of logits [t, V] into losses [t] and, on request, into `softmax - onehot` [t, V]."""

    def __call__(
        self, logits: Tensor, target_t: Tensor, ignore_index: int, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses in the wide dtype, gradients in that of the logits, whose memory may be used for them."""
        ...


class Making(NamedTuple):
    """How losses and gradients are made: see `benthic.kernels.ops.linear_cross_entropy_sum`."""

    factor: float | Tensor
    ignore_index: int
    chunk: int
    wanted: Wanted
    turn: Turn
    fresh: bool


class GradientsInForward(torch.autograd.Function):
    """dh = f (softmax - onehot) W and dW = f (softmax - onehot)^T h, f being the factor of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        into_VD: Tensor | None,
        making: Making,
    ) -> tuple[Tensor, Tensor]:
        """Losses and gradients, chunk by chunk; those of the weight are summed in float32."""
        acc, (to_hidden, to_weight) = wide(hidden_TD.dtype), making.wanted
        loss_T = torch.empty(hidden_TD.shape[0], dtype=acc, device=hidden_TD.device)
        dhidden_TD = torch.empty_like(hidden_TD) if to_hidden else None
        made_VD = torch.zeros_like(weight_VD, dtype=acc) if to_weight and into_VD is None else None
        for start in range(0, hidden_TD.shape[0], making.chunk):
            part = slice(start, start + making.chunk)
            to = None if dhidden_TD is None else dhidden_TD[part], into_VD if made_VD is None else made_VD
            loss_T[part] = _one_chunk(hidden_TD[part], weight_VD, target_T[part], making, to)
            making = making._replace(fresh=False)
        ctx.save_for_backward(dhidden_TD, made_VD)
        ctx.factor, ctx.dtype = making.factor, weight_VD.dtype
        ctx.added = to_weight and into_VD is not None
        total = loss_T.sum()
        ctx.mark_non_differentiable(total)
        return total * making.factor, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times what comes in.

        What went into a sum already cannot be scaled any more: unless 1 comes in, the gradient of hidden is
        NaN, since to look at it would make the host wait for a GPU.
        """
        dhidden_TD, dweight_VD = ctx.saved_tensors
        incoming = grads[0]
        if dhidden_TD is not None:
            scale = incoming * ctx.factor
            if ctx.added:
                scale = torch.where(incoming == 1.0, scale, torch.nan)
            # one dim, so that the product is in float32: a number without dims would be rounded first
            dhidden_TD = torch.mul(dhidden_TD, scale.view(1), out=torch.empty_like(dhidden_TD))
        if dweight_VD is not None:
            dweight_VD = torch.mul(dweight_VD, incoming, out=torch.empty_like(dweight_VD, dtype=ctx.dtype))
        return dhidden_TD, dweight_VD, None, None, None


def _one_chunk(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, making: Making, to: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """The losses of a chunk; its gradients go `to` hidden's and are added to the weight's, where wanted."""
    loss_t, dlogits = making.turn(
        hidden @ weight_VD.t(), target, making.ignore_index, gradient=any(making.wanted)
    )
    dhidden, dweight_VD = to
    if dlogits is not None and dhidden is not None:
        torch.mm(dlogits, weight_VD, out=dhidden)
    if dlogits is not None and dweight_VD is not None and making.wanted.weight:
        factor = making.factor
        if isinstance(factor, torch.Tensor):  # products take numbers of the host alone
            hidden, factor = torch.mul(hidden, factor.view(1), out=torch.empty_like(hidden)), 1.0
        add_product(dweight_VD, dlogits.t(), hidden, factor=factor, fresh=making.fresh)
    return loss_t


def chunk_of(tokens: int, vocabulary: int, itemsize: int, room: int) -> int:
    """Tokens whose logits fit in `room` bytes, spread evenly; whole tiles of 128 where there are so many."""
    most = max(1, room // (itemsize * vocabulary))
    even = -(-tokens // max(1, -(-tokens // most)))
    return max(1, min(most, -(-even // 128) * 128))
