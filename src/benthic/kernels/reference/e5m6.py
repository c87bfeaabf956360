"""Definition of E5M6, the 12-bit format of attention's outputs (DeepSeek-V3 report section 3.3.2).

The report gives the name and that scales are powers of two; the rest is chosen here. A value has 1 sign bit,
5 exponent bits (bias 15) and 6 mantissa bits: float16 without its last four mantissa bits. Subnormals as in
float16, down to 2^-20; largest 65024; no infinity and no NaN. Rounding is to nearest, ties to even, once.
Every 1 x 128 tile has a float32 scale: the smallest power of two that brings its magnitudes to at most 65024
after rounding. Two values are three bytes: `a` and the low half of `b`, as the 24-bit number `a + 4096 b`,
little end first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

E5M6_MAX = 65024.0
TILE = 128
MIN_AMAX = 1e-30  # scales stay normal float32 numbers


def round_e5m6(x: Tensor) -> Tensor:
    """The nearest values of the format, as float32; magnitudes above the largest become it."""
    _, exponent = torch.frexp(x.float())  # x = m 2^e with m in [0.5, 1): six more bits than the first
    quantum = torch.ldexp(torch.ones_like(x, dtype=torch.float32), (exponent - 1).clamp(min=-14) - 6)
    return (torch.round(x.float() / quantum) * quantum).clamp(-E5M6_MAX, E5M6_MAX)


def quantise(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.quantise_e5m6`."""
    width = x_TD.shape[1]
    tiles_Tan = F.pad(x_TD.float(), (0, -width % TILE)).unflatten(1, (-1, TILE))
    amax = tiles_Tan.abs().amax(dim=2).clamp(min=MIN_AMAX)
    mantissa, exponent = torch.frexp(amax / amax.new_full((), E5M6_MAX))
    scale_Ta = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    rounded = round_e5m6(tiles_Tan / scale_Ta[:, :, None]).flatten(1)[:, : width + width % 2]
    code = (rounded.to(torch.float16).view(torch.int16).int() >> 4) & 0xFFF
    pair = code[:, 0::2] | (code[:, 1::2] << 12)
    packed = torch.stack((pair & 0xFF, (pair >> 8) & 0xFF, pair >> 16), dim=2).to(torch.uint8)
    return packed.flatten(1), scale_Ta


def dequantise(packed: Tensor, scale_Ta: Tensor, width: int, *, dtype: torch.dtype) -> Tensor:
    """See `benthic.kernels.ops.dequantise_e5m6`."""
    low, middle, high = packed.int().unflatten(1, (-1, 3)).unbind(2)
    pair = low | (middle << 8) | (high << 16)
    code = torch.stack((pair & 0xFFF, pair >> 12), dim=2).flatten(1)[:, :width]
    values = (code << 4).to(torch.int16).view(torch.float16).float()
    return (values * scale_Ta.repeat_interleave(TILE, dim=1)[:, :width]).to(dtype)
