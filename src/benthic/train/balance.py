"""Keeping experts evenly loaded without a loss: the update of their biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, *, speed: float, recentre: bool) -> None:
    """Raise the bias of underloaded experts by γ and lower that of overloaded ones, in place.

    `b_i += γ sign(mean(c) - c_i)`, DeepSeek-V3 report section 2.1.2; an expert at the mean stays. The sign is
    taken of integers, so it is exact for any count. `recentre` subtracts the mean of the signs (Moonlight).
    Shapes: bias_E float32; count_E int64, tokens over the whole global batch.
    """
    experts = count_E.numel()
    sign_E = torch.sign(count_E.sum() - experts * count_E).to(bias_E.dtype)
    if recentre:
        sign_E -= sign_E.mean()
    bias_E.add_(sign_E, alpha=speed)


def max_vio(count_E: Tensor) -> float:
    """How far the fullest expert is above the mean, `max(c) / mean(c) - 1` (Wang et al., 2024, eq. (4))."""
    total = int(count_E.sum())
    return float(count_E.max()) * count_E.numel() / total - 1.0 if total else 0.0
