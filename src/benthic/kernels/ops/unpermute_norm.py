"""The public op at the end of a mixture: a token's rows come home and are summed, and the sum is normed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.moe import unpermute
from benthic.kernels.ops.norm import add_rms_norm
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    anywhere,
    device_type,
    inference_only,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.moe import RowMaps

_TRITON = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        reason="one kernel: what was summed is normed where it is, and not read again",
    )
)
UNPERMUTE_NORM = Op(
    "unpermute_norm",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_permute:unpermute_norm"),
        Implementation(
            "two_ops",
            anywhere("unpermute, then add_rms_norm: see the lines of these"),
            "benthic.kernels.ops.unpermute_norm:two_ops",
        ),
        reference("benthic.kernels.reference.moe:unpermute_norm"),
    ),
    trains=False,
)


def unpermute_norm(
    rows_RD: Tensor,
    maps: RowMaps,
    weight_TK: Tensor,
    beside: tuple[Tensor, ...],
    norm_D: Tensor,
    eps: float,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`(norm(out_TD), out_TD)` of what `unpermute` gives: see there, and `rms_norm`.

    Shapes: as for `unpermute`; norm_D [D] weighs the norm, which takes sums as they are stored.
    Differentiable as two ops.
    Raises: ShapeError when rows and the norm's weight disagree, or as `unpermute`.
    """
    if norm_D.shape != rows_RD.shape[1:]:
        msg = f"unpermute_norm: rows have {rows_RD.shape[1]} columns but the norm {tuple(norm_D.shape)}"
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (rows_RD, weight_TK, norm_D, *beside))
    case = Case(device_type(rows_RD), rows_RD.dtype, grad=grad)
    found: tuple[Tensor, Tensor] = UNPERMUTE_NORM.choose(case, impl)(
        rows_RD, maps, weight_TK, beside, norm_D, eps
    )
    return found


def two_ops(
    rows_RD: Tensor,
    maps: RowMaps,
    weight_TK: Tensor,
    beside: tuple[Tensor, ...],
    norm_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `unpermute_norm`; the table is asked for each of the two."""
    return add_rms_norm(unpermute(rows_RD, maps, weight_TK, beside), None, norm_D, eps)
