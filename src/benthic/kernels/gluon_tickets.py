# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Tickets, on which the loading warp of a persistent Gluon kernel writes what the other groups must know of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FIELDS = gl.constexpr(6)
"""Of a ticket: first query and queries of the sequence, its keys, the tile (-1: no more), the head,
and one for the kernel."""


@gluon.jit
def next_ticket(counter_ptr):
    """Take a number, once for the warp that calls this."""
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 l, v; mov.u32 l, %laneid; mov.u32 v, 0; setp.eq.u32 p, l, 0;"
        " @p atom.relaxed.gpu.global.add.u32 v, [$1], 1; shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff;}",
        "=r,l", [counter_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def write_field(tickets, slot, field: gl.constexpr, value):
    """One number of a ticket, by a single warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tickets.index(slot * FIELDS + field).store(gl.full([1], 0, gl.int32, layout=layout) + value)


@gluon.jit
def read_field(tickets, slot, field: gl.constexpr):
    """One number of a ticket, by a group of four warps."""
    return gl.max(tickets.index(slot * FIELDS + field).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def bounds(rows, keys, tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """How many blocks of keys a tile meets, and how many of them, from the left, all its queries see."""
    end, first_masked = keys, keys // BLOCK_N
    if CAUSAL:
        offset = keys - rows
        end = gl.minimum(keys, gl.maximum((tile + 1) * BLOCK_M + offset, 0))
        first_masked = gl.minimum(first_masked, gl.maximum(tile * BLOCK_M + offset + 1, 0) // BLOCK_N)
    return (end + BLOCK_N - 1) // BLOCK_N, first_masked
