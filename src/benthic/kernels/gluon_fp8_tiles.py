# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What FP8 products in Gluon share: sizes, registers, a product of 64 rows and 64 columns, descriptors."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(128)
CHUNK = gl.constexpr(128)
"""Dims that have one scale, and columns that share one of the weight."""
PART = gl.constexpr(64)
"""Rows or columns of a product; some of them side by side are the columns of a tile."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


@gluon.jit
def start(x_tile, weight_ring, place, zero):
    """Start the product of a group's rows and 64 columns, summed from zero."""
    return warpgroup_mma(x_tile, weight_ring.index(place).permute((1, 0)), zero, use_acc=False, is_async=True)


def tiles_of(values_RK):
    """A descriptor of blocks of 64 rows by a chunk; zeros lie behind the last row and the last dim."""
    block = [PART.value, CHUNK.value]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(values_RK, list(values_RK.shape), list(values_RK.stride()), block, layout)


def one_end(rows, device):
    """The ends of a single expert that owns all rows."""
    return torch.full((1,), rows, dtype=torch.int32, device=device)
