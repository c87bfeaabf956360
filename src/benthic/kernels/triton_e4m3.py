# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Shared by kernels that write E4M3: the scale of a tile, values within range, tensors for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import TILE, Fp8


@triton.jit
def tile_scale(amax, POWER_OF_TWO: tl.constexpr):
    """Return amax / 448 with amax at least 1e-4, rounded up to a power of two on request."""
    scale = quotient(tl.maximum(amax, 1e-4), 448.0, 1.0 / 448.0)
    if POWER_OF_TWO:
        scale = tl.exp2(tl.ceil(tl.log2(scale)))
    return scale


@triton.jit
def scaled(x, scale):
    """`x / scale`, rounded to nearest; `scale`, that of the tile's largest magnitude, is spread over x.

    No quotient is beyond 448 by more than a last place, which E4M3 rounds away: nothing is clamped.
    """
    return quotient(x, scale, inverse_of(scale))


@triton.jit
def inverse_of(scale):
    """`1 / scale` rounded to nearest, as `div_rn` finds it but without its branch for extreme exponents.

    A scale has none: it lies between 1e-4 / 448 and the largest float32 / 448.
    """
    near, turned = 1.0 / scale, scale * -1.0
    near = tl.fma(near, tl.fma(turned, near, 1.0), near)
    return tl.fma(near, tl.fma(turned, near, 1.0), near)


@triton.jit
def quotient(x, by, inverse):
    """`x / by` rounded to nearest, where `inverse` is `1 / by` rounded to nearest (Markstein 1990).

    Three products in place of a division, which takes ten instructions and a branch for each element:
    enough to keep a kernel from the rate of memory. The remainder is turned round, so that -0 stays -0.
    """
    near = x * inverse
    return tl.fma(tl.fma(near, by, x * -1.0), inverse * -1.0, near)


@triton.jit
def stored(x, cache_ptr):
    """`x` in the cache's dtype, bounded to what E4M3 can hold when that is in FP8."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    return x.to(cache_ptr.dtype.element_ty)


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
    rounded = tl.where(magnitude < 0.015625, subnormal, normal).to(tl.int32, bitcast=True)
    # the sign by its bit: Triton 3.6 negates by `0 - x`, which makes +0 of what rounds to -0
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded | sign).to(tl.float32, bitcast=True)


def row_block(rows):
    """`(rows, warps)` of a program that cuts one column of row tiles; few rows go to many programs."""
    return (16, 2) if rows > 256 else (4, 1)


def empty_tiles(outer, inner, device):
    """Values and scales to be written; scales column by column, as cuBLAS reads them."""
    scale = torch.empty_strided((outer, cdiv(inner, TILE)), (1, outer), dtype=torch.float32, device=device)
    return Fp8(torch.empty(outer, inner, dtype=torch.float8_e4m3fn, device=device), scale)
