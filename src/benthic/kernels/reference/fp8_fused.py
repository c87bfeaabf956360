"""Definitions of the ops that quantise what they have just read or computed: one op after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.kernels.reference import norm
from benthic.kernels.reference.fp8 import quantise
from benthic.kernels.reference.fp8_linear import TILE, Fp8, quantise_columns

if TYPE_CHECKING:
    from torch import Tensor


def quantise_both(x_RI: Tensor, ends_E: Tensor | None, *, power_of_two: bool) -> tuple[Fp8, Fp8]:
    """Row tiles of all rows, and column tiles of each expert's."""
    rows = _rows(x_RI, power_of_two=power_of_two)
    return rows, quantise_columns(x_RI, ends_E, power_of_two=power_of_two)


def swiglu(gate_up_RF2: Tensor, *, power_of_two: bool) -> Fp8:
    """Row tiles of `silu(gate) * up`, rounded to the dtype of the input first."""
    return _rows(norm.swiglu(gate_up_RF2), power_of_two=power_of_two)


def swiglu_gradient_both(
    gate_up_RF2: Tensor, dy_RF: Tensor, ends_E: Tensor | None, *, power_of_two: bool
) -> tuple[Fp8, Fp8]:
    """Both tilings of the gradient of `silu(gate) * up`, rounded to the dtype of gate_up first."""
    return quantise_both(norm.swiglu_gradient(gate_up_RF2, dy_RF), ends_E, power_of_two=power_of_two)


def weighted_swiglu_gradient_both(
    gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor, ends_E: Tensor | None, *, power_of_two: bool
) -> tuple[Fp8, Fp8, Tensor]:
    """Both tilings of the gradient of `w silu(gate) up`, rounded to the dtype of gate_up first, and w's."""
    gradient_RF2, dweight_R = norm.weighted_swiglu_gradient(gate_up_RF2, dy_RF, weight_R)
    return *quantise_both(gradient_RF2, ends_E, power_of_two=power_of_two), dweight_R


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float, *, power_of_two: bool) -> Fp8:
    """Row tiles of the norm, rounded to the dtype of x first."""
    return _rows(norm.rms_norm(x_RD, weight_D, eps), power_of_two=power_of_two)


def add_rms_norm(
    x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float, *, power_of_two: bool
) -> tuple[Fp8, Tensor]:
    """`s = x + residual`; row tiles of its norm, and s."""
    normed_RD, total_RD = norm.add_rms_norm(x_RD, residual_RD, weight_D, eps)
    return _rows(normed_RD, power_of_two=power_of_two), total_RD


def _rows(x_RI: Tensor, *, power_of_two: bool) -> Fp8:
    return Fp8(*quantise(x_RI, 1, TILE, power_of_two=power_of_two))
