"""Public ops of a linear layer's gradients, for a weight per expert or a result wider than its operands."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.errors import ShapeError
from benthic.kernels.ops.moe import GROUPED_LINEAR
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    gluon_refusal,
    no,
    on,
    reference,
    triton_runs,
    yes,
)

_ITEMSIZE = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}


def _grouped_mm(case: Case) -> Verdict:
    """The grouped product of torch: one dtype in and out, rows of a multiple of 16 bytes."""
    takes = (torch.float32, torch.bfloat16) if case.device == "cpu" else (torch.bfloat16,)
    *widths, result = case.dims
    if case.dtype not in takes:
        return no(f"runs on {case.device} in {', '.join(map(str, takes))}, not {case.dtype}")
    if result != case.dtype.itemsize:
        return no(f"gives {case.dtype}, not elements of {result} bytes")
    if any(width * case.dtype.itemsize % 16 for width in widths):
        return no(f"needs rows of a multiple of 16 bytes, not {widths} elements of {case.dtype.itemsize}")
    return yes("torch's grouped product")


def gluon_experts(case: Case) -> Verdict:
    """Operands by TMA as they lie, products by wgmma, sums written or added in the second-level cache."""
    if (refusal := gluon_refusal(case)) is not None:
        return no(refusal)
    if any(width % 8 for width in case.dims[:2]):
        return no(f"needs rows of a multiple of 16 bytes, not {list(case.dims[:2])} elements of 2")
    return yes("our grouped product for Hopper: a warp loads, two groups multiply 128 x 256 tiles")


# The input gradient is the product with the transposed weight. The C kernel wants its weights like that, but
# it is made for the few rows of a decode step: 15 times slower than torch's at 2048 of them.
GROUPED_INPUT_GRADIENT = Op(
    "grouped_input_gradient",
    tuple(way for way in GROUPED_LINEAR.implementations if way.name not in ("native", "few_rows")),
    typical_dims=(1408, 2048),
)
WEIGHT_GRADIENT = Op(
    "weight_gradient",
    (
        Implementation(
            "mm_wide",
            on("cuda", torch.bfloat16, torch.float16, reason="one product, float32 from its accumulator"),
            "benthic.kernels.torch_linear_gradients:mm_wide",
        ),
        reference("benthic.kernels.reference.moe:weight_gradient"),
    ),
)
GROUPED_WEIGHT_GRADIENT = Op(
    "grouped_weight_gradient",
    (
        Implementation("grouped_mm", _grouped_mm, "benthic.kernels.torch_linear_gradients:grouped_mm"),
        Implementation(
            "gluon", gluon_experts, "benthic.kernels.gluon_expert_gradient:grouped_weight_gradient"
        ),
        Implementation(
            "triton",
            triton_runs(
                torch.bfloat16,
                torch.float16,
                torch.float32,
                reason="our grouped product: any width, float32 from its accumulator",
                dot=True,
            ),
            "benthic.kernels.triton_moe:grouped_weight_gradient",
        ),
        reference("benthic.kernels.reference.moe:grouped_weight_gradient"),
    ),
    typical_dims=(2048, 1408, 4),
)


def grouped_input_gradient(
    dy_RO: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, impl: str | None = None
) -> Tensor:
    """`dx_r = dy_r W_e` for rows sorted by expert; rows past `ends[-1]` give zeros.

    Shapes: dy [R, O], weight [E, O, I], one dtype; ends int32 [E].
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    Cost: 2 R I O FLOPs.
    """
    if dy_RO.shape[1] != weight_EOI.shape[1] or dy_RO.dtype != weight_EOI.dtype:
        msg = (
            f"grouped_input_gradient: gradients are {dy_RO.shape[1]} wide in {dy_RO.dtype} but weights give "
            f"{weight_EOI.shape[1]} in {weight_EOI.dtype}"
        )
        raise ShapeError(msg)
    case = Case(dy_RO.device.type, dy_RO.dtype, (weight_EOI.shape[1], weight_EOI.shape[2]))
    out: Tensor = GROUPED_INPUT_GRADIENT.choose(case, impl)(dy_RO, weight_EOI.transpose(1, 2), ends_E)
    return out


def weight_gradient(
    dy_RO: Tensor,
    x_RI: Tensor,
    ends_E: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """`dW = dy^T x`, summed over all rows, or over each expert's own rows.

    Shapes: dy [R, O] and x [R, I], one dtype; ends int32 [E], where each expert's rows end, or None.
    Returns: [O, I], or [E, O, I] with zeros for an expert without rows; in `dtype` (None: that of x), summed
    in float32. Rows past `ends[-1]` take no part. Not differentiable.
    Raises: ShapeError when rows or dtypes disagree; BackendError when `impl` cannot run.
    Cost: 2 R I O FLOPs.
    """
    if dy_RO.shape[0] != x_RI.shape[0] or dy_RO.dtype != x_RI.dtype:
        msg = (
            f"weight_gradient: {dy_RO.shape[0]} output gradients in {dy_RO.dtype} but {x_RI.shape[0]} rows "
            f"in {x_RI.dtype}; give one gradient per row, in one dtype"
        )
        raise ShapeError(msg)
    dtype = x_RI.dtype if dtype is None else dtype
    dims = (x_RI.shape[1], dy_RO.shape[1], _ITEMSIZE[dtype])
    case = Case(x_RI.device.type, x_RI.dtype, dims)
    if ends_E is None:
        out: Tensor = WEIGHT_GRADIENT.choose(case, impl)(dy_RO, x_RI, dtype=dtype)
    else:
        out = GROUPED_WEIGHT_GRADIENT.choose(case, impl)(dy_RO, x_RI, ends_E, dtype=dtype)
    return out
