"""Public op: the output head's cross-entropy without the logits matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from benthic.errors import ShapeError
from benthic.kernels.reference.loss import Wanted
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    anywhere,
    device_type,
    reference,
    triton_runs,
)

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
LINEAR_CROSS_ENTROPY_SUM = Op(
    "linear_cross_entropy_sum",
    (
        Implementation(
            "triton",
            triton_runs(
                torch.bfloat16,
                torch.float16,
                torch.float32,
                reason="library products; one kernel turns a chunk of logits into losses and gradients",
            ),
            "benthic.kernels.triton_loss:linear_cross_entropy_sum",
        ),
        Implementation(
            "chunked",
            anywhere("library products over chunks of tokens; gradients are made in the forward pass"),
            "benthic.kernels.torch_loss:linear_cross_entropy_sum",
        ),
        reference("benthic.kernels.reference.loss:linear_cross_entropy_sum"),
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
    _check("linear_cross_entropy", hidden_TD, weight_VD, target_T)
    grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    case = Case(device_type(hidden_TD), hidden_TD.dtype, grad=grad)
    loss_T, argmax_T = LINEAR_CROSS_ENTROPY.choose(case, impl)(
        hidden_TD, weight_VD, target_T, ignore_index=ignore_index, chunk=chunk
    )
    return (loss_T, argmax_T) if return_argmax else loss_T


def linear_cross_entropy_sum(  # noqa: PLR0913 (the loss, and where its gradients go)
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    factor: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    into_VD: Tensor | None = None,
    fresh: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`factor * sum_t -log softmax(W h_t)[target_t]`, and the sum itself, which has no gradient.

    The factor is known before the backward pass, so gradients are made while a chunk's logits are there. As a
    float32 scalar on the device, which a CUDA graph may find changed, it costs a rounding of hidden.

    Shapes: as `linear_cross_entropy`; `into` like the weight and at least as wide. With it, and where
    autograd records, the gradient of the weight is added to `into` by this call (the definition does so in
    backward), or with `fresh` written whatever it held, and autograd gets none; backward must then start from
    the loss with 1, or the gradient of hidden is NaN. `chunk`: 64 MiB of logits on a CPU, 600 MiB on a GPU.
    Returns: two scalars, float32 (float64 operands: float64).
    Raises: ShapeError when operands disagree.
    Cost: 6 T V D FLOPs with gradients, 2 T V D without; memory `chunk * V`, and the weight's gradient in
    float32 until backward unless `into` takes it.
    """
    _check("linear_cross_entropy_sum", hidden_TD, weight_VD, target_T)
    if into_VD is not None and into_VD.shape != weight_VD.shape:
        msg = (
            f"linear_cross_entropy_sum: gradients of a head {tuple(weight_VD.shape)} cannot be added to "
            f"{tuple(into_VD.shape)}"
        )
        raise ShapeError(msg)
    grad = torch.is_grad_enabled()
    wanted = Wanted(grad and hidden_TD.requires_grad, grad and weight_VD.requires_grad)
    case = Case(device_type(hidden_TD), hidden_TD.dtype, grad=any(wanted))
    if fresh and into_VD is not None and not (wanted.weight and hidden_TD.shape[0]):
        into_VD.zero_()  # nothing will be written
    out: tuple[Tensor, Tensor] = LINEAR_CROSS_ENTROPY_SUM.choose(case, impl)(
        hidden_TD,
        weight_VD,
        target_T,
        factor=factor,
        ignore_index=ignore_index,
        chunk=chunk,
        into_VD=into_VD,
        fresh=fresh and into_VD is not None,
        wanted=wanted,
    )
    return out


def _check(op: str, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> None:
    if hidden_TD.shape[1] != weight_VD.shape[1] or hidden_TD.dtype != weight_VD.dtype:
        msg = (
            f"{op}: hidden is {hidden_TD.shape[1]} wide in {hidden_TD.dtype} but the head "
            f"expects {weight_VD.shape[1]} in {weight_VD.dtype}"
        )
        raise ShapeError(msg)
    if target_T.shape != hidden_TD.shape[:1]:
        msg = f"{op}: {hidden_TD.shape[0]} tokens but targets of shape {tuple(target_T.shape)}"
        raise ShapeError(msg)
