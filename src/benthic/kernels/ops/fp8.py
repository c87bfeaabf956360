"""Public ops of the FP8 formats: quantise activations by 1 x 128 tiles and weights by 128 x 128, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.errors import ShapeError
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    device_type,
    inference_only,
    reference,
    triton_runs,
)

_TRITON = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        reason="one kernel that reads every tile once",
    )
)

QUANTISE_FP8 = Op(
    "quantise_fp8",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8:quantise"),
        reference("benthic.kernels.reference.fp8:quantise"),
    ),
    trains=False,
)
DEQUANTISE_FP8 = Op(
    "dequantise_fp8",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_fp8:dequantise"),
        reference("benthic.kernels.reference.fp8:dequantise"),
    ),
    trains=False,
)


def quantise_fp8_blocks(
    weight_OI: Tensor, *, block: int = 128, power_of_two: bool = False, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise a weight to E4M3 with one scale per `block x block` tile (DeepSeek-V3 report section 3.3.2).

    Shapes: weight [O, I] float; edge tiles may be smaller.
    Returns: (values float8_e4m3fn [O, I], scale_inv float32 [ceil(O / block), ceil(I / block)]);
    `weight = values * scale_inv`, the multiplier that checkpoints call `weight_scale_inv`.
    Raises: ShapeError when the weight is not a matrix.
    """
    return _quantise(weight_OI, block, block, power_of_two=power_of_two, impl=impl)


def quantise_fp8_rows(
    x_TD: Tensor,
    *,
    block: int = 128,
    power_of_two: bool = False,
    by_column: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise activations to E4M3 with one scale per token and `block` channels (1 x 128 tiles).

    Shapes: x [T, D] float. Returns: (values float8_e4m3fn [T, D], scale float32 [T, ceil(D / block)]).
    With `by_column` the scales of a column lie side by side where a product reads them so, on a GPU.
    Raises: ShapeError when x is not a matrix.
    """
    return _quantise(x_TD, 1, block, power_of_two=power_of_two, by_column=by_column, impl=impl)


def dequantise_fp8(
    weight_OI: Tensor,
    scale_inv: Tensor,
    *,
    block: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    impl: str | None = None,
) -> Tensor:
    """`weight * scale_inv` with every scale spread over its `block x block` tile, in `dtype`.

    Shapes: weight float8_e4m3fn [O, I]; scale_inv float32 [ceil(O / block), ceil(I / block)].
    Raises: ShapeError when the scales do not cover the weight.
    """
    return _dequantise(weight_OI, scale_inv, block, block, dtype=dtype, impl=impl)


def dequantise_fp8_rows(
    values_TD: Tensor,
    scale: Tensor,
    *,
    block: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    impl: str | None = None,
) -> Tensor:
    """`values * scale` with one scale per token and `block` channels, in `dtype`.

    Shapes: values float8_e4m3fn [T, D]; scale float32 [T, ceil(D / block)].
    Raises: ShapeError when the scales do not cover the values.
    """
    return _dequantise(values_TD, scale, 1, block, dtype=dtype, impl=impl)


def _dequantise(
    values_MN: Tensor, scale: Tensor, tile_m: int, tile_n: int, *, dtype: torch.dtype, impl: str | None
) -> Tensor:
    rows, columns = values_MN.shape
    tiles = (-(-rows // tile_m), -(-columns // tile_n))
    if scale.shape != tiles:
        msg = (
            f"dequantise_fp8: {rows} x {columns} values in tiles of {tile_m} x {tile_n} need scales "
            f"of shape {tiles}, not {tuple(scale.shape)}"
        )
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and (values_MN.requires_grad or scale.requires_grad)
    case = Case(device_type(values_MN), values_MN.dtype, grad=grad)
    out: Tensor = DEQUANTISE_FP8.choose(case, impl)(values_MN, scale, tile_m, tile_n, dtype=dtype)
    return out


def _quantise(
    x_MN: Tensor,
    tile_m: int,
    tile_n: int,
    *,
    power_of_two: bool,
    impl: str | None,
    by_column: bool = False,
) -> tuple[Tensor, Tensor]:
    if x_MN.dim() != 2:
        msg = (
            f"FP8 tiles are cut from a matrix; got {x_MN.dim()} dims: {tuple(x_MN.shape)}. Flatten it first."
        )
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and x_MN.requires_grad
    case = Case(device_type(x_MN), x_MN.dtype, (tile_m, tile_n), grad=grad)
    out: tuple[Tensor, Tensor] = QUANTISE_FP8.choose(case, impl)(
        x_MN, tile_m, tile_n, power_of_two=power_of_two, by_column=by_column
    )
    return out
