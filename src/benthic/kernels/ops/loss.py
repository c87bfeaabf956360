"""Public op: the output head's cross-entropy without the logits matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, anywhere, device_type, reference

if TYPE_CHECKING:
    from torch import Tensor

LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    (
        Implementation(
            "chunked",
            anywhere("library products over chunks of tokens; the logits matrix never exists"),
            "benthic.kernels.torch_loss:linear_cross_entropy",
        ),
        reference("benthic.kernels.reference.loss:linear_cross_entropy"),
    ),
)


@overload
def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    ignore_index: int = ...,
    chunk: int | None = ...,
    return_argmax: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    ignore_index: int = ...,
    chunk: int | None = ...,
    return_argmax: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    return_argmax: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`-log softmax(W h)[target]` of every token.

    Shapes: hidden [T, D], weight [V, D], one dtype; target integer [T] in [0, V) or `ignore_index`. `chunk`
    is the number of tokens whose logits exist at once (None: 64 MiB of logits on a CPU, 512 MiB on a GPU).
    Returns: loss float32 [T] (0 where ignored), differentiable in hidden and weight; with `return_argmax`
    also the most likely token, int64 [T], of every token including ignored ones.
    Raises: ShapeError when operands disagree.
    Cost: logits are computed again in backward, 8 T V D FLOPs in all; memory `chunk * V` instead of `T * V`.
    """
    if hidden_TD.shape[1] != weight_VD.shape[1] or hidden_TD.dtype != weight_VD.dtype:
        msg = (
            f"linear_cross_entropy: hidden is {hidden_TD.shape[1]} wide in {hidden_TD.dtype} but the head "
            f"expects {weight_VD.shape[1]} in {weight_VD.dtype}"
        )
        raise ShapeError(msg)
    if target_T.shape != hidden_TD.shape[:1]:
        msg = (
            f"linear_cross_entropy: {hidden_TD.shape[0]} tokens but targets of shape {tuple(target_T.shape)}"
        )
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    case = Case(device_type(hidden_TD), hidden_TD.dtype, grad=grad)
    loss_T, argmax_T = LINEAR_CROSS_ENTROPY.choose(case, impl)(
        hidden_TD, weight_VD, target_T, ignore_index=ignore_index, chunk=chunk
    )
    return (loss_T, argmax_T) if return_argmax else loss_T
