"""Shared by kernels that quantise to E4M3: the scale of a tile, and values within range."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_scale(amax, POWER_OF_TWO: tl.constexpr):
    """Return amax / 448 with amax at least 1e-4, rounded up to a power of two on request."""
    floor = tl.maximum(amax, 1e-4)
    scale = tl.div_rn(floor, 448.0 + tl.zeros_like(floor))
    if POWER_OF_TWO:
        scale = tl.exp2(tl.ceil(tl.log2(scale)))
    return scale


@triton.jit
def scaled(x, scale):
    """`x / scale`, rounded to nearest and clamped to what E4M3 holds; `scale` is spread over x."""
    return tl.minimum(tl.maximum(tl.div_rn(x, scale + tl.zeros_like(x)), -448.0), 448.0)
