# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What Gluon kernels for Hopper share: names of both Triton versions, barriers, places, descriptors."""

from __future__ import annotations

import functools
import threading

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, ir
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9's names, and before that 3.6's.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
unload = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def _add_tile(tensor_desc, coord, src, _semantic=None):
    """Triton 3.6 has the instruction, but no name for it."""
    at = _semantic._convert_to_ir_values(coord, require_i64=False)  # noqa: SLF001
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, at, src.handle)


add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _add_tile
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
view = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret  # noqa: SLF001
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

LOG2E = gl.constexpr(1.4426950408889634)
_DTYPES = {
    torch.int32: gl.int32,
    torch.float32: gl.float32,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}
_thread = threading.local()


@gluon.jit
def place(tiles_ptr, HEADS: gl.constexpr, TOGETHER: gl.constexpr, LISTED: gl.constexpr):
    """Head, ordinal of the tile and sequence of a program: tiles in order, of `TOGETHER` heads each.

    LISTED: in the order of a list (`triton_pack_tiles`), where sequence -1 has no tile.
    """
    PARTS: gl.constexpr = HEADS // TOGETHER
    if LISTED:
        part, at = gl.program_id(2), tiles_ptr + 2 * gl.program_id(1)
        sequence, tile = gl.load(at), gl.load(at + 1)
    else:
        part, tile, sequence = gl.program_id(2) % PARTS, gl.program_id(1), gl.program_id(2) // PARTS
    return part * TOGETHER + gl.program_id(0), tile, sequence


@gluon.jit
def bounds_of(starts_ptr, sequence, LISTED: gl.constexpr):
    """Where a sequence starts and ends; nothing lies between these for sequence -1 of a list."""
    if LISTED:
        own = gl.maximum(sequence, 0)
        start = gl.load(starts_ptr + own)
        end = gl.where(sequence < 0, start, gl.load(starts_ptr + own + 1))
    else:
        start, end = gl.load(starts_ptr + sequence), gl.load(starts_ptr + sequence + 1)
    return start, end


@gluon.jit
def new_bars(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers in shared memory, each of which waits for `ARRIVALS`."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def clear_after(block, kept, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """Zero the rows of a block in shared memory from `kept` on: their weights are 0, but 0 times NaN is not.

    Both groups do so, and write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    for first in gl.static_range(
        0, BLOCK_N, 16
    ):  # in parts of eight values a thread, beside all that it keeps
        for column in gl.static_range(0, WIDTH, 64):
            part = block.slice(first, 16).slice(column, 64, dim=1)
            value = part.load(layout)
            part.store(gl.where((row < kept - first)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def among_columns(s, bound, other, LAYOUT: gl.constexpr, FROM: gl.constexpr):
    """`s` in the columns up to its row's `bound`, or those `FROM` there on, and `other` in the rest.

    Which eights of columns a thread has, the compiler knows: numbers of columns take no registers.
    """
    EIGHTS: gl.constexpr = s.shape[1] // 8
    parts = s.reshape([s.shape[0], EIGHTS, 8])
    PARTS: gl.constexpr = parts.type.layout
    bound = gl.convert_layout(bound, gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))[:, None, None]
    rest = bound - gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTS)))[None, None, :]
    first = 8 * gl.arange(0, EIGHTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, PARTS)))[None, :, None]
    kept = gl.where(first >= rest if FROM else first <= rest, parts, other)
    return gl.convert_layout(kept.reshape(s.shape), LAYOUT)


@gluon.jit
def product(left, right, zero, D_2: gl.constexpr):
    """Start `left right^T` of a head in one or two tiles."""
    left_1, left_2 = left
    right_1, right_2 = right
    s = warpgroup_mma(left_1, right_1.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D_2 > 0:
        s = warpgroup_mma(left_2, right_2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def store(ptr, acc, staged, start, first_row, rows, head, first, scale, HEADS: gl.constexpr, D: gl.constexpr):
    """Write dims of a group's 64 rows from `first` on, through shared memory of operands it needs no more."""
    WIDTH: gl.constexpr = staged.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    staged.store((acc * scale).to(ptr.dtype.element_ty))
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    dim = first + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = ((start + row).to(gl.int64)[:, None] * HEADS + head) * D + dim[None, :]
    gl.store(ptr + at, staged.load(LAYOUT), mask=(row < rows)[:, None])


@gluon.jit
def nothing(ptr, start, rows, tile, head, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr):
    """Zeros for a tile of `BLOCK_M` rows that meets nothing."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    row = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    for first in range(0, D, 32):
        at = ((start + row).to(gl.int64)[:, None] * HEADS + head) * D + first + dim[None, :]
        zero = gl.zeros([BLOCK_M, 32], ptr.dtype.element_ty, layout=layout)
        gl.store(ptr + at, zero, mask=(row < rows)[:, None])


def loadable(x_THd):
    """As TMA takes it: heads one after another in a row, which begins and steps by multiples of 16 bytes."""
    _tokens, heads, width = x_THd.shape
    eights = x_THd.stride(0) % 8 == 0 and x_THd.stride(1) % 8 == 0 and x_THd.data_ptr() % 16 == 0
    one_row = x_THd.stride(1) >= width and x_THd.stride(0) >= (heads - 1) * x_THd.stride(1) + width
    return x_THd if x_THd.stride(2) == 1 and eights and one_row else x_THd.contiguous()


def rows_loadable(x_RI):
    """As TMA takes a matrix: rows begin and step by multiples of 16 bytes."""
    aligned = x_RI.stride(0) * x_RI.element_size() % 16 == 0 and x_RI.data_ptr() % 16 == 0
    return x_RI if x_RI.stride(1) == 1 and aligned else x_RI.contiguous()


def rows_of(x_THd, rows, width):
    """A descriptor of blocks of `rows` tokens by `width` dims of a head; zeros lie behind the last token."""
    tokens, heads, dims = x_THd.shape
    shape = [tokens, (heads - 1) * x_THd.stride(1) + dims]
    layout = layout_of(rows, width, x_THd.dtype)
    return TensorDescriptor(x_THd, shape, [x_THd.stride(0), 1], [rows, width], layout)


def blocks_of(x, rows, columns, *, turned=False):
    """A descriptor of blocks of a matrix, or of some below one another, whose rows have unit stride.

    Zeros lie behind its ends. `turned`: of the transposed matrices.
    """
    (row, column), layout = ((-1, -2) if turned else (-2, -1)), layout_of(rows, columns, x.dtype)
    width = x.shape[column]
    return TensorDescriptor(x, [x.numel() // width, width], [x.stride(row), 1], [rows, columns], layout)


@functools.cache
def layout_of(rows, columns, dtype, *before):
    """Of a block in shared memory, with dims `before` its rows; Triton takes microseconds for one."""
    return gl.NVMMASharedLayout.get_default_for([*before, rows, columns], _DTYPES[dtype])


def take_context(device):
    """Make CUDA's context that of this thread: a descriptor needs it before Triton's launch looks for it.

    A thread of autograd has none until it launches something, which it may not have done yet.
    """
    if device.type == "cuda" and not hasattr(_thread, "launched"):
        torch.zeros(1, device=device)
        _thread.launched = True
