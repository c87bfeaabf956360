"""Definitions of the FP8 formats of DeepSeek-V3 (report section 3.3): E4M3 values, one scale a tile.

Weights have 128 x 128 tiles, activations and their gradients 1 x 128 tiles. `scale = amax / 448` and
`value = x / scale`, so `x = value * scale`: checkpoints call this multiplier `weight_scale_inv`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3_MAX = 448.0
MIN_AMAX = 1e-4


def tile_scale(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """`amax / 448`, with amax at least 1e-4; rounded up to a power of two on request."""
    # A tensor, since CUDA turns division by a number into a product with its reciprocal, 1 ulp off.
    scale = amax.clamp(min=MIN_AMAX) / amax.new_full((), E4M3_MAX)
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


def quantise(
    x_MN: Tensor,
    tile_m: int,
    tile_n: int,
    *,
    power_of_two: bool,
    by_column: bool = False,  # noqa: ARG001 (decides where scales lie, for speed)
) -> tuple[Tensor, Tensor]:
    """Quantise with one scale per `tile_m x tile_n` tile; edge tiles may be smaller.

    Returns `(values_MN float8_e4m3fn, scale float32 [ceil(M / tile_m), ceil(N / tile_n)])`.
    """
    rows, columns = x_MN.shape
    padded = F.pad(x_MN.float(), (0, -columns % tile_n, 0, -rows % tile_m))
    tiles_ambn = padded.unflatten(1, (-1, tile_n)).unflatten(0, (-1, tile_m))
    scale_ab = tile_scale(tiles_ambn.abs().amax(dim=(1, 3)), power_of_two=power_of_two)
    values = (tiles_ambn / scale_ab[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    values_MN = values.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    return values_MN.to(torch.float8_e4m3fn), scale_ab


def dequantise(values_MN: Tensor, scale: Tensor, tile_m: int, tile_n: int, *, dtype: torch.dtype) -> Tensor:
    """`values * scale` with every scale spread over its tile."""
    rows, columns = values_MN.shape
    spread = scale.repeat_interleave(tile_m, dim=0)[:rows].repeat_interleave(tile_n, dim=1)[:, :columns]
    return (values_MN.float() * spread).to(dtype)
