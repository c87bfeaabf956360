# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""A stable counting sort of copies by expert, without atomics; shared by exchanges and by local permutations.

The copies are read twice: chunks are counted expert by expert, then each chunk knows where its rows begin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered

# Programs that share the copies of a counting sort, and (expert, copy) pairs that one looks at in a step.
_PROGRAMS = 256
_PAIRS = 8192


@remembered
@triton.jit(do_not_specialize=["copies", "chunk", "first"])
def _count_copies(
    expert_ptr, row_ptr, copy_ptr, found_ptr, copies, chunk, stride, first, experts,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's copies each expert here has; the copies of others have no row."""
    program, at, each = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in range(program * chunk, min((program + 1) * chunk, copies), BLOCK):
        copy = start + at
        local = _local(expert_ptr, copy, copies, stride, first, experts, TOP_K)
        found += tl.sum((local[None, :] == each[:, None]).to(tl.int32), axis=1)
        tl.store(row_ptr + copy, tl.full([BLOCK], -1, tl.int64), mask=(copy < copies) & (local < 0))
        tl.store(copy_ptr + copy, tl.zeros([BLOCK], tl.int64), mask=copy < copies)
    tl.store(found_ptr + each * PROGRAMS + program, found)


@remembered
@triton.jit(do_not_specialize=["copies", "chunk", "first"])
def _place_copies(
    expert_ptr, row_ptr, copy_ptr, found_ptr, ends_ptr, copies, chunk, stride, first, experts,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, PROGRAMS: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk's copies: after those of lower experts, and of the same expert in chunks before."""
    program, at, each = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    total, before = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    for low in range(0, PROGRAMS, PART):
        other = low + tl.arange(0, PART)
        kept = (other < tl.num_programs(0))[None, :]
        found = tl.load(found_ptr + each[:, None] * PROGRAMS + other[None, :], mask=kept, other=0)
        total += tl.sum(found, axis=1)
        before += tl.sum(tl.where((other < program)[None, :], found, 0), axis=1)
    end = tl.cumsum(total, axis=0)
    if program == 0:
        tl.store(ends_ptr + each, end, mask=each < experts)
    row = end - total + before
    for start in range(program * chunk, min((program + 1) * chunk, copies), BLOCK):
        copy = start + at
        local = _local(expert_ptr, copy, copies, stride, first, experts, TOP_K)
        mine = (local[None, :] == each[:, None]).to(tl.int32)
        place = tl.sum(mine * (row[:, None] + tl.cumsum(mine, axis=1) - 1), axis=0)
        tl.store(row_ptr + copy, place.to(tl.int64), mask=local >= 0)
        tl.store(copy_ptr + place, copy.to(tl.int64), mask=local >= 0)
        row += tl.sum(mine, axis=1)


@triton.jit
def _local(expert_ptr, copy, copies, stride, first, experts, TOP_K: tl.constexpr):
    """The experts of some copies, counted from the first one here; -1 for none and for one that is not."""
    at = copy // TOP_K * stride + copy % TOP_K
    local = tl.load(expert_ptr + at, mask=copy < copies, other=-1) - first
    return tl.where((copy < copies) & (local < experts), tl.maximum(local, -1), -1)


def sort_copies(expert_AK, *, first, experts):
    """Sort the copies whose expert is in `[first, first + experts)`; others have no row.

    Returns: where each expert's rows end, int32; the row of each copy, -1 for none, and the copy in each row,
    0 past the last end, both int64.
    """
    expert_AK = expert_AK if expert_AK.stride(1) == 1 else expert_AK.contiguous()
    (_, top_k), copies, device = expert_AK.shape, expert_AK.numel(), expert_AK.device
    ends_E = torch.empty(experts, dtype=torch.int32, device=device)
    row_AK = torch.empty(expert_AK.shape, dtype=torch.int64, device=device)
    copy_R = torch.empty(copies, dtype=torch.int64, device=device)
    padded = next_power_of_2(experts)
    block = max(16, min(1024, _PAIRS // padded))
    found = torch.empty(padded, _PROGRAMS, dtype=torch.int32, device=device)
    chunk = block * cdiv(copies, block * _PROGRAMS)
    grid = (max(1, cdiv(copies, max(chunk, 1))),)
    sizes = copies, chunk, expert_AK.stride(0), first, experts
    shape = {"TOP_K": top_k, "EXPERTS": padded, "PROGRAMS": _PROGRAMS, "BLOCK": block}
    _count_copies[grid](expert_AK, row_AK, copy_R, found, *sizes, **shape, num_warps=8)
    part = max(1, min(_PROGRAMS, _PAIRS // padded))
    _place_copies[grid](expert_AK, row_AK, copy_R, found, ends_E, *sizes, **shape, PART=part, num_warps=8)
    return ends_E, row_AK, copy_R
