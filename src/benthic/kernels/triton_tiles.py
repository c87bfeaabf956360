"""Loading tiles of heads: rows of a packed tensor by columns of one head, masked where a tile overhangs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, stride, dim, kept, WIDTH: tl.constexpr, END: tl.constexpr, ROWS: tl.constexpr):
    """Load rows 0 .. ROWS from `base`; rows not `kept` and columns from WIDTH on read as zero.

    `END` is one past the last column of the tile: up to WIDTH, columns need no mask. Offsets inside
    a tile fit 32 bits; `base` carries the rest, which keeps 64-bit arithmetic out of the inner loops.
    """
    at = base + tl.arange(0, ROWS)[:, None] * stride + dim[None, :]
    if END > WIDTH:
        tile = tl.load(at, mask=kept[:, None] & (dim < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=kept[:, None], other=0.0)
    return tile


@triton.jit
def advance(base, rows, stride):
    """The address `rows` rows further, in 64-bit arithmetic."""
    return base + (tl.full([], 0, tl.int64) + rows) * stride
