"""Public ops on the dims of every head: join two parts, split them, multiply each by its own matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    device_type,
    inference_only,
    no,
    on,
    one_dtype,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.table import Verdict

_TRITON = one_dtype(
    triton_runs(
        torch.bfloat16, torch.float16, torch.float32, reason="one kernel that copies 16 bytes at a time"
    )
)


def _joins_gradients(case: Case) -> Verdict:
    return _TRITON(case) if case.grad else no("joins gradients, and none are recorded")


JOIN_HEAD_DIMS = Op(
    "join_head_dims",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_heads:join_head_dims"),
        reference("benthic.kernels.reference.heads:join_head_dims"),
    ),
)
SPLIT_HEAD_DIMS = Op(
    "split_head_dims",
    (
        Implementation("triton", _joins_gradients, "benthic.kernels.triton_heads:split_head_dims"),
        reference("benthic.kernels.reference.heads:split_head_dims"),
    ),
)
HEADS_LINEAR = Op(
    "heads_linear",
    (
        Implementation(
            "torch",
            inference_only(one_dtype(on("cuda", reason="writes rows where they are wanted"))),
            "benthic.kernels.torch_heads:heads_linear",
        ),
        reference("benthic.kernels.reference.heads:heads_linear"),
    ),
)


def join_head_dims(first_THa: Tensor, second: Tensor, *, impl: str | None = None) -> Tensor:
    """Put two parts of every head side by side: `[T, H, a + b]`, contiguous.

    Shapes: first [T, H, a]; second [T, H, b], or [T, b] for all heads; one dtype, any strides. Differentiable
    in both: gradients are views of the output's, summed over the heads that share an operand.
    Raises: ShapeError when tokens or heads disagree; BackendError when `impl` cannot run.
    """
    if first_THa.dim() != 3 or second.shape[:-1] not in (first_THa.shape[:2], first_THa.shape[:1]):
        msg = (
            f"join_head_dims: first {tuple(first_THa.shape)} and second {tuple(second.shape)} disagree; they "
            "must be [T, H, a] and [T, H, b] or [T, b]"
        )
        raise ShapeError(msg)
    case = Case(
        device_type(first_THa),
        first_THa.dtype,
        grad=torch.is_grad_enabled() and (first_THa.requires_grad or second.requires_grad),
        mixed=second.dtype is not first_THa.dtype,
    )
    out_THw: Tensor = JOIN_HEAD_DIMS.choose(case, impl)(first_THa, second)
    return out_THw


def split_head_dims(x_THw: Tensor, first: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """View the first `first` columns of every head, and the others: `([T, H, a], [T, H, b])`.

    Shapes: x [T, H, a + b]. Differentiable: the gradients of both are joined as `join_head_dims` does.
    Raises: ShapeError unless x has three dims and `first` is between 1 and the last less one; BackendError
        when `impl` cannot run.
    """
    if x_THw.dim() != 3 or not 0 < first < x_THw.shape[-1]:
        msg = f"split_head_dims: {first} columns of {tuple(x_THw.shape)} leave nothing on one side"
        raise ShapeError(msg)
    case = Case(device_type(x_THw), x_THw.dtype, grad=torch.is_grad_enabled() and x_THw.requires_grad)
    parts: tuple[Tensor, Tensor] = SPLIT_HEAD_DIMS.choose(case, impl)(x_THw, first)
    return parts


def heads_linear(x_THI: Tensor, weight_HOI: Tensor, *, impl: str | None = None) -> Tensor:
    """`out_th = W_h x_th`: every head has a matrix of its own.

    Shapes: x [T, H, I], weight [H, O, I], any strides -> [T, H, O]. On a GPU heads of a row lie side by side
    where no gradients are recorded, so that the product that follows copies nothing. Differentiable.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    if x_THI.dim() != 3 or x_THI.shape[1:] != (weight_HOI.shape[0], weight_HOI.shape[-1]):
        msg = f"heads_linear: rows {tuple(x_THI.shape)} and weights {tuple(weight_HOI.shape)} disagree"
        raise ShapeError(msg)
    case = Case(
        device_type(x_THI),
        x_THI.dtype,
        grad=torch.is_grad_enabled() and (x_THI.requires_grad or weight_HOI.requires_grad),
        mixed=weight_HOI.dtype is not x_THI.dtype,
    )
    out_THO: Tensor = HEADS_LINEAR.choose(case, impl)(x_THI, weight_HOI)
    return out_THO
