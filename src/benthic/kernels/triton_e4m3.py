# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
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
    """`x / scale`, rounded to nearest and clamped to what E4M3 holds; `scale` is spread over x.

    A product with the reciprocal whose remainder is added rounds as a division does (Markstein 1990), unless
    the remainder underflows: the quotient is then far below what E4M3 holds. A division branches at every
    element, and takes its slow path for zeros.
    """
    inverse = tl.div_rn(1.0 + tl.zeros_like(scale), scale)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    quotient = tl.where(x == 0.0, x, quotient)  # the sum has lost the sign of a zero
    return tl.minimum(tl.maximum(quotient, -448.0), 448.0)


@triton.jit
def spread(x, bits):
    """Round `|x| <= 448` to one of its two neighbours in E4M3, each with the probability of its nearness.

    `bits` are 24 random ones of each element. The result is exact in E4M3.
    """
    magnitude, bits = tl.abs(x), bits.to(tl.int32)
    # 20 of 23 mantissa bits go; a carry of what is added to them runs into what is kept
    normal = ((magnitude.to(tl.int32, bitcast=True) + (bits >> 4)) & -0x100000).to(tl.float32, bitcast=True)
    # below 2^-6 in steps of 2^-9
    steps = magnitude * 512.0
    below = tl.floor(steps)
    above = steps - below + bits.to(tl.float32) * 5.9604644775390625e-8 >= 1.0
    subnormal = (below + above.to(tl.float32)) * 0.001953125
    rounded = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(x < 0.0, -rounded, rounded)
