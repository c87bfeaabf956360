"""Rotary rows: interleaved in checkpoints, half-split in the module; this is the only place that knows.

A checkpoint with `rope_interleave` pairs rows (0, 1), (2, 3), … of each rotary slice. The module pairs row j
with row j + r/2, which kernels read without shuffling. Queries and keys are permuted alike, so their
products are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.spec.parameters import Param


def to_half_split(weight_OI: Tensor, param: Param) -> Tensor:
    """Move each rotary slice's even rows to its front and its odd rows to its back; a copy."""
    return weight_OI[half_split_order(param).to(weight_OI.device)]


def to_interleaved(weight_OI: Tensor, param: Param) -> Tensor:
    """The inverse of `to_half_split`; a copy."""
    return weight_OI[torch.argsort(half_split_order(param)).to(weight_OI.device)]


def half_split_order(param: Param) -> Tensor:
    """Which checkpoint row each module row comes from: int64 [rows]."""
    order = torch.arange(param.shape[0])
    for start, stop in param.rope_rows:
        rows = order[start:stop].clone()
        order[start:stop] = torch.cat((rows[0::2], rows[1::2]))
    return order
