"""Public ops of linear layers in FP8: quantising their operands, and the three products of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.fp8_ways import (
    FLOATS,
    cublas,
    fastest_dense,
    gluon,
    gluon_dense,
    gluon_gradient,
    gluon_split,
    gluon_squares,
    gluon_tall_dense,
    gluon_tall_first,
    turns_words,
)
from benthic.kernels.reference.fp8_linear import TILE, Fp8
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    laid_out,
    reference,
    triton_runs,
    with_few_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

QUANTISE_FP8_WEIGHT = Op(
    "quantise_fp8_weight",
    (
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="one kernel that reads every tile once"),
            "benthic.kernels.triton_fp8:quantise_weight",
        ),
        reference("benthic.kernels.reference.fp8_linear:quantise_weight"),
    ),
)
QUANTISE_FP8_COLUMNS = Op(
    "quantise_fp8_columns",
    (
        Implementation("gluon", gluon_squares, "benthic.kernels.gluon_fp8_squares:quantise_columns"),
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="one kernel that reads, pads, transposes and quantises"),
            "benthic.kernels.triton_fp8:quantise_columns",
        ),
        reference("benthic.kernels.reference.fp8_linear:quantise_columns"),
    ),
    typical_dims=(2048,),
)
RETILE_FP8 = Op(
    "retile_fp8",
    (
        Implementation("gluon", gluon_squares, "benthic.kernels.gluon_fp8_retile:retile"),
        Implementation(
            "triton",
            triton_runs(
                *FLOATS, torch.float8_e4m3fn, reason="dequantises, transposes, quantises in one pass"
            ),
            "benthic.kernels.triton_fp8:retile",
        ),
        reference("benthic.kernels.reference.fp8_linear:retile"),
    ),
    typical_dims=(2048,),
)
TURN_FP8 = Op(
    "turn_fp8",
    (
        Implementation("triton", turns_words, "benthic.kernels.triton_turn:turn_fp8"),
        reference("benthic.kernels.reference.fp8_linear:turn"),
    ),
    typical_dims=(2048, 1408),
    trains=False,
)
_FEW = Implementation(
    "few_rows",
    with_few_rows(triton_runs(*FLOATS, reason="weights read once, as the tall operand")),
    "benthic.kernels.triton_few_rows:fp8_linear",
)
FEW_ROWS = 16
"""Rows a weight, on average, up to which `few_rows` is the fastest: on an H200, 5.4 to 14 us at one row where
cuBLAS takes 13 to 25, and no better at 32."""
SPLIT_ROWS = 128
"""Rows of a product with one weight up to which `gluon_split` runs: it is bound by reading the weight, which
later row tiles read again."""
MANY_ROWS = 192
"""Rows a weight, on average, from which tiles of 192 rows win where experts have rows as routers give them.
On an H200 they give 683 TFLOP/s and those of 128 rows 652 with 192 for each of 64 experts, 782 and 694 with
256 for each of 32, 497 and 505 with 96; where all of 32 have 256, 831 and 883."""
MANY_VALUES = 1 << 24
"""To quantise, from which kernels with TMA save more than their launch costs the host: 8 us of 53 at twice as
many both ways, 40 of 264 at 200 million."""

FP8_LINEAR = Op(
    "fp8_linear",
    (
        _FEW,
        Implementation("gluon_split", gluon_split, "benthic.kernels.gluon_fp8_split:linear"),
        Implementation("gluon_three", gluon_tall_dense, "benthic.kernels.gluon_fp8_three:linear"),
        Implementation("gluon", gluon_dense, "benthic.kernels.gluon_fp8:linear"),
        Implementation("cublas", cublas, "benthic.kernels.torch_fp8_linear:linear"),
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="our block-scaled product: any width"),
            "benthic.kernels.triton_fp8_linear:linear",
        ),
        reference("benthic.kernels.reference.fp8_linear:linear"),
    ),
    typical_dims=(7168, 2048),
)
GROUPED_FP8_LINEAR = Op(
    "grouped_fp8_linear",
    (
        _FEW,
        Implementation("gluon_three", gluon_tall_first, "benthic.kernels.gluon_fp8_three:linear"),
        Implementation("gluon", gluon, "benthic.kernels.gluon_fp8:linear"),
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="our block-scaled grouped product, rows counted on the device"),
            "benthic.kernels.triton_fp8_linear:linear",
        ),
        reference("benthic.kernels.reference.fp8_linear:linear"),
    ),
    typical_dims=(7168, 2048),
)
FP8_WEIGHT_GRADIENT = Op(
    "fp8_weight_gradient",
    (
        Implementation("cublas", cublas, "benthic.kernels.torch_fp8_linear:weight_gradient"),
        Implementation(
            "gluon_three", gluon_gradient, "benthic.kernels.gluon_fp8_three_gradient:weight_gradient"
        ),
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="our product of two operands in 128x1 tiles"),
            "benthic.kernels.triton_fp8_linear:weight_gradient",
        ),
        reference("benthic.kernels.reference.fp8_linear:weight_gradient"),
    ),
    typical_dims=(4096, 2048),
)
GROUPED_FP8_WEIGHT_GRADIENT = Op(
    "grouped_fp8_weight_gradient",
    (
        Implementation(
            "gluon_three", gluon_gradient, "benthic.kernels.gluon_fp8_three_gradient:weight_gradient"
        ),
        Implementation(
            "triton",
            triton_runs(*FLOATS, reason="our product of two operands in 128x1 tiles, expert by expert"),
            "benthic.kernels.triton_fp8_linear:weight_gradient",
        ),
        reference("benthic.kernels.reference.fp8_linear:weight_gradient"),
    ),
    typical_dims=(4096, 2048),
)

ADD_FP8_WEIGHT_GRADIENT = Op(
    "add_fp8_weight_gradient",
    (
        Implementation(
            "gluon_three",
            laid_out("rows", gluon_gradient),
            "benthic.kernels.gluon_fp8_three_gradient:add_weight_gradient",
        ),
        Implementation("cublas", cublas, "benthic.kernels.torch_fp8_linear:add_weight_gradient"),
        Implementation(
            "triton",
            laid_out(
                "rows", triton_runs(torch.float32, reason="our product adds what its accumulator holds")
            ),
            "benthic.kernels.triton_fp8_linear:add_weight_gradient",
        ),
        reference("benthic.kernels.reference.fp8_linear:add_weight_gradient"),
    ),
    typical_dims=(4096, 2048),
    trains=False,
)
ADD_GROUPED_FP8_WEIGHT_GRADIENT = Op(
    "add_grouped_fp8_weight_gradient",
    (
        Implementation(
            "gluon_three",
            laid_out("rows", gluon_gradient),
            "benthic.kernels.gluon_fp8_three_gradient:add_weight_gradient",
        ),
        Implementation(
            "triton",
            laid_out(
                "rows",
                triton_runs(torch.float32, reason="our grouped product adds what its accumulator holds"),
            ),
            "benthic.kernels.triton_fp8_linear:add_weight_gradient",
        ),
        reference("benthic.kernels.reference.fp8_linear:add_weight_gradient"),
    ),
    typical_dims=(4096, 2048),
    trains=False,
)


def quantise_fp8_weight(weight: Tensor, *, power_of_two: bool = False, impl: str | None = None) -> Fp8:
    """Quantise a weight to E4M3 with one scale per 128 x 128 tile.

    Shapes: weight float [O, I], or [E, O, I] for one per expert, whose tiles are cut matrix by matrix.
    Raises: ShapeError for any other number of dims.
    """
    if weight.dim() not in (2, 3):
        msg = f"quantise_fp8_weight: a weight has 2 dims, or 3 with experts, not {weight.dim()}"
        raise ShapeError(msg)
    case = Case(weight.device.type, weight.dtype)
    out: Fp8 = QUANTISE_FP8_WEIGHT.choose(case, impl)(weight, power_of_two=power_of_two)
    return out


def turn_fp8(tiles: Fp8, *, impl: str | None = None) -> Fp8:
    """Block tiles of the transposed matrices, laid out anew; nothing is rounded.

    Shapes: tiles of [O, I] or [E, O, I]; returns those of [I, O] or [E, I, O], contiguous.
    Raises: BackendError when `impl` cannot run. Cost: a byte is read and one written for each value.
    """
    dims = (tiles.values.shape[-2], tiles.values.shape[-1])
    case = Case(tiles.values.device.type, tiles.values.dtype, dims)
    out: Fp8 = TURN_FP8.choose(case, impl)(tiles)
    return out


def quantise_fp8_columns(
    x_RI: Tensor, ends_E: Tensor | None = None, *, power_of_two: bool = False, impl: str | None = None
) -> Fp8:
    """Quantise rows to E4M3 with one scale per channel and 128 rows (128 x 1 tiles), stored transposed.

    No tile holds rows of two experts: each expert's rows are padded with zeros to a multiple of 128.
    Shapes: x float [R, I]; ends int32 [E] or None. Returns values [I, P], scale [I, P / 128], where P is R
    rounded up to 128, or (R // 128 + E) * 128 with experts.
    """
    many = impl is not None or x_RI.numel() >= MANY_VALUES
    case = Case(x_RI.device.type, x_RI.dtype, (x_RI.shape[1],), many=many)
    out: Fp8 = QUANTISE_FP8_COLUMNS.choose(case, impl)(x_RI, ends_E, power_of_two=power_of_two)
    return out


def retile_fp8(
    rows: Fp8, ends_E: Tensor | None = None, *, power_of_two: bool = False, impl: str | None = None
) -> Fp8:
    """Turn 1 x 128 tiles into 128 x 1 tiles: dequantise, transpose, quantise again (report section 3.3.2).

    With power-of-two scales on both sides only values that underflow are rounded a second time.
    Shapes: rows of [R, I]; the result as `quantise_fp8_columns`.
    """
    many = impl is not None or rows.values.numel() >= MANY_VALUES
    case = Case(rows.values.device.type, rows.values.dtype, (rows.values.shape[1],), many=many)
    out: Fp8 = RETILE_FP8.choose(case, impl)(rows, ends_E, power_of_two=power_of_two)
    return out


def fp8_linear(
    x: Fp8,
    weight: Fp8,
    ends_E: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    impl: str | None = None,
) -> Tensor:
    """`x W^T` of 1 x 128 tiles with 128 x 128 tiles; every 128 of K are scaled and added in float32.

    The output of a layer; with `weight.transposed()`, its input gradient.
    Shapes: x of [R, K]; weight of [N, K], or [E, N, K] with ends int32 [E]: rows past `ends[-1]` give zeros.
    Returns: [R, N] in `dtype`. Not differentiable.
    Raises: ShapeError when K or the tiles disagree; BackendError when `impl` cannot run.
    Cost: 2 R K N FLOPs.
    """
    _check_tiles(x, weight, ends_E)
    inner, outer, rows = x.values.shape[1], weight.values.shape[-2], x.values.shape[0]
    if ends_E is None:
        op, weights, many = FP8_LINEAR, 1, rows > SPLIT_ROWS
        fastest = impl or fastest_dense(rows, outer, inner, x.values.device)
    else:
        op, weights, fastest = GROUPED_FP8_LINEAR, ends_E.shape[0], ""
        many = impl is not None or rows >= MANY_ROWS * weights
    few = rows <= FEW_ROWS * weights
    case = Case(x.values.device.type, dtype, (inner, outer), few=few, many=many, fastest=fastest)
    out: Tensor = op.choose(case, impl)(x, weight, ends_E, dtype=dtype)
    return out


def fp8_weight_gradient(
    dy: Fp8,
    x: Fp8,
    ends_E: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """`dy^T x` of 128 x 1 tiles (see `quantise_fp8_columns`); every 128 rows are scaled and added in float32.

    Shapes: dy of [O, P], x of [I, P]. Returns [O, I], or [E, O, I] with ends; in `dtype`. Not differentiable.
    Raises: ShapeError when P disagrees; BackendError when `impl` cannot run.
    Cost: 2 P O I FLOPs.
    """
    _check_padded("fp8_weight_gradient", dy, x)
    op = FP8_WEIGHT_GRADIENT if ends_E is None else GROUPED_FP8_WEIGHT_GRADIENT
    # K is P here, always a multiple of 128; what a choice depends on are the widths
    case = Case(x.values.device.type, dtype, (TILE, _odd_one(dy.values.shape[0], x.values.shape[0])))
    out: Tensor = op.choose(case, impl)(dy, x, ends_E, dtype=dtype)
    return out


def add_fp8_weight_gradient(
    into: Tensor,
    dy: Fp8,
    x: Fp8,
    ends_E: Tensor | None = None,
    *,
    fresh: bool = False,
    squares: bool = False,
    impl: str | None = None,
) -> Tensor | None:
    """`into += dy^T x`: what `fp8_weight_gradient` gives, added in float32; with `fresh`, written.

    With `squares`, gives parts [P] of the sum of squares of all of `into`, which a norm adds instead of
    reading `into`; only with `fresh`. Without, None.
    Shapes: dy of [O, P], x of [I, P]; into float32 [O, I], or [E, O, I] with ends.
    Raises: ShapeError when operands disagree, or for squares without `fresh`; BackendError when `impl` cannot
    run.
    Cost: 2 P O I FLOPs; `into` is read and written once, but twice by "cublas".
    """
    _check_padded("add_fp8_weight_gradient", dy, x)
    experts = () if ends_E is None else (ends_E.shape[0],)
    expected = (*experts, dy.values.shape[0], x.values.shape[0])
    if into.shape != expected or into.dtype != torch.float32:
        msg = (
            f"add_fp8_weight_gradient: the gradient is {expected} in float32, but the sum is "
            f"{tuple(into.shape)} in {into.dtype}; give a float32 sum of the weight's shape"
        )
        raise ShapeError(msg)
    if squares and not fresh:
        msg = "add_fp8_weight_gradient: squares are of gradients that are written; give fresh"
        raise ShapeError(msg)
    op = ADD_FP8_WEIGHT_GRADIENT if ends_E is None else ADD_GROUPED_FP8_WEIGHT_GRADIENT
    layout: Literal["rows", "strided"] = "rows" if into.is_contiguous() else "strided"
    dims = (TILE, _odd_one(dy.values.shape[0], x.values.shape[0]))
    case = Case(x.values.device.type, into.dtype, dims, layout=layout)
    parts: Tensor | None = op.choose(case, impl)(into, dy, x, ends_E, fresh=fresh, squares=squares)
    return parts


def _check_padded(op: str, dy: Fp8, x: Fp8) -> None:
    if dy.values.shape[1] != x.values.shape[1]:
        msg = (
            f"{op}: {dy.values.shape[1]} padded rows of output gradients but "
            f"{x.values.shape[1]} of inputs; quantise both with the same ends"
        )
        raise ShapeError(msg)


def _odd_one(outer: int, inner: int) -> int:
    """The width that is no multiple of 16, if one is."""
    return inner if outer % 16 == 0 else outer


def _check_tiles(x: Fp8, weight: Fp8, ends_E: Tensor | None) -> None:
    *_, outer, inner = weight.values.shape
    tiles = (-(-outer // TILE), -(-inner // TILE))
    if x.values.shape[1] != inner or x.scale.shape[1] != tiles[1] or weight.scale.shape[-2:] != tiles:
        msg = (
            f"fp8_linear: rows {tuple(x.values.shape)} with scales {tuple(x.scale.shape)} and a weight "
            f"{tuple(weight.values.shape)} with scales {tuple(weight.scale.shape)} disagree; "
            f"tiles are {TILE} wide"
        )
        raise ShapeError(msg)
    experts = None if ends_E is None else ends_E.shape[0]
    if weight.values.dim() != (2 if experts is None else 3) or experts not in (None, weight.values.shape[0]):
        msg = f"fp8_linear: a weight of shape {tuple(weight.values.shape)} but ends of {experts} experts"
        raise ShapeError(msg)
