"""Shared by kernels with tiles: finding an expert's rows, loading rows of one head, exactness of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import next_power_of_2


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


@triton.jit
def find_tile(ends_ptr, tile, rows, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert, first row and end row of a tile; expert == experts for the rows past the last end."""
    if EXPERTS == 0:
        expert = (tile * BLOCK_M >= rows).to(tl.int32)
        start_row, end_row = tile * BLOCK_M, rows
    else:
        index = tl.arange(0, EXPERTS)
        # Group number `experts` is the tail; the groups after it are empty.
        end = tl.load(ends_ptr + index, mask=index < experts, other=rows)
        start = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index <= experts), other=0)
        start = tl.where(index > experts, rows, start)
        tiles = (end - start + BLOCK_M - 1) // BLOCK_M
        last = tl.cumsum(tiles, axis=0)
        expert = tl.sum((last <= tile).to(tl.int32), axis=0)
        here = index == expert
        first_tile = tl.sum(tl.where(here, last - tiles, 0), axis=0)
        start_row = tl.sum(tl.where(here, start, 0), axis=0) + (tile - first_tile) * BLOCK_M
        end_row = tl.sum(tl.where(here, end, 0), axis=0)
    return expert, start_row, end_row


def groups(ends_E):
    """`EXPERTS` of `find_tile`: groups that ends make, padded; 0 without ends, for one that owns all rows."""
    return 0 if ends_E is None else next_power_of_2(ends_E.shape[0] + 2)


def precision(dtype):
    """float32 products are exact (no TF32); the argument does not matter for narrower dtypes."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def product_of_chunk(a, b, EMULATE: tl.constexpr):
    """`a b` of one chunk; `EMULATE` multiplies in float32, for the interpreter."""
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505 (Triton compiles one branch)
        return tl.dot(a, b)


def unit_stride(x):
    """`x`, copied if elements of a row lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def multiprocessors(device):
    """Multiprocessors of a GPU; 1 where there is none, as under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
