"""Definitions of the elementwise and row-wise ops."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32, rounded once."""
    x_wide = x.to(wide(x.dtype))
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * scale * weight_D).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`s = x + residual` in the inputs' dtype, or x itself; returns `(rms_norm(s), s)`."""
    total = x if residual is None else x + residual
    return rms_norm(total, weight_D, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dim, in float32, rounded once."""
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_gradient(gate_up: Tensor, dy: Tensor) -> Tensor:
    """`d(gate) = dy up s (1 + gate (1 - s))` beside `d(up) = dy gate s`, s = sigmoid(gate), rounded once."""
    acc = wide(gate_up.dtype)
    gate, up = gate_up.to(acc).chunk(2, dim=-1)
    dy, sigmoid = dy.to(acc), torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return torch.cat((dgate, dy * gate * sigmoid), dim=-1).to(gate_up.dtype)


def weighted_swiglu_gradient(gate_up_RF2: Tensor, dy_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `w silu(gate) up` for gate_up, of `w dy`, and for w: `sum_f(silu(gate) up dy)`."""
    acc = wide(gate_up_RF2.dtype)
    gate, up = gate_up_RF2.to(acc).chunk(2, dim=-1)
    dy, sigmoid = dy_RF.to(acc), torch.sigmoid(gate)
    d = weight_R.to(acc)[:, None] * dy
    dgate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dgate_up = torch.cat((dgate, d * gate * sigmoid), dim=-1).to(gate_up_RF2.dtype)
    return dgate_up, (gate * sigmoid * up * dy).sum(-1)


def rope_and_norm(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and key rotated, the latent normalised."""
    query, key = (rope(x, cos_Tr2, sin_Tr2) for x in (q_rope_THr, k_rope_Tr))
    return query, key, rms_norm(latent_TC, weight_C, eps)


def rope_both(
    q_rope_THr: Tensor, k_rope_Tr: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and key rotated."""
    return rope(q_rope_THr, cos_Tr2, sin_Tr2), rope(k_rope_Tr, cos_Tr2, sin_Tr2)


def rope(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> Tensor:
    """Rotate pairs `(x_j, x_{j+r/2})` by each token's angles, in float32, rounded once."""
    x_1, x_2 = x.to(wide(x.dtype)).chunk(2, dim=-1)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1] // 2,)
    cos, sin = cos_Tr2.view(shape), sin_Tr2.view(shape)
    return torch.cat((x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin), dim=-1).to(x.dtype)
