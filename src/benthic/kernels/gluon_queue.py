# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How programs of a Gluon kernel share tiles of unequal cost: each takes the next one when it needs one.

The warp that loads asks a counter for a tile's number while it still loads the tile before, and tells it to
the groups that multiply, through shared memory. Every so-manieth tile for each program would be worse than it
looks: where experts have two tiles of rows each, a full one and a half one, every second program gets all
that are full.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from benthic.kernels.gluon_tiles import new_bars

AHEAD = gl.constexpr(3)
"""Chunks before a tile's end at which the next one is asked for: an answer takes about as long."""
TURNS = gl.constexpr(2)
"""Numbers that may have been told and not been read by all."""


@gluon.jit
def asked(counter_ptr):
    """Ask for the next number, for the warp that calls this, which goes on meanwhile.

    The first lane asks. Each has an address of its own, as it were: for a single one the assembler would add
    up what lanes ask for, in code that waits for the answer.
    """
    answer = 0
    if counter_ptr is not None:
        answer = gl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; mad.wide.u32 a, l, 4, $1;"
            " mov.u32 $0, 0; setp.eq.u32 p, l, 0; @p atom.relaxed.gpu.global.add.u32 $0, [a], 1;}",
            "=&r,l", [counter_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return answer


@gluon.jit
def answered(answer):
    """Wait for it: the first lane has the number."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
        "=r,r", [answer], dtype=gl.int32, is_pure=False, pack=1,
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
def hand_on(queue, turn, tile, answer, counter_ptr):
    """The next tile of a program, its `turn`-th after the first, told to the groups.

    That is the next of all; without a counter it is every so-manieth, which groups know by themselves.
    """
    tile += gl.num_programs(0)
    if counter_ptr is not None:
        tile = gl.num_programs(0) + answered(answer)
        numbers, full, empty = queue
        mbarrier.wait(empty.index(turn % TURNS), (turn // TURNS) & 1 ^ 1)
        write_number(numbers, turn % TURNS, tile)
        mbarrier.arrive(full.index(turn % TURNS), count=1)
    return tile


@gluon.jit
def told(queue, turn, tile, counter_ptr):
    """The same for a group, which waits for it."""
    tile += gl.num_programs(0)
    if counter_ptr is not None:
        numbers, full, empty = queue
        mbarrier.wait(full.index(turn % TURNS), (turn // TURNS) & 1)
        tile = read_number(numbers, turn % TURNS)
        mbarrier.arrive(empty.index(turn % TURNS), count=1)
    return tile


def new_counter(device):
    """A counter at 0."""
    return torch.zeros(1, dtype=torch.int32, device=device)
