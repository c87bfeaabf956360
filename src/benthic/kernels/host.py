"""Arithmetic of launches on the host.

Triton's functions of these names are made for kernels, and take some microseconds outside of one.
"""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """`x / y`, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of 2 that is at least x; 1 for 1 and below."""
    return 1 << max(x - 1, 0).bit_length()


def row_tile(width: int, elements: int) -> tuple[int, int, int]:
    """`(rows, padded width, warps)` of a tile of about `elements` elements that holds whole rows."""
    padded = next_power_of_2(width)
    rows = max(1, elements // padded)
    return rows, padded, min(16, max(4, rows * padded // 1024))
