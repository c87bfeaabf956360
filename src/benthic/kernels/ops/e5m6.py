"""Public ops of the 12-bit format E5M6: pack activations with a scale for every 1 x 128 tile, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, device_type, reference, triton_runs

QUANTISE_E5M6 = Op(
    "quantise_e5m6",
    (
        Implementation(
            "triton",
            triton_runs(
                torch.bfloat16,
                torch.float16,
                torch.float32,
                reason="one pass finds a tile's scale, rounds and packs",
            ),
            "benthic.kernels.triton_e5m6:quantise",
        ),
        reference("benthic.kernels.reference.e5m6:quantise"),
    ),
    trains=False,
)
DEQUANTISE_E5M6 = Op(
    "dequantise_e5m6",
    (
        Implementation(
            "triton",
            triton_runs(torch.bfloat16, torch.float16, torch.float32, reason="one pass unpacks and scales"),
            "benthic.kernels.triton_e5m6:dequantise",
        ),
        reference("benthic.kernels.reference.e5m6:dequantise"),
    ),
    trains=False,
)


def quantise_e5m6(x_TD: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Pack rows into E5M6, 12 bits a value, with one power-of-two scale per token and 128 channels.

    The format is defined in `benthic.kernels.reference.e5m6`.
    Shapes: x [T, D] float. Returns: (packed uint8 [T, 3 ceil(D / 2)], scale float32 [T, ceil(D / 128)]).
    Raises: ShapeError when x is not a matrix.
    """
    if x_TD.dim() != 2:
        msg = (
            f"E5M6 tiles are cut from a matrix; got {x_TD.dim()} dims: {tuple(x_TD.shape)}. Flatten it first."
        )
        raise ShapeError(msg)
    out: tuple[Tensor, Tensor] = QUANTISE_E5M6.choose(Case(device_type(x_TD), x_TD.dtype), impl)(x_TD)
    return out


def dequantise_e5m6(
    packed: Tensor, scale: Tensor, width: int, *, dtype: torch.dtype = torch.bfloat16, impl: str | None = None
) -> Tensor:
    """The rows `[T, width]` in `dtype`.

    Shapes: as `quantise_e5m6` returns them for rows of `width`.
    Raises: ShapeError when bytes or scales are not those of so many values.
    """
    expected = (3 * -(-width // 2), -(-width // 128))
    if (packed.shape[1], scale.shape[1]) != expected:
        msg = (
            f"dequantise_e5m6: rows of {width} take {expected[0]} bytes and {expected[1]} scales, not "
            f"{packed.shape[1]} and {scale.shape[1]}"
        )
        raise ShapeError(msg)
    case = Case(device_type(packed), dtype)
    out: Tensor = DEQUANTISE_E5M6.choose(case, impl)(packed, scale, width, dtype=dtype)
    return out
