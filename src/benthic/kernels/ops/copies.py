"""Public ops of an expert-parallel rank: copy tokens to the experts here, sum the copies, its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, reference, triton_runs

if TYPE_CHECKING:
    from benthic.kernels.reference.fp8_linear import Fp8

_TRITON = triton_runs(
    torch.bfloat16, torch.float16, torch.float32, reason="gathers, float32 sums in a fixed order, no atomics"
)

GATHER_COPIES = Op(
    "gather_copies",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_permute:gather_copies"),
        reference("benthic.kernels.reference.moe:gather_copies"),
    ),
)
SUM_COPIES = Op(
    "sum_copies",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_permute:sum_copies"),
        reference("benthic.kernels.reference.moe:sum_copies"),
    ),
)
SUM_COPIES_BACKWARD = Op(
    "sum_copies_backward",
    (
        Implementation("triton", _TRITON, "benthic.kernels.triton_permute:sum_copies_backward"),
        reference("benthic.kernels.reference.moe:sum_copies_backward"),
    ),
)
SPREAD_FP8 = Op(
    "spread_fp8",
    (
        Implementation(
            "triton",
            triton_runs(torch.float8_e4m3fn, reason="a token is read once, and written as often as it goes"),
            "benthic.kernels.triton_permute:spread_tiles",
        ),
        reference("benthic.kernels.reference.fp8_linear:spread"),
    ),
    trains=False,
)


def gather_copies(
    x_AD: Tensor, copy_R: Tensor, ends_E: Tensor, *, top_k: int, impl: str | None = None
) -> Tensor:
    """`rows_r = x[copy_r // top_k]` for rows before `ends_E[-1]`; later rows are undefined.

    Shapes: x [A, D]; copy_R int64 [R]; ends_E int32 [E]. Returns: rows [R, D]. On a GPU the host need not
    know how many rows there are. Not differentiable: an exchange writes its own gradients.
    """
    case = Case(x_AD.device.type, x_AD.dtype)
    rows: Tensor = GATHER_COPIES.choose(case, impl)(x_AD, copy_R, ends_E, top_k)
    return rows


def sum_copies(
    rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """`out_a = sum_k weight_ak * rows[row_ak]` over the copies that are here; without weights, a plain sum.

    Like `unpermute`, for tokens only some of whose copies are on this rank: row -1 stands for a copy that is
    elsewhere. Summed in float32 in the order of k, rounded once to the rows' dtype.
    Shapes: rows [R, D]; row_AK int64 [A, K]; weight_AK float32 [A, K] or None. Returns: out [A, D]. Not
    differentiable: an exchange writes its own gradients.
    Raises: ShapeError when rows and weights of copies disagree.
    """
    if weight_AK is not None and weight_AK.shape != row_AK.shape:
        msg = f"sum_copies: weights {tuple(weight_AK.shape)} for copies {tuple(row_AK.shape)}"
        raise ShapeError(msg)
    case = Case(rows_RD.device.type, rows_RD.dtype)
    out: Tensor = SUM_COPIES.choose(case, impl)(rows_RD, row_AK, weight_AK)
    return out


def sum_copies_backward(
    dout_AD: Tensor, rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`drows[row_ak] = weight_ak * dout_a` and `dweight_ak = dout_a . rows[row_ak]`: `sum_copies` backward.

    Shapes: as in `sum_copies`; dout [A, D]. A row is pointed at by one copy at most; rows that none points at
    have undefined gradients. Absent copies have dweight 0.
    Raises: ShapeError when gradient, copies and weights disagree.
    """
    if weight_AK.shape != row_AK.shape or dout_AD.shape != (row_AK.shape[0], rows_RD.shape[1]):
        msg = (
            f"sum_copies_backward: gradient {tuple(dout_AD.shape)} and weights {tuple(weight_AK.shape)} "
            f"disagree with copies {tuple(row_AK.shape)} of rows {rows_RD.shape[1]} wide"
        )
        raise ShapeError(msg)
    case = Case(rows_RD.device.type, rows_RD.dtype)
    out: tuple[Tensor, Tensor] = SUM_COPIES_BACKWARD.choose(case, impl)(dout_AD, rows_RD, row_AK, weight_AK)
    return out


def spread_fp8(tiles: Fp8, row_AK: Tensor, *, rows: int, impl: str | None = None) -> Fp8:
    """`out[row_ak] = tiles[a]`: row tiles of tokens, copied to the rows of their copies.

    Shapes: values E4M3 [A, D], scale float32 [A, D / 128]; row_AK int64 [A, K], -1 for a copy that is
    elsewhere. Returns: tiles of `rows` rows, scales column by column; rows that no copy goes to are
    undefined. Not differentiable.
    Raises: ShapeError when tokens disagree.
    Cost: a byte a value is read for each token and written for each copy.
    """
    if row_AK.dim() != 2 or row_AK.shape[0] != tiles.values.shape[0]:
        msg = (
            f"spread_fp8: {tiles.values.shape[0]} tokens, but places of copies are {tuple(row_AK.shape)}; "
            "expected [A, K]"
        )
        raise ShapeError(msg)
    case = Case(tiles.values.device.type, tiles.values.dtype)
    out: Fp8 = SPREAD_FP8.choose(case, impl)(tiles, row_AK, rows)
    return out
