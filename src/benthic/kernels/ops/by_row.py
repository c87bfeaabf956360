"""Public ops whose rows do not feel each other: the same bits alone, in any batch and at any place in it.

Every other product may choose its kernel, and with it the order of its sums, by the number of rows. These
are for a server that promises the same answer whatever else it is doing; they compute no gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.native import native_runs
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    device_type,
    inference_only,
    laid_out,
    one_dtype,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

_NATIVE = inference_only(one_dtype(native_runs("one call into C, where every sum runs in order")))
_NATIVE_PAGES = inference_only(
    one_dtype(laid_out("rows", native_runs("one query a piece of work, pages read in place")))
)
_TRITON = inference_only(
    one_dtype(
        triton_runs(
            torch.bfloat16,
            torch.float16,
            torch.float32,
            reason="our product: one order of summation for any number of rows",
            dot=True,
        )
    )
)
_TRITON_PAGES = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        reason="our paged kernel: one query a program, contexts cut at fixed places",
        dot=True,
    )
)


def _op(name: str, typical_dims: tuple[int, ...]) -> Op:
    return Op(
        name,
        (
            Implementation("native", _NATIVE, f"benthic.kernels.native_by_row:{name}"),
            Implementation("triton", _TRITON, f"benthic.kernels.triton_by_row:{name}"),
            reference(f"benthic.kernels.reference.by_row:{name}"),
        ),
        typical_dims=typical_dims,
        trains=False,
    )


LINEAR_BY_ROW = _op("linear_by_row", (2048, 2048))
HEADS_LINEAR_BY_ROW = _op("heads_linear_by_row", (128, 512))
GROUPED_LINEAR_BY_ROW = _op("grouped_linear_by_row", (2048, 1408))
MLA_BY_ROW = Op(
    "mla_by_row",
    (
        Implementation("native", _NATIVE_PAGES, "benthic.kernels.native_by_row:mla_by_row"),
        Implementation("triton", _TRITON_PAGES, "benthic.kernels.triton_mla_by_row:mla_by_row"),
        reference("benthic.kernels.reference.by_row:mla_by_row"),
    ),
    typical_dims=(512, 64),
    trains=False,
)


def linear_by_row(
    x_TI: Tensor, weight_OI: Tensor, *, dtype: torch.dtype | None = None, impl: str | None = None
) -> Tensor:
    """`out_t = W x_t`; row t has the bits it has alone.

    Shapes: x [T, I], weight [O, I], one dtype -> [T, O] in `dtype` (None: theirs), rounded once from float32.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    _check("linear_by_row", x_TI, weight_OI)
    case = _case(x_TI, weight_OI)
    dtype = x_TI.dtype if dtype is None else dtype
    out_TO: Tensor = LINEAR_BY_ROW.choose(case, impl)(x_TI, weight_OI, dtype=dtype)
    return out_TO


def heads_linear_by_row(x_THI: Tensor, weight_HOI: Tensor, *, impl: str | None = None) -> Tensor:
    """`out_th = W_h x_th`: every head has a matrix of its own; row t has the bits it has alone.

    Shapes: x [T, H, I], weight [H, O, I], one dtype, any strides -> [T, H, O].
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    _check("heads_linear_by_row", x_THI, weight_HOI)
    if x_THI.shape[1] != weight_HOI.shape[0]:
        msg = f"heads_linear_by_row: {x_THI.shape[1]} heads of rows but {weight_HOI.shape[0]} of weights"
        raise ShapeError(msg)
    out_THO: Tensor = HEADS_LINEAR_BY_ROW.choose(_case(x_THI, weight_HOI), impl)(x_THI, weight_HOI)
    return out_THO


def grouped_linear_by_row(
    x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, impl: str | None = None
) -> Tensor:
    """`out_r = W_e x_r` as `grouped_linear`; row r has the bits it has as the only row of its expert.

    Shapes: x [R, I], weight [E, O, I], one dtype; ends int32 [E]. Rows past `ends[-1]` give zeros.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    _check("grouped_linear_by_row", x_RI, weight_EOI)
    if ends_E.shape != weight_EOI.shape[:1] or ends_E.dtype != torch.int32:
        msg = (
            f"grouped_linear_by_row: {weight_EOI.shape[0]} experts but ends has shape {tuple(ends_E.shape)} "
            f"in {ends_E.dtype}; expected int32, one end per expert"
        )
        raise ShapeError(msg)
    out_RO: Tensor = GROUPED_LINEAR_BY_ROW.choose(_case(x_RI, weight_EOI), impl)(x_RI, weight_EOI, ends_E)
    return out_RO


def mla_by_row(
    q_latent_THC: Tensor,
    q_rope_THr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Absorbed MLA attention of single queries against the paged latent cache; see `mla_decode`.

    Shapes: q_latent [T, H, C], q_rope [T, H, r]; cache [pages, block, C + r]; block_table int32 [S, P];
    sequence int32 [T], the row of the block table that each query reads; context int32 [T], how many tokens
    it sees, itself included (0 or less: none, which gives zeros).
    A cache in E4M3 is widened to the queries' dtype as it is read.
    Returns: out [T, H, C] in the queries' dtype. Query t has the bits it has alone, wherever its pages lie
    and however wide the block table is.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    Cost: every query reads its whole context; 2 H (2 C + r) FLOPs a visible token.
    """
    tokens, width = q_latent_THC.shape[0], q_latent_THC.shape[2] + q_rope_THr.shape[2]
    if q_rope_THr.shape[:2] != q_latent_THC.shape[:2] or cache_PBW.shape[2] != width:
        msg = (
            f"mla_by_row: queries {tuple(q_latent_THC.shape)} and {tuple(q_rope_THr.shape)} and a cache "
            f"{cache_PBW.shape[2]} wide; latent and rotary part together must be as wide, for one token a row"
        )
        raise ShapeError(msg)
    if sequence_T.shape != (tokens,) or context_T.shape != (tokens,):
        msg = (
            f"mla_by_row: {tokens} queries, sequences {tuple(sequence_T.shape)}, contexts "
            f"{tuple(context_T.shape)}; one each"
        )
        raise ShapeError(msg)
    dtype = cache_PBW.dtype
    case = Case(
        device_type(cache_PBW),
        dtype,
        (q_latent_THC.shape[2], q_rope_THr.shape[2]),
        grad=_recorded(q_latent_THC, q_rope_THr, cache_PBW),
        mixed=q_latent_THC.dtype is not dtype or q_rope_THr.dtype is not dtype,
        layout="rows" if cache_PBW.is_contiguous() else "strided",
    )
    out_THC: Tensor = MLA_BY_ROW.choose(case, impl)(
        q_latent_THC, q_rope_THr, cache_PBW, block_table_SP, sequence_T, context_T, scale=scale
    )
    return out_THC


def _case(x: Tensor, weight: Tensor) -> Case:
    return Case(
        device_type(x),
        x.dtype,
        (weight.shape[-1], weight.shape[-2]),
        grad=_recorded(x, weight),
        mixed=weight.dtype is not x.dtype,
    )


def _recorded(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in operands)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != weight.shape[-1]:
        msg = f"{op}: rows are {x.shape[-1]} wide but weights expect {weight.shape[-1]}"
        raise ShapeError(msg)
