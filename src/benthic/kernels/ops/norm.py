"""Public row-wise ops: RMSNorm, RMSNorm of a residual sum, SwiGLU, rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.native import native_runs
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    anywhere,
    device_type,
    inference_only,
    on,
    one_dtype,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = inference_only(on("cpu", torch.float32, torch.float64, reason="few torch calls"))
_DIFFERENTIABLE = on(
    "cpu", torch.float32, torch.float64, torch.bfloat16, reason="few torch calls, hand-written gradients"
)

_TRITON = triton_runs(
    torch.bfloat16, torch.float16, torch.float32, reason="one kernel that reads and writes every row once"
)

_NATIVE = inference_only(one_dtype(native_runs("one call into C")))
_NATIVE_ROPE_AND_NORM = inference_only(one_dtype(native_runs("three calls into C")))

RMS_NORM = Op(
    "rms_norm",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:rms_norm"),
        Implementation("torch", one_dtype(_PLAIN), "benthic.kernels.torch_norm:rms_norm"),
        Implementation(
            "torch_autograd", one_dtype(_DIFFERENTIABLE), "benthic.kernels.torch_norm:differentiable_rms_norm"
        ),
        Implementation("triton", _TRITON, "benthic.kernels.triton_norm:rms_norm"),
        reference("benthic.kernels.reference.norm:rms_norm"),
    ),
)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:add_rms_norm"),
        Implementation("torch", one_dtype(_PLAIN), "benthic.kernels.torch_norm:add_rms_norm"),
        Implementation(
            "torch_autograd",
            one_dtype(_DIFFERENTIABLE),
            "benthic.kernels.torch_norm:differentiable_add_rms_norm",
        ),
        Implementation("triton", _TRITON, "benthic.kernels.triton_norm:add_rms_norm"),
        reference("benthic.kernels.reference.norm:add_rms_norm"),
    ),
)
SWIGLU = Op(
    "swiglu",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:swiglu"),
        Implementation("torch", _PLAIN, "benthic.kernels.torch_norm:swiglu"),
        Implementation("torch_autograd", _DIFFERENTIABLE, "benthic.kernels.torch_norm:differentiable_swiglu"),
        Implementation("triton", _TRITON, "benthic.kernels.triton_norm:swiglu"),
        reference("benthic.kernels.reference.norm:swiglu"),
    ),
)
SWIGLU_GRADIENT = Op(
    "swiglu_gradient",
    (
        Implementation(
            "torch",
            inference_only(_DIFFERENTIABLE),
            "benthic.kernels.torch_norm:swiglu_gradient",
        ),
        Implementation("triton", inference_only(_TRITON), "benthic.kernels.triton_norm:swiglu_gradient"),
        reference("benthic.kernels.reference.norm:swiglu_gradient"),
    ),
    trains=False,
)
WEIGHTED_SWIGLU_GRADIENT = Op(
    "weighted_swiglu_gradient",
    (
        Implementation(
            "torch",
            inference_only(_DIFFERENTIABLE),
            "benthic.kernels.torch_norm:weighted_swiglu_gradient",
        ),
        Implementation(
            "triton", inference_only(_TRITON), "benthic.kernels.triton_norm:weighted_swiglu_gradient"
        ),
        reference("benthic.kernels.reference.norm:weighted_swiglu_gradient"),
    ),
    trains=False,
)
ROPE = Op(
    "rope",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:rope"),
        Implementation("torch", _PLAIN, "benthic.kernels.torch_norm:rope"),
        Implementation("torch_autograd", _DIFFERENTIABLE, "benthic.kernels.torch_norm:differentiable_rope"),
        Implementation("triton", _TRITON, "benthic.kernels.triton_rope:rope"),
        reference("benthic.kernels.reference.norm:rope"),
    ),
)

ROPE_BOTH = Op(
    "rope_both",
    (
        Implementation("triton", one_dtype(_TRITON), "benthic.kernels.triton_rope:rope_both"),
        Implementation(
            "two_ops",
            anywhere("rope of queries, then of keys: see the lines of it"),
            "benthic.kernels.ops.norm:two_ropes",
        ),
        reference("benthic.kernels.reference.norm:rope_both"),
    ),
)

ROPE_AND_NORM = Op(
    "rope_and_norm",
    (
        Implementation("native", _NATIVE_ROPE_AND_NORM, "benthic.kernels.native_ops:rope_and_norm"),
        Implementation("torch", one_dtype(_PLAIN), "benthic.kernels.torch_norm:rope_and_norm"),
        Implementation("triton", inference_only(_TRITON), "benthic.kernels.triton_rope:rope_and_norm"),
        reference("benthic.kernels.reference.norm:rope_and_norm"),
    ),
    trains=False,
)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, in float32, rounded once to x's dtype.

    Shapes: x [..., D] any float dtype; weight_D [D]. Differentiable in both.
    Raises: ShapeError when the last dims disagree; BackendError when `impl` cannot run.
    """
    if weight_D.shape != x.shape[-1:]:
        msg = f"rms_norm: x has {x.shape[-1]} columns but the weight has shape {tuple(weight_D.shape)}"
        raise ShapeError(msg)
    case = Case(
        device_type(x),
        x.dtype,
        grad=torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad),
        mixed=weight_D.dtype is not x.dtype,
    )
    out: Tensor = RMS_NORM.choose(case, impl)(x, weight_D, eps)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`sum = x + residual`; returns `(rms_norm(sum), sum)`, both in x's dtype.

    Without a residual the sum is x itself, whose two gradients are added in the norm's pass.
    Shapes: x and residual [..., D], one dtype; weight_D [D]. Differentiable in all three.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    """
    other = x if residual is None else residual
    if x.shape != other.shape or weight_D.shape != x.shape[-1:]:
        msg = (
            f"add_rms_norm: x {tuple(x.shape)}, residual {tuple(other.shape)} and weight "
            f"{tuple(weight_D.shape)} disagree; x and residual must match and the weight must be [D]"
        )
        raise ShapeError(msg)
    dtype = x.dtype
    case = Case(
        device_type(x),
        dtype,
        grad=torch.is_grad_enabled() and (x.requires_grad or other.requires_grad or weight_D.requires_grad),
        mixed=weight_D.dtype is not dtype or other.dtype is not dtype,
    )
    out: tuple[Tensor, Tensor] = ADD_RMS_NORM.choose(case, impl)(x, residual, weight_D, eps)
    return out


def swiglu(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """`silu(gate) * up`, where gate is the first half of the last dim and up the second.

    Shapes: gate_up [..., 2F] -> [..., F]; computed in float32, rounded once. Differentiable.
    Raises: ShapeError when the last dim is odd; BackendError when `impl` cannot run.
    """
    if gate_up.shape[-1] % 2:
        msg = f"swiglu: the last dim holds gate and up, so it must be even, not {gate_up.shape[-1]}"
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and gate_up.requires_grad
    out: Tensor = SWIGLU.choose(Case(device_type(gate_up), gate_up.dtype, grad=grad), impl)(gate_up)
    return out


def swiglu_gradient(gate_up: Tensor, dy: Tensor, *, impl: str | None = None) -> Tensor:
    """What `swiglu` gives gate_up for the gradient `dy` of its output, with the bits of autograd's.

    Shapes: gate_up [..., 2F], dy [..., F] -> [..., 2F] in the dtype of gate_up. Where autograd records, only
    the definition runs.
    Raises: ShapeError when the last dim is odd or shapes disagree; BackendError when `impl` cannot run.
    """
    check_swiglu_gradient("swiglu_gradient", gate_up, dy)
    grad = torch.is_grad_enabled() and (gate_up.requires_grad or dy.requires_grad)
    case = Case(device_type(gate_up), gate_up.dtype, grad=grad)
    out: Tensor = SWIGLU_GRADIENT.choose(case, impl)(gate_up, dy)
    return out


def check_swiglu_gradient(name: str, gate_up: Tensor, dy: Tensor) -> None:
    """Raise ShapeError where gate_up is not twice as wide as dy; `name` is the op's."""
    if gate_up.shape != (*dy.shape[:-1], 2 * dy.shape[-1]):
        found = tuple(gate_up.shape)
        msg = f"{name}: gate_up {found} must have the rows of dy {tuple(dy.shape)}, twice as wide"
        raise ShapeError(msg)


def weighted_swiglu_gradient(
    gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """What `weight_R * swiglu(gate_up)` gives gate_up and the weights for the gradient `dy` of its output.

    With s = sigmoid(gate) and d = weight * dy: `d up s (1 + gate (1 - s))` beside `d gate s`, and
    `sum_f(gate s up dy)` of each row, the gradient of a mixture's routing weight without experts' outputs.
    Shapes: gate_up [R, 2F], dy [R, F], weight any float [R]. Returns [R, 2F] in the dtype of gate_up and
    float32 [R] (float64 for float64), always summed in one order. Where autograd records, only the
    definition runs.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: gate_up and dy are read, as much as gate_up is written.
    """
    check_weighted_swiglu_gradient("weighted_swiglu_gradient", gate_up_RF2, dy_RF, weight_R)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (gate_up_RF2, dy_RF, weight_R))
    case = Case(device_type(gate_up_RF2), gate_up_RF2.dtype, grad=grad)
    out: tuple[Tensor, Tensor] = WEIGHTED_SWIGLU_GRADIENT.choose(case, impl)(gate_up_RF2, dy_RF, weight_R)
    return out


def check_weighted_swiglu_gradient(name: str, gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor) -> None:
    """Raise ShapeError where operands are no matrices of as many rows as there are weights."""
    check_swiglu_gradient(name, gate_up_RF2, dy_RF)
    if weight_R.shape != dy_RF.shape[:1] or dy_RF.dim() != 2:
        msg = (
            f"{name}: dy {tuple(dy_RF.shape)} must be a matrix with a row for each of the weights "
            f"{tuple(weight_R.shape)}"
        )
        raise ShapeError(msg)


def rope(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor, *, impl: str | None = None) -> Tensor:
    """Rotate each pair `(x_j, x_{j + r/2})` by its token's angle (half-split layout).

    Shapes: x [T, H, r] or [T, r]; cos and sin float32 [T, r/2], already gathered by position. Computed in
    float32 and rounded once; differentiable in x. Released checkpoints interleave the pairs: permute their
    rows at load.
    Raises: ShapeError when tokens or halves disagree; BackendError when `impl` cannot run.
    """
    _check_rope("rope", x, cos_Tr2, sin_Tr2)
    case = Case(
        device_type(x),
        x.dtype,
        grad=torch.is_grad_enabled() and x.requires_grad,
        mixed=cos_Tr2.dtype is not x.dtype or sin_Tr2.dtype is not x.dtype,
    )
    out: Tensor = ROPE.choose(case, impl)(x, cos_Tr2, sin_Tr2)
    return out


def rope_both(
    q_rope_THr: Tensor, k_rope_Tr: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`(rope(q), rope(k))` of one token's angles: what latent attention rotates, in one pass each way.

    Shapes: q [T, H, r], k [T, r], of one dtype; cos and sin float32 [T, r/2]. The bits, those of gradients
    too, are those of `rope`. Differentiable in q and k.
    Raises: ShapeError when tokens or halves disagree; BackendError when `impl` cannot run.
    """
    for x in (q_rope_THr, k_rope_Tr):
        _check_rope("rope_both", x, cos_Tr2, sin_Tr2)
    case = Case(
        device_type(q_rope_THr),
        q_rope_THr.dtype,
        grad=torch.is_grad_enabled() and (q_rope_THr.requires_grad or k_rope_Tr.requires_grad),
        mixed=k_rope_Tr.dtype is not q_rope_THr.dtype,
    )
    out: tuple[Tensor, Tensor] = ROPE_BOTH.choose(case, impl)(q_rope_THr, k_rope_Tr, cos_Tr2, sin_Tr2)
    return out


def two_ropes(
    q_rope_THr: Tensor, k_rope_Tr: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor
) -> tuple[Tensor, Tensor]:
    """See `rope_both`; the table is asked for each of the two."""
    return rope(q_rope_THr, cos_Tr2, sin_Tr2), rope(k_rope_Tr, cos_Tr2, sin_Tr2)


def _check_rope(name: str, x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> None:
    if cos_Tr2.shape != (x.shape[0], x.shape[-1] // 2) or sin_Tr2.shape != cos_Tr2.shape or x.shape[-1] % 2:
        msg = (
            f"{name}: x {tuple(x.shape)} needs cos and sin of shape [{x.shape[0]}, {x.shape[-1] / 2:g}], "
            f"not {tuple(cos_Tr2.shape)} and {tuple(sin_Tr2.shape)}"
        )
        raise ShapeError(msg)


def rope_and_norm(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(rope(q), rope(k), rms_norm(latent))`: what latent attention makes of two products, in one pass.

    Shapes: q [T, H, r], k [T, r], latent [T, C], of one dtype; weight [C]; cos and sin float32 [T, r/2].
    The bits are those of `rope` and `rms_norm`.
    For inference: where autograd records, only the definition runs.
    Raises: ShapeError when tokens or widths disagree; BackendError when `impl` cannot run.
    """
    check_rope_and_norm("rope_and_norm", q_rope_THr, k_rope_Tr, latent_TC, weight_C, cos_Tr2, sin_Tr2)
    dtype, operands = latent_TC.dtype, (q_rope_THr, k_rope_Tr, latent_TC, weight_C)
    case = Case(
        device_type(latent_TC),
        dtype,
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in operands),
        mixed=any(x.dtype is not dtype for x in operands),
    )
    out: tuple[Tensor, Tensor, Tensor] = ROPE_AND_NORM.choose(case, impl)(
        q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2
    )
    return out


def check_rope_and_norm(
    name: str,
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
) -> None:
    """Raise ShapeError where the operands of an op called `name` disagree, see `rope_and_norm`."""
    angles = (q_rope_THr.shape[0], q_rope_THr.shape[-1] // 2)
    if (
        any(x.shape != angles for x in (cos_Tr2, sin_Tr2))
        or k_rope_Tr.shape != (angles[0], q_rope_THr.shape[-1])
        or latent_TC.shape != (angles[0], weight_C.shape[0])
    ):
        msg = (
            f"{name}: queries {tuple(q_rope_THr.shape)}, keys {tuple(k_rope_Tr.shape)}, latents "
            f"{tuple(latent_TC.shape)}, weight {tuple(weight_C.shape)}, angles {tuple(cos_Tr2.shape)} and "
            f"{tuple(sin_Tr2.shape)} disagree in tokens or widths"
        )
        raise ShapeError(msg)
