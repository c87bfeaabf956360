"""Public ops of the gate's product: logits in float32 of narrow operands, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from benthic.errors import ShapeError
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    device_type,
    inference_only,
    no,
    one_dtype,
    reference,
    triton_runs,
    with_few_rows,
    yes,
)


def _mm_wide(case: Case) -> Verdict:
    """A product of narrow operands that leaves in float32; torch has it on CUDA only."""
    if case.device != "cuda" or case.dtype not in (torch.bfloat16, torch.float16):
        return no(f"runs on cuda in bfloat16 and float16, not on {case.device} in {case.dtype}")
    if case.mixed:
        return no("takes operands of one dtype")
    return yes("torch's product of narrow operands that leaves in float32: nothing is cast first")


def _halves(case: Case) -> Verdict:
    """Tensor cores, where library products in float32 have none; float16 has too few exponents for it."""
    if case.device != "cuda" or case.dtype != torch.bfloat16:
        return no(f"runs on cuda in bfloat16, not on {case.device} in {case.dtype}")
    if case.mixed:
        return no("takes x and weight of one dtype")
    return yes("the gradient in two halves of bfloat16: 16 of its 24 bits, on tensor cores")


def _gate_of_few(case: Case) -> Verdict:
    """Two warps hold the weights of an expert or two: no more of them than fit their registers."""
    if case.dims[1] > 4096:
        return no(f"holds weights of up to 4096 columns in two warps, not {case.dims[1]}")
    return triton_runs(
        torch.bfloat16, torch.float16, torch.float32, reason="weights read once, no loop over K"
    )(case)


_GATE_OF_FEW = inference_only(one_dtype(with_few_rows(_gate_of_few)))

GATE_LOGITS = Op(
    "gate_logits",
    (
        Implementation("few_rows", _GATE_OF_FEW, "benthic.kernels.triton_few_rows:gate_logits"),
        Implementation("mm_wide", inference_only(_mm_wide), "benthic.kernels.torch_moe:gate_logits"),
        reference("benthic.kernels.reference.moe:gate_logits"),
    ),
    typical_dims=(64, 2048),
)
GATE_GRADIENTS = Op(
    "gate_gradients",
    (
        Implementation("halves", inference_only(_halves), "benthic.kernels.torch_moe:gate_gradients"),
        reference("benthic.kernels.reference.moe:gate_gradients"),
    ),
    typical_dims=(64, 2048),
    trains=False,
)

FEW_GATED = 64
"""Rows up to which the gate's product waits for its weights and not for arithmetic."""


def gate_logits(x_TD: Tensor, weight_ED: Tensor, *, impl: str | None = None) -> Tensor:
    """`x W^T` in float32 of operands of any float dtype: products and sums are never narrower.

    Shapes: x [T, D], weight [E, D] -> float32 [T, E].
    Raises: ShapeError when the widths disagree.
    """
    if x_TD.shape[1] != weight_ED.shape[1]:
        msg = f"gate_logits: rows are {x_TD.shape[1]} wide but the gate's weight expects {weight_ED.shape[1]}"
        raise ShapeError(msg)
    mixed = x_TD.dtype is not weight_ED.dtype
    grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_ED.requires_grad)
    few, dims = x_TD.shape[0] <= FEW_GATED, tuple(weight_ED.shape)
    case = Case(device_type(x_TD), x_TD.dtype, dims, grad=grad, mixed=mixed, few=few)
    logits_TE: Tensor = GATE_LOGITS.choose(case, impl)(x_TD, weight_ED)
    return logits_TE


def gate_gradients(
    dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_logits`: `dlogits W` in x's dtype and `dlogits^T x` in the weight's.

    Shapes: dlogits float32 [T, E], x [T, D], weight [E, D] -> [T, D], [E, D]. Sums are float32, rounded once;
    `dlogits` counts with 16 bits at least.
    Raises: ShapeError when the operands disagree.
    """
    if dlogits_TE.shape != (x_TD.shape[0], weight_ED.shape[0]) or x_TD.shape[1] != weight_ED.shape[1]:
        msg = (
            f"gate_gradients: {tuple(dlogits_TE.shape)} logits, rows {tuple(x_TD.shape)} and weight "
            f"{tuple(weight_ED.shape)} disagree; expected [T, E], [T, D] and [E, D]"
        )
        raise ShapeError(msg)
    mixed = x_TD.dtype is not weight_ED.dtype
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (dlogits_TE, x_TD, weight_ED))
    case = Case(device_type(x_TD), x_TD.dtype, tuple(weight_ED.shape), grad=grad, mixed=mixed)
    found: tuple[Tensor, Tensor] = GATE_GRADIENTS.choose(case, impl)(dlogits_TE, x_TD, weight_ED)
    return found
