"""The output head's loss over chunks of tokens, so that the logits matrix never exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benthic.kernels.chunked_loss import GradientsInForward, Making, chunk_of
from benthic.kernels.reference.norm import wide
from benthic.kernels.wide_product import add_product

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.loss import Wanted

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.linear_cross_entropy`; returns `(loss_T, argmax_T)`."""
    if chunk is None:
        chunk = max(1, _CHUNK_BYTES.get(hidden_TD.device.type, 512 << 20) // (4 * weight_VD.shape[0]))
    result: tuple[Tensor, Tensor] = _Chunked.apply(hidden_TD, weight_VD, target_T.long(), ignore_index, chunk)
    return result


class _Chunked(torch.autograd.Function):
    """loss_t = lse_t - logit_t[target]; dlogits_t = (softmax(logits_t) - onehot) * dloss_t, computed again.

    The gradient of the weights needs dloss, which is known only in backward, so logits are computed twice and
    only the log-sum-exp is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, ignore_index: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and best token, chunk by chunk."""
        tokens, acc = hidden_TD.shape[0], wide(hidden_TD.dtype)
        kept_T = target_T != ignore_index
        index_T = target_T.masked_fill(~kept_T, 0)
        lse_T = torch.empty(tokens, dtype=acc, device=hidden_TD.device)
        chosen_T = torch.empty_like(lse_T)
        argmax_T = torch.empty_like(index_T)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logits = (hidden_TD[part] @ weight_VD.t()).to(acc)
            torch.argmax(logits, dim=-1, out=argmax_T[part])
            torch.gather(logits, 1, index_T[part, None], out=chosen_T[part, None])
            torch.logsumexp(logits, dim=-1, out=lse_T[part])
        ctx.save_for_backward(hidden_TD, weight_VD, index_T, kept_T, lse_T)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(argmax_T)
        return (lse_T - chosen_T).masked_fill_(~kept_T, 0.0), argmax_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of hidden and weight; those of the weight are summed over chunks in float32."""
        hidden_TD, weight_VD, index_T, kept_T, lse_T = ctx.saved_tensors
        dloss_T = grads[0].to(lse_T.dtype) * kept_T
        dhidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=lse_T.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_TD.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden_TD[part] @ weight_VD.t()).to(lse_T.dtype)
            dlogits = logits.sub_(lse_T[part, None]).exp_().mul_(dloss_T[part, None])
            dlogits.scatter_add_(1, index_T[part, None], -dloss_T[part, None])
            dlogits = dlogits.to(hidden_TD.dtype)
            if dhidden_TD is not None:
                torch.mm(dlogits, weight_VD, out=dhidden_TD[part])
            if dweight_VD is not None:
                add_product(dweight_VD, dlogits.t(), hidden_TD[part])
        if dweight_VD is not None:
            dweight_VD = dweight_VD.to(weight_VD.dtype)
        return dhidden_TD, dweight_VD, None, None, None


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
    """See `benthic.kernels.ops.linear_cross_entropy_sum`."""
    if chunk is None:
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        room = _CHUNK_BYTES.get(hidden_TD.device.type, 512 << 20)
        chunk = chunk_of(tokens, vocabulary, wide(hidden_TD.dtype).itemsize, room)
    result: tuple[Tensor, Tensor] = GradientsInForward.apply(
        hidden_TD,
        weight_VD,
        target_T.long(),
        into_VD,
        Making(factor, ignore_index, chunk, wanted, turn, fresh),
    )
    return result


def turn(
    logits: Tensor, target_t: Tensor, ignore_index: int, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """See `benthic.kernels.chunked_loss.Turn`."""
    dtype, dropped_t = logits.dtype, (target_t == ignore_index)
    logits = logits.to(wide(dtype))
    index = target_t.masked_fill(dropped_t, 0)[:, None]
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss_t = (lse - logits.gather(1, index)).squeeze(1).masked_fill_(dropped_t, 0.0)
    if not gradient:
        return loss_t, None
    dlogits = logits.sub_(lse).exp_()
    dlogits.scatter_add_(1, index, dlogits.new_full((), -1.0).expand_as(index))
    return loss_t, dlogits.masked_fill_(dropped_t[:, None], 0.0).to(dtype)
