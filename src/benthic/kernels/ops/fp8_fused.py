"""Public ops that quantise to E4M3 what they read or compute, in one pass over memory.

Each gives, to the bit, what the ops in its name give one after the other. Norms do where rows are wider than
64 and their width and strides are multiples of 16 elements; others may be summed in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.fp8 import quantise_fp8_rows
from benthic.kernels.ops.fp8_linear import MANY_VALUES, quantise_fp8_columns
from benthic.kernels.ops.fp8_ways import gluon_square_pairs, gluon_squares
from benthic.kernels.ops.norm import (
    check_swiglu_gradient,
    check_weighted_swiglu_gradient,
    swiglu_gradient,
    weighted_swiglu_gradient,
)
from benthic.kernels.reference.fp8_linear import TILE, Fp8
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    anywhere,
    device_type,
    inference_only,
    one_dtype,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TRITON = inference_only(triton_runs(*_FLOATS, reason="one kernel that reads and writes every tile once"))

QUANTISE_FP8_BOTH = Op(
    "quantise_fp8_both",
    (
        Implementation(
            "gluon", inference_only(gluon_squares), "benthic.kernels.gluon_fp8_squares:quantise_both"
        ),
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8_fused:quantise_both"),
        reference("benthic.kernels.reference.fp8_fused:quantise_both"),
    ),
    typical_dims=(2048,),
    trains=False,
)
SWIGLU_FP8 = Op(
    "swiglu_fp8",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8_fused:swiglu"),
        reference("benthic.kernels.reference.fp8_fused:swiglu"),
    ),
    trains=False,
)
SWIGLU_GRADIENT_FP8_BOTH = Op(
    "swiglu_gradient_fp8_both",
    (
        Implementation(
            "gluon",
            inference_only(one_dtype(gluon_square_pairs)),
            "benthic.kernels.gluon_fp8_swiglu:swiglu_gradient_both",
        ),
        Implementation(
            "two_ops",
            anywhere("swiglu_gradient, then quantise_fp8_both: see the lines of these"),
            "benthic.kernels.ops.fp8_fused:gradient_then_tiles",
        ),
        reference("benthic.kernels.reference.fp8_fused:swiglu_gradient_both"),
    ),
    typical_dims=(1408,),
    trains=False,
)
WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH = Op(
    "weighted_swiglu_gradient_fp8_both",
    (
        Implementation(
            "gluon",
            inference_only(one_dtype(gluon_square_pairs)),
            "benthic.kernels.gluon_fp8_swiglu:weighted_swiglu_gradient_both",
        ),
        Implementation(
            "two_ops",
            anywhere("weighted_swiglu_gradient, then quantise_fp8_both: see the lines of these"),
            "benthic.kernels.ops.fp8_fused:weighted_gradient_then_tiles",
        ),
        reference("benthic.kernels.reference.fp8_fused:weighted_swiglu_gradient_both"),
    ),
    typical_dims=(1408,),
    trains=False,
)
RMS_NORM_FP8 = Op(
    "rms_norm_fp8",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8_fused:rms_norm"),
        reference("benthic.kernels.reference.fp8_fused:rms_norm"),
    ),
    trains=False,
)
ADD_RMS_NORM_FP8 = Op(
    "add_rms_norm_fp8",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8_fused:add_rms_norm"),
        reference("benthic.kernels.reference.fp8_fused:add_rms_norm"),
    ),
    trains=False,
)


def quantise_fp8_both(
    x_RI: Tensor, ends_E: Tensor | None = None, *, power_of_two: bool = False, impl: str | None = None
) -> tuple[Fp8, Fp8]:
    """`quantise_fp8_rows` and `quantise_fp8_columns` of the same rows, which are read once.

    Shapes: x float [R, I]; ends int32 [E] or None. Returns row tiles of [R, I], also of rows past the last
    end, and column tiles [I, P], where those are zeros.
    Raises: ShapeError when x is not a matrix; BackendError when `impl` cannot run.
    Cost: x is read, 2 bytes an element are written. Rows that do not fill their last tile are read twice: on
    an H200 with Triton 3.6 the kernel that reads them once gave other bits for their columns.
    """
    _check_matrix("quantise_fp8_both", x_RI)
    if impl is None and x_RI.is_cuda and x_RI.shape[1] % TILE:
        by_row = Fp8(*quantise_fp8_rows(x_RI, power_of_two=power_of_two, by_column=True))
        return by_row, quantise_fp8_columns(x_RI, ends_E, power_of_two=power_of_two)
    case = _case(x_RI)._replace(many=impl is not None or x_RI.numel() >= MANY_VALUES)
    out: tuple[Fp8, Fp8] = QUANTISE_FP8_BOTH.choose(case, impl)(x_RI, ends_E, power_of_two=power_of_two)
    return out


def swiglu_fp8(gate_up_RF2: Tensor, *, power_of_two: bool = False, impl: str | None = None) -> Fp8:
    """Row tiles of `swiglu`: `silu(gate) * up`, rounded to the input's dtype, then quantised.

    Shapes: gate_up float [R, 2F]; row tiles of [R, F]. Not differentiable.
    Raises: ShapeError when gate_up is no matrix of even width; BackendError when `impl` cannot run.
    Cost: gate_up is read, 1 byte an element of the output is written.
    """
    _check_matrix("swiglu_fp8", gate_up_RF2)
    if gate_up_RF2.shape[1] % 2:
        msg = f"swiglu_fp8: the last dim holds gate and up, so it must be even, not {gate_up_RF2.shape[1]}"
        raise ShapeError(msg)
    out: Fp8 = SWIGLU_FP8.choose(_case(gate_up_RF2), impl)(gate_up_RF2, power_of_two=power_of_two)
    return out


def swiglu_gradient_fp8_both(
    gate_up_RF2: Tensor,
    dy_RF: Tensor,
    ends_E: Tensor | None = None,
    *,
    power_of_two: bool = False,
    impl: str | None = None,
) -> tuple[Fp8, Fp8]:
    """`quantise_fp8_both` of `swiglu_gradient`, which is rounded to the dtype of gate_up first.

    Shapes: gate_up float [R, 2F]; dy float [R, F]; ends int32 [E] or None. Returns row tiles of [R, 2F] and
    column tiles [2F, P]. The bits are those of both ops, as long as no `dy * up` reaches 1e26.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: gate_up and dy are read, 2 bytes an element of gate_up are written.
    """
    _check_matrix("swiglu_gradient_fp8_both", gate_up_RF2)
    check_swiglu_gradient("swiglu_gradient_fp8_both", gate_up_RF2, dy_RF)
    many = impl is not None or gate_up_RF2.numel() >= MANY_VALUES
    case = _case(gate_up_RF2, dy_RF)._replace(
        dims=(dy_RF.shape[1],), mixed=dy_RF.dtype is not gate_up_RF2.dtype, many=many
    )
    out: tuple[Fp8, Fp8] = SWIGLU_GRADIENT_FP8_BOTH.choose(case, impl)(
        gate_up_RF2, dy_RF, ends_E, power_of_two=power_of_two
    )
    return out


def gradient_then_tiles(
    gate_up_RF2: Tensor, dy_RF: Tensor, ends_E: Tensor | None, *, power_of_two: bool
) -> tuple[Fp8, Fp8]:
    """See `swiglu_gradient_fp8_both`; the table is asked for each of the two."""
    return quantise_fp8_both(swiglu_gradient(gate_up_RF2, dy_RF), ends_E, power_of_two=power_of_two)


def weighted_swiglu_gradient_fp8_both(
    gate_up_RF2: Tensor,
    dy_RF: Tensor,
    weight_R: Tensor,
    ends_E: Tensor | None = None,
    *,
    power_of_two: bool = False,
    impl: str | None = None,
) -> tuple[Fp8, Fp8, Tensor]:
    """`quantise_fp8_both` of `weighted_swiglu_gradient`, rounded to the dtype of gate_up first; and dweight.

    Shapes: gate_up float [R, 2F]; dy float [R, F]; weight any float [R]; ends int32 [E] or None. Returns row
    tiles of [R, 2F], column tiles [2F, P] and float32 [R]. Tiles have the bits of both ops, as long as no
    `dy * up` reaches 1e26; `dweight` may be summed in another order, which is always the same.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: gate_up and dy are read, 2 bytes an element of gate_up are written.
    """
    _check_matrix("weighted_swiglu_gradient_fp8_both", gate_up_RF2)
    check_weighted_swiglu_gradient("weighted_swiglu_gradient_fp8_both", gate_up_RF2, dy_RF, weight_R)
    many = impl is not None or gate_up_RF2.numel() >= MANY_VALUES
    case = _case(gate_up_RF2, dy_RF, weight_R)._replace(
        dims=(dy_RF.shape[1],), mixed=dy_RF.dtype is not gate_up_RF2.dtype, many=many
    )
    out: tuple[Fp8, Fp8, Tensor] = WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH.choose(case, impl)(
        gate_up_RF2, dy_RF, weight_R, ends_E, power_of_two=power_of_two
    )
    return out


def weighted_gradient_then_tiles(
    gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor, ends_E: Tensor | None, *, power_of_two: bool
) -> tuple[Fp8, Fp8, Tensor]:
    """See `weighted_swiglu_gradient_fp8_both`; the table is asked for each of the two."""
    gradient_RF2, dweight_R = weighted_swiglu_gradient(gate_up_RF2, dy_RF, weight_R)
    return *quantise_fp8_both(gradient_RF2, ends_E, power_of_two=power_of_two), dweight_R


def rms_norm_fp8(
    x_RD: Tensor, weight_D: Tensor, eps: float, *, power_of_two: bool = False, impl: str | None = None
) -> Fp8:
    """Row tiles of `rms_norm`, rounded to x's dtype, then quantised.

    Shapes: x float [R, D]; weight_D [D]; row tiles of [R, D]. Not differentiable.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: x is read, 1 byte an element is written.
    """
    _check_matrix("rms_norm_fp8", x_RD)
    _check_weight("rms_norm_fp8", x_RD, weight_D)
    out: Fp8 = RMS_NORM_FP8.choose(_case(x_RD, weight_D), impl)(
        x_RD, weight_D, eps, power_of_two=power_of_two
    )
    return out


def add_rms_norm_fp8(
    x_RD: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    power_of_two: bool = False,
    impl: str | None = None,
) -> tuple[Fp8, Tensor]:
    """`sum = x + residual`; returns the row tiles of its norm, as `rms_norm_fp8`, and the sum in x's dtype.

    Shapes: x and residual float [R, D], one dtype; weight_D [D]. Not differentiable.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: x and residual are read, the sum and 1 byte an element are written.
    """
    _check_matrix("add_rms_norm_fp8", x_RD)
    _check_weight("add_rms_norm_fp8", x_RD, weight_D)
    if x_RD.shape != residual_RD.shape:
        msg = f"add_rms_norm_fp8: x {tuple(x_RD.shape)} and residual {tuple(residual_RD.shape)} must match"
        raise ShapeError(msg)
    out: tuple[Fp8, Tensor] = ADD_RMS_NORM_FP8.choose(_case(x_RD, residual_RD, weight_D), impl)(
        x_RD, residual_RD, weight_D, eps, power_of_two=power_of_two
    )
    return out


def _case(x: Tensor, *others: Tensor) -> Case:
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    return Case(device_type(x), x.dtype, (x.shape[-1],), grad=grad)


def _check_matrix(op: str, x: Tensor) -> None:
    if x.dim() != 2:
        msg = (
            f"{op}: FP8 tiles are cut from a matrix; got {x.dim()} dims: {tuple(x.shape)}. Flatten it first."
        )
        raise ShapeError(msg)


def _check_weight(op: str, x_RD: Tensor, weight_D: Tensor) -> None:
    if weight_D.shape != x_RD.shape[1:]:
        msg = f"{op}: x has {x_RD.shape[1]} columns but the weight has shape {tuple(weight_D.shape)}"
        raise ShapeError(msg)
