"""Public ops that add gradients to sums which are wider than they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.linear_gradients import gluon_experts
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    device_type,
    laid_out,
    no,
    on,
    reference,
    triton_runs,
    yes,
)

if TYPE_CHECKING:
    from torch import Tensor


def _grouped_mm(case: Case) -> Verdict:
    """The library's grouped product in bfloat16, rows of a multiple of 16 bytes."""
    if case.device != "cuda":
        return no(f"adds by a kernel that runs on cuda, not {case.device}")
    if case.dtype != torch.bfloat16:
        return no(f"runs in torch.bfloat16, not {case.dtype}")
    if any(width % 8 for width in case.dims):
        return no(f"needs rows of a multiple of 16 bytes, not {list(case.dims)} elements of 2")
    return yes("torch's grouped product in bfloat16, then one kernel that adds")


ACCUMULATE = Op(
    "accumulate",
    (
        Implementation(
            "triton",
            laid_out(
                "rows",
                triton_runs(torch.bfloat16, torch.float16, reason="vectors of both dtypes, read once"),
            ),
            "benthic.kernels.triton_sums:accumulate",
        ),
        reference("benthic.kernels.reference.update:accumulate"),
    ),
    trains=False,
)
ADD_WEIGHT_GRADIENT = Op(
    "add_weight_gradient",
    (
        Implementation(
            "addmm",
            on("cuda", torch.bfloat16, torch.float16, reason="the product adds what its accumulator holds"),
            "benthic.kernels.torch_linear_gradients:add",
        ),
        reference("benthic.kernels.reference.moe:add_weight_gradient"),
    ),
    trains=False,
)
ADD_GROUPED_WEIGHT_GRADIENT = Op(
    "add_grouped_weight_gradient",
    (
        Implementation(
            "gluon",
            laid_out("rows", gluon_experts),
            "benthic.kernels.gluon_expert_gradient:add_grouped_weight_gradient",
        ),
        Implementation(
            "triton",
            laid_out(
                "rows",
                triton_runs(
                    torch.bfloat16,
                    torch.float16,
                    torch.float32,
                    reason="our grouped product adds what its accumulator holds",
                    dot=True,
                ),
            ),
            "benthic.kernels.triton_moe:add_grouped_weight_gradient",
        ),
        Implementation(
            "grouped_mm",
            laid_out("rows", _grouped_mm),
            "benthic.kernels.triton_sums:add_grouped_mm",
        ),
        reference("benthic.kernels.reference.moe:add_grouped_weight_gradient"),
    ),
    typical_dims=(2048, 1408),
    trains=False,
)


def accumulate(into: Tensor, x: Tensor, *, fresh: bool = False, impl: str | None = None) -> None:
    """`into += x` in into's dtype; with `fresh`, `into = x`, whatever it held.

    Shapes: one shape; into float32, x of any width. Raises: ShapeError when shapes disagree.
    Cost: 8 bytes of `into` (fresh: 4) and those of x are moved per element.
    """
    if into.shape != x.shape:
        msg = f"accumulate: {tuple(x.shape)} cannot be added to a sum of {tuple(into.shape)}"
        raise ShapeError(msg)
    dense = into.is_contiguous() and x.is_contiguous()
    case = Case(device_type(x), x.dtype, layout="rows" if dense else "strided")
    ACCUMULATE.choose(case, impl)(into, x, fresh=fresh)


def add_weight_gradient(
    into: Tensor,
    dy_RO: Tensor,
    x_RI: Tensor,
    ends_E: Tensor | None = None,
    *,
    fresh: bool = False,
    squares: bool = False,
    impl: str | None = None,
) -> Tensor | None:
    """`into += dy^T x` over all rows, or over each expert's own rows; see `weight_gradient`.

    With `fresh`, `into = dy^T x`, whatever it held; an expert without rows gets zeros.
    With `squares`, gives parts [P] of the sum of squares of all of `into`, which a norm adds instead of
    reading `into`: only for experts, where products are ours, and only with `fresh`. Without, None.

    Shapes: dy [R, O] and x [R, I], one dtype; ends int32 [E] or None; into [O, I] or [E, O, I], float32.
    Raises: ShapeError when operands disagree, or for squares without `ends_E` or `fresh`; BackendError when
    `impl` cannot run.
    Cost: 2 R I O FLOPs; `into` is read, unless fresh, and written once.
    """
    experts = () if ends_E is None else (ends_E.shape[0],)
    expected = (*experts, dy_RO.shape[1], x_RI.shape[1])
    if dy_RO.shape[0] != x_RI.shape[0] or dy_RO.dtype != x_RI.dtype or into.shape != expected:
        msg = (
            f"add_weight_gradient: {dy_RO.shape[0]} output gradients in {dy_RO.dtype} and {x_RI.shape[0]} "
            f"rows in {x_RI.dtype} make a gradient of {expected}, but the sum is {tuple(into.shape)}; give "
            "one gradient per row, in one dtype, and a sum of the weight's shape"
        )
        raise ShapeError(msg)
    dims = (x_RI.shape[1], dy_RO.shape[1])
    case = Case(device_type(x_RI), x_RI.dtype, dims, layout="rows" if into.is_contiguous() else "strided")
    if squares and (ends_E is None or not fresh):
        msg = "add_weight_gradient: squares are of experts' gradients that are written; give ends_E and fresh"
        raise ShapeError(msg)
    if ends_E is not None:
        add = ADD_GROUPED_WEIGHT_GRADIENT.choose(case, impl)
        parts: Tensor | None = add(into, dy_RO, x_RI, ends_E, fresh=fresh, squares=squares)
        return parts
    ADD_WEIGHT_GRADIENT.choose(case, impl)(into, dy_RO, x_RI, fresh=fresh)
    return None
