# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How programs of a Gluon kernel share tiles of unequal cost: each takes the next one when it needs one.

The warp that loads takes a tile's number from a counter and tells it to the groups that multiply, through
shared memory. Every so-manieth tile for each program would be worse than it looks: where experts have two
tiles of rows each, a full one and a half one, every second program gets all that are full.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from benthic.kernels.gluon_tiles import new_bars

TURNS = gl.constexpr(2)
"""Numbers that may have been told and not been read by all."""


@gluon.jit
def taken(counter_ptr):
    """The next number, once for the warp that calls this."""
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 l, v; mov.u32 l, %laneid; mov.u32 v, 0; setp.eq.u32 p, l, 0;"
        " @p atom.relaxed.gpu.global.add.u32 v, [$1], 1; shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff;}",
        "=r,l", [counter_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def write_number(numbers, at, value):
    """Write a number to shared memory, by a single warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(at).store(gl.full([1], 0, gl.int32, layout=layout) + value)


@gluon.jit
def read_number(numbers, at):
    """Read it, by a group of four warps."""
    return gl.max(numbers.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def new_queue(GROUPS: gl.constexpr):
    """Numbers in shared memory, and barriers: of one that is told, and of one that all groups have read."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [TURNS, 1], plain), new_bars(TURNS, 1), new_bars(TURNS, GROUPS)


@gluon.jit
def tell(queue, turn, tile):
    """Tell the groups the number of a tile, the program's `turn`-th."""
    numbers, full, empty = queue
    mbarrier.wait(empty.index(turn % TURNS), (turn // TURNS) & 1 ^ 1)
    write_number(numbers, turn % TURNS, tile)
    mbarrier.arrive(full.index(turn % TURNS), count=1)


@gluon.jit
def told(queue, turn):
    """Wait for it."""
    numbers, full, empty = queue
    mbarrier.wait(full.index(turn % TURNS), (turn // TURNS) & 1)
    tile = read_number(numbers, turn % TURNS)
    mbarrier.arrive(empty.index(turn % TURNS), count=1)
    return tile


@gluon.jit
def following(tile, counter_ptr, queued):
    """The next tile of a program: the next of all if there is a counter, else every so-manieth."""
    following = tile + gl.num_programs(0)
    if queued > 0:
        following = gl.num_programs(0) + taken(counter_ptr)
    return following


def counter_of(ends_E, tiles, programs):
    """A counter at 0 and 1; somewhere allowed and 0 where each tile may have a program, or all are alike."""
    if ends_E.shape[0] == 1 or tiles <= programs:
        return ends_E, 0
    return torch.zeros(1, dtype=torch.int32, device=ends_E.device), 1
