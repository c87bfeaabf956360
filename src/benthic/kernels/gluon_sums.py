# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How tiles of weight gradients leave in Gluon: part by part through shared memory, from there by TMA.

A part is 32 columns of the 64 rows that a group of warps has. TMA writes it, or has the second-level cache
add it, while the group goes on; the group waits only for a part of shared memory that it needs again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benthic.kernels.gluon_tiles import add, layout_of, meet, unload, view

HEIGHT = gl.constexpr(64)
"""Rows of sums that a group has."""
PART = gl.constexpr(32)
"""Columns of sums that leave the registers at once: 128 bytes of float32."""


@gluon.jit
def new_slots(out, COUNT: gl.constexpr):
    """Shared memory for parts of sums that are on their way."""
    ROWS: gl.constexpr = out.block_type.shape[1]
    COLUMNS: gl.constexpr = out.block_type.shape[2]
    return gl.allocate_shared_memory(out.dtype, [COUNT, 1, ROWS, COLUMNS], out.layout)


@gluon.jit
def _parts(x):
    """All columns, `PART` after `PART`."""
    if x.shape[1] == PART:
        return (x,)
    else:  # noqa: RET505 (the compiler reads what follows a return)
        first, last = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        return _parts(first) + _parts(last)


@gluon.jit
def fetch(out_ptr, expert, wanted, row, column, height, width, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Have the second-level cache read the old float32 sums of a group while it multiplies."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PLACES: gl.constexpr = 128 if ROWS < 128 else ROWS
    TOGETHER: gl.constexpr = ROWS * COLUMNS // PLACES
    place = gl.arange(0, PLACES, layout=layout)
    row, column = row + place % ROWS, column + place // ROWS * TOGETHER
    at = out_ptr + (expert.to(gl.int64) * height + row) * width + column
    size = gl.where((row < height) & wanted, gl.minimum(width - column, TOGETHER), 0) * 4
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [at, size], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _give(part, slot, out, at, SLOTS: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr):
    """Have TMA write or add a part from shared memory, as soon as what stood there has left."""
    ROWS: gl.constexpr = out.block_type.shape[1]
    COLUMNS: gl.constexpr = out.block_type.shape[2]
    MATRIX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], out.dtype)
    matrix = view(slot, out.dtype, [ROWS, COLUMNS], MATRIX)
    tma.store_wait(SLOTS - 1)
    meet()
    if TURNED:
        matrix.permute((1, 0)).store(part.to(out.dtype))
    else:
        matrix.store(part.to(out.dtype))
    fence_async_shared()
    meet()
    if ADD:
        add(out, at, slot)
    else:
        unload(out, at, slot)


@gluon.jit
def leave(
    sums, slots, group, out, expert, left, right,
    SLOTS: gl.constexpr, ADD: gl.constexpr, TURNED: gl.constexpr, SQUARES: gl.constexpr,
):  # fmt: skip
    """Have all sums of a group written or added; each row's squares, if asked for.

    TURNED: what is a row of the sums, from `left` on, is a column of `out`. `tma.store_wait(0)` has to follow
    the last tile.
    """
    PARTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    squares = gl.zeros([HEIGHT], gl.float32, layout=gl.SliceLayout(1, PARTS))
    parts = _parts(sums)
    for i in gl.static_range(sums.shape[1] // PART):
        part, slot = gl.convert_layout(parts[i], PARTS), slots.index(group * SLOTS + i % SLOTS)
        if TURNED:
            _give(part, slot, out, [expert, right + i * PART, left], SLOTS, ADD, TURNED)
        else:
            _give(part, slot, out, [expert, left, right + i * PART], SLOTS, ADD, TURNED)
        if SQUARES:
            squares += gl.sum(part * part, axis=1)
    return squares


def box(turned):
    """Expert, rows and columns of the sums that leave at once."""
    return [1, PART.value, HEIGHT.value] if turned else [1, HEIGHT.value, PART.value]


def described(out, *, turned=False):
    """Where sums leave to, [E, O, I] or [O, I], and a descriptor; TMA leaves out what stands over an edge.

    It writes where 16 bytes begin: a tensor that lies otherwise is copied, and to be copied back.
    """
    expert, rows, columns = block = box(turned)
    sums = out if out.data_ptr() % 16 == 0 else out.clone()
    layout = layout_of(rows, columns, out.dtype, expert)
    shape, strides = list(sums.shape), list(sums.stride())
    if len(shape) == 2:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    return sums, TensorDescriptor(sums, shape, strides, block, layout)
