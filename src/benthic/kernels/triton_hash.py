# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Shared by kernels that draw numbers: a hash of a seed and a counter, the same on every device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(word):
    """One output of splitmix64 for a state, as uint64."""
    z = word + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def drawn(seed, position):
    """24 random bits of each (seed, position), both int64, as uint64."""
    seed, position = seed.to(tl.uint64, bitcast=True), position.to(tl.uint64, bitcast=True)
    return mixed(mixed(seed) + position * 0x9E3779B97F4A7C15) >> 40
