"""Public op of a plain product of rows with a weight, as decode steps need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    device_type,
    inference_only,
    no,
    on,
    one_dtype,
    reference,
    triton_runs,
    with_few_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

FEW_MULTIPLIED: Final = 8
"""Rows that the narrow side of one matrix instruction takes."""
OUTPUTS: Final = 4096
"""On an H200 2,048 and 3,072 outputs take 4.3 and 5.5 us (library 6.1 and 6.2), 5,632 of them 10.7 (8.6)."""


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


def linear(x_TI: Tensor, weight_OI: Tensor, *, impl: str | None = None) -> Tensor:
    """`y = x W^T` in one dtype, summed in float32 on a GPU.

    Shapes: x [T, I], weight [O, I] -> [T, O]. `few_rows` may read the weight before kernels ahead of it have
    ended: it must be one that no kernel launched early writes (`benthic.kernels.launch`), as parameters are.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    if x_TI.dim() != 2 or weight_OI.dim() != 2 or x_TI.shape[1] != weight_OI.shape[1]:
        msg = (
            f"linear: rows {tuple(x_TI.shape)} and a weight {tuple(weight_OI.shape)}; expected [T, I], [O, I]"
        )
        raise ShapeError(msg)
    case = Case(
        device_type(x_TI),
        x_TI.dtype,
        tuple(weight_OI.shape),
        grad=torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad),
        mixed=weight_OI.dtype is not x_TI.dtype,
        few=x_TI.shape[0] <= FEW_MULTIPLIED,
    )
    y_TO: Tensor = LINEAR.choose(case, impl)(x_TI, weight_OI)
    return y_TO
