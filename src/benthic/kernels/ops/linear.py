"""Public ops of a plain product of rows with a weight: as decode steps need it, and with SwiGLU behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.moe import gluon_experts
from benthic.kernels.ops.norm import swiglu
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    anywhere,
    device_type,
    inference_only,
    no,
    on,
    one_dtype,
    reference,
    triton_runs,
    with_few_rows,
    yes,
)

if TYPE_CHECKING:
    from torch import Tensor

FEW_MULTIPLIED: Final = 8
"""Rows that the narrow side of one matrix instruction takes."""
OUTPUTS: Final = 4096
"""On an H200 2,048 and 3,072 outputs take 4.3 and 5.5 us (library 6.1 and 6.2), 5,632 of them 10.7 (8.6)."""
MANY_MULTIPLIED: Final = 4096
"""Rows from which tiles of 256 x 128 leave few multiprocessors without one in the last turn."""


def _few_rows(case: Case) -> Verdict:
    """Registers hold all weights of a program's columns, and float32 has twice as many bytes of them."""
    if case.dims[1] > 4096:
        return no(f"holds weights of up to 4096 columns in registers, not {case.dims[1]}")
    if case.device == "cuda" and case.dims[0] > OUTPUTS:
        return no(
            f"the library reads weights of more than {OUTPUTS} outputs faster, these have {case.dims[0]}"
        )
    narrow = (torch.bfloat16, torch.float16)
    dtypes = narrow if case.device == "cuda" else (*narrow, torch.float32)
    reason = "all weights on their way before rows are there"
    return triton_runs(*dtypes, reason=reason, dot=True)(case)


def _gluon(case: Case) -> Verdict:
    """One expert that has all rows."""
    verdict = gluon_experts(case)
    if verdict.runs and not case.many:
        return no("is made for many rows")
    return yes("gates meet ups before half as much is written") if verdict.runs else verdict


LINEAR = Op(
    "linear",
    (
        Implementation(
            "few_rows",
            inference_only(one_dtype(with_few_rows(_few_rows))),
            "benthic.kernels.triton_few_rows:linear",
        ),
        Implementation(
            "torch",
            on("cuda", reason="the library's product, for more rows, outputs or gradients"),
            "benthic.kernels.torch_linear:linear",
        ),
        reference("benthic.kernels.reference.linear:linear"),
    ),
    typical_dims=(2048, 2048),
    trains=False,
)

LINEAR_SWIGLU = Op(
    "linear_swiglu",
    (
        Implementation(
            "gluon", inference_only(one_dtype(_gluon)), "benthic.kernels.gluon_grouped:linear_swiglu"
        ),
        Implementation(
            "two_ops",
            anywhere("linear, then swiglu: see the lines of these"),
            "benthic.kernels.ops.linear:two_ops",
        ),
        reference("benthic.kernels.reference.linear:linear_swiglu"),
    ),
    typical_dims=(5632, 2048),
    trains=False,
)


def linear(x_TI: Tensor, weight_OI: Tensor, *, impl: str | None = None) -> Tensor:
    """`y = x W^T` in one dtype, summed in float32 on a GPU.

    Shapes: x [T, I], weight [O, I] -> [T, O]. `few_rows` may read the weight before kernels ahead of it have
    ended: it must be one that no kernel launched early writes (`benthic.kernels.launch`), as parameters are.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    y_TO: Tensor = LINEAR.choose(_case("linear", x_TI, weight_OI, impl), impl)(x_TI, weight_OI)
    return y_TO


def linear_swiglu(x_TI: Tensor, weight_GI: Tensor, *, impl: str | None = None) -> Tensor:
    """`silu(gate) * up`, where gate and up are the halves of `x W^T`, rounded before SwiGLU.

    Shapes: x [T, I], weight [2F, I] with all gates first -> [T, F].
    Raises: ShapeError when operands disagree or 2F is odd; BackendError when `impl` cannot run.
    """
    case = _case("linear_swiglu", x_TI, weight_GI, impl)
    if case.dims[0] % 2:
        msg = f"linear_swiglu: outputs are gates and ups, so they must be even, not {case.dims[0]}"
        raise ShapeError(msg)
    out_TF: Tensor = LINEAR_SWIGLU.choose(case, impl)(x_TI, weight_GI)
    return out_TF


def two_ops(x_TI: Tensor, weight_GI: Tensor) -> Tensor:
    """See `linear_swiglu`; the table is asked for each of the two."""
    return swiglu(linear(x_TI, weight_GI))


def _case(name: str, x_TI: Tensor, weight_OI: Tensor, impl: str | None) -> Case:
    """The case of a product whose operands fit."""
    if x_TI.dim() != 2 or weight_OI.dim() != 2 or x_TI.shape[1] != weight_OI.shape[1]:
        msg = (
            f"{name}: rows {tuple(x_TI.shape)} and a weight {tuple(weight_OI.shape)}; expected [T, I], [O, I]"
        )
        raise ShapeError(msg)
    rows = x_TI.shape[0]
    return Case(
        device_type(x_TI),
        x_TI.dtype,
        tuple(weight_OI.shape),
        grad=torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad),
        mixed=weight_OI.dtype is not x_TI.dtype,
        few=rows <= FEW_MULTIPLIED,
        many=impl is not None or rows >= MANY_MULTIPLIED,
    )
