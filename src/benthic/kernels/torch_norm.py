"""Row-wise ops as few torch calls as possible: the fast path on a CPU, once plain and once with gradients.

Autograd of the definitions saves every intermediate and walks the rows ten times; the hand-written gradients
of the `differentiable_` versions save the inputs. A wrapper for autograd costs 10 us a call (two AVX2 cores),
which the plain versions for inference do without. Narrow rows are computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from benthic.kernels.reference.norm import wide

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `benthic.kernels.ops.rms_norm`; float32 and float64."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def differentiable_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `benthic.kernels.ops.rms_norm`; float32, float64 and bfloat16."""
    out: Tensor = _RmsNorm.apply(x, weight_D, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.add_rms_norm`; float32 and float64."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight_D.shape, weight_D, eps), total


def differentiable_add_rms_norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.add_rms_norm`; float32, float64 and bfloat16."""
    total = x if residual is None else x + residual
    out: Tensor = _RmsNorm.apply(total, weight_D, eps)
    return out, total


def swiglu(gate_up: Tensor) -> Tensor:
    """See `benthic.kernels.ops.swiglu`; float32 and float64."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def differentiable_swiglu(gate_up: Tensor) -> Tensor:
    """See `benthic.kernels.ops.swiglu`; float32, float64 and bfloat16."""
    out: Tensor = _SwiGlu.apply(gate_up)
    return out


def rope(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> Tensor:
    """See `benthic.kernels.ops.rope`; float32 and float64."""
    return _rotate(x, *_by_head(x, cos_Tr2, sin_Tr2), sign=1.0)


def rope_and_norm(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `benthic.kernels.ops.rope_and_norm`; float32 and float64."""
    query, key = (rope(x, cos_Tr2, sin_Tr2) for x in (q_rope_THr, k_rope_Tr))
    return query, key, rms_norm(latent_TC, weight_C, eps)


def swiglu_gradient(gate_up: Tensor, dy: Tensor) -> Tensor:
    """See `benthic.kernels.ops.swiglu_gradient`; float32, float64 and bfloat16."""
    acc = wide(gate_up.dtype)
    dy = dy.to(acc)
    gate, up = gate_up.to(acc).chunk(2, dim=-1)
    out = torch.empty(gate_up.shape, dtype=acc)
    dgate, dup = out.chunk(2, dim=-1)
    torch.mul(dy, F.silu(gate), out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return out.to(gate_up.dtype)


def weighted_swiglu_gradient(gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.weighted_swiglu_gradient`; float32, float64 and bfloat16."""
    acc = wide(gate_up_RF2.dtype)
    dy, weight = dy_RF.to(acc), weight_R.to(acc)[:, None]
    gate, up = gate_up_RF2.to(acc).chunk(2, dim=-1)
    out = torch.empty(gate_up_RF2.shape, dtype=acc)
    dgate, dup = out.chunk(2, dim=-1)
    torch.mul(dy, F.silu(gate), out=dup)
    dweight_R = (dup * up).sum(-1)
    dup.mul_(weight)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up * weight, gate))
    return out.to(gate_up_RF2.dtype), dweight_R


def differentiable_rope(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> Tensor:
    """See `benthic.kernels.ops.rope`; float32, float64 and bfloat16."""
    out: Tensor = _Rope.apply(x, *_by_head(x, cos_Tr2, sin_Tr2))
    return out


def _by_head(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of a token for all of its heads, if it has any."""
    return (cos_Tr2.unsqueeze(1), sin_Tr2.unsqueeze(1)) if x.dim() == 3 else (cos_Tr2, sin_Tr2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    """Rotate by the angle (sign 1) or back (sign -1)."""
    half = x.shape[-1] // 2
    x_1, x_2 = (part.to(wide(x.dtype)) for part in (x[..., :half], x[..., half:]))
    out = torch.empty(x.shape, dtype=x_1.dtype)
    torch.mul(x_1, cos, out=out[..., :half]).addcmul_(x_2, sin, value=-sign)
    torch.mul(x_2, cos, out=out[..., half:]).addcmul_(x_1, sin, value=sign)
    return out.to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """dx = rstd (g - x_hat mean(g x_hat)) with g = dy weight; dweight = sum over rows of dy x_hat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Save x and the reciprocal root mean square of each row."""
        acc = wide(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        return (x * rstd).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight_D, rstd = ctx.saved_tensors
        dy, wide_D = grads[0].to(rstd.dtype), weight_D.to(rstd.dtype)
        x_hat = x * rstd
        weighted = dy * x_hat
        dweight_D = weighted.flatten(0, -2).sum(dim=0)
        mean = torch.mv(weighted.flatten(0, -2), wide_D).view_as(rstd).div_(x.shape[-1])
        dx = (dy * wide_D).sub_(x_hat.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), dweight_D.to(weight_D.dtype), None


class _SwiGlu(torch.autograd.Function):
    """d(gate) = dy * up * silu'(gate), d(up) = dy * silu(gate), recomputed from the saved input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Save the input alone."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient of both halves, side by side."""
        (gate_up,) = ctx.saved_tensors
        return swiglu_gradient(gate_up, grads[0])


class _Rope(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Save the angles alone."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x; the angles are constants."""
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, sign=-1.0), None, None
