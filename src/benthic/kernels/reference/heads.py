"""Definitions of what is done with the dims of every head."""

from __future__ import annotations

import torch
from torch import Tensor


def join_head_dims(first_THa: Tensor, second: Tensor) -> Tensor:
    """Concatenate the last dims; an operand [T, b] is every head's."""
    if second.dim() == 2:
        second = second[:, None].expand(-1, first_THa.shape[1], -1)
    return torch.cat((first_THa, second), dim=-1)


def split_head_dims(x_THw: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Views of the first columns and of the rest."""
    first_THa, second_THb = x_THw.split((first, x_THw.shape[-1] - first), -1)
    return first_THa, second_THb


def heads_linear(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """`out_th = W_h x_th`."""
    return (x_THI.transpose(0, 1) @ weight_HOI.transpose(1, 2)).transpose(0, 1)
