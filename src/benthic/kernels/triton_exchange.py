"""Triton kernels that write rows straight into the memory of other GPUs of one host, and flags between them.

A peer's memory is an address: kernels take tables of addresses, one a rank, so that any memory that this
process can reach may stand in for a peer's (tests let several processes share files). Rows travel as int32
words, whatever they hold.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_permute import sum_of_few_rows, sum_of_rows

FEW_TOKENS = 256
"""Up to so many tokens a row is cut into several programs, since there are too few rows to fill a GPU."""

PROGRAMS = 1024
"""Programs that share many rows; each takes every 1024th."""


@remembered
@triton.jit(do_not_specialize=["tokens", "rank"])
def _push_tokens(
    x_ptr, expert_ptr, weight_ptr, rows_table, choice_table, tokens, rank, max_tokens, words, per_rank,
    CHOICE: tl.constexpr, RANKS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Row t goes to slot (rank, t) of every rank that holds one of its experts; the choice goes to all.

    Slots of tokens that this rank does not have get expert -1.
    """
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    k = tl.arange(0, TOP_K_PAD)
    for t in range(tl.program_id(0), max_tokens, tl.num_programs(0)):
        token = tl.cast(t, tl.int64)
        mine = tl.where(token < tokens, TOP_K, 0)
        expert = tl.load(expert_ptr + token * TOP_K + k, mask=k < mine, other=-1)
        slot = rank * max_tokens + token
        row = tl.load(x_ptr + token * words + word, mask=word < tl.where(token < tokens, words, 0), other=0)
        for peer in tl.static_range(RANKS):
            first = peer * per_rank
            goes = tl.max(((expert >= first) & (expert < first + per_rank)).to(tl.int32), axis=0)
            rows = tl.multiple_of(tl.load(rows_table + peer).to(tl.pointer_type(tl.int32)), 16)
            tl.store(rows + slot * words + word, row, mask=word < tl.where(goes > 0, words, 0))
            if CHOICE and tl.program_id(1) == 0:
                choice = tl.load(choice_table + peer).to(tl.pointer_type(tl.int32)) + slot * 2 * TOP_K
                weight = tl.load(weight_ptr + token * TOP_K + k, mask=k < mine, other=0)
                tl.store(choice + k, expert, mask=k < TOP_K)
                tl.store(choice + TOP_K + k, weight, mask=k < TOP_K)


@remembered
@triton.jit(do_not_specialize=["rank"])
def _push_sums(
    rows_ptr, weight_ptr, row_ptr, dweight_ptr, rows_table, dweight_table, rank, slots, max_tokens, width,
    stride, WEIGHTED: tl.constexpr, DWEIGHT: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    FEW: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum of the copies of each token with some here goes to slot (rank, t) of the token's own rank.

    FEW: only rows that are here are asked for, in pairs, and not all at once; the bits are the same.
    Ranks take turns, so that links are busy from the first token to the last.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    k, ranks = tl.arange(0, TOP_K_PAD), slots // max_tokens
    for s in range(tl.program_id(0), slots, tl.num_programs(0)):
        home, token = tl.cast(s, tl.int64) % ranks, tl.cast(s, tl.int64) // ranks
        arrived, slot = home * max_tokens + token, rank * max_tokens + token
        row = tl.load(row_ptr + arrived * TOP_K + k, mask=k < TOP_K, other=-1)
        if tl.max(row, axis=0) >= 0:
            sources = rows_ptr, weight_ptr, row_ptr, arrived, column, width, stride
            if FEW:
                acc = sum_of_few_rows(*sources, WEIGHTED, TOP_K, WIDTH)
            else:
                acc = sum_of_rows(*sources, WEIGHTED, TOP_K, WIDTH)
            out = tl.load(rows_table + home).to(tl.pointer_type(rows_ptr.dtype.element_ty))
            out = tl.multiple_of(out, 16) + slot * width
            tl.store(out + column, acc.to(rows_ptr.dtype.element_ty), mask=column < width)
            if DWEIGHT and tl.program_id(1) == 0:
                to = tl.load(dweight_table + home).to(tl.pointer_type(tl.float32)) + slot * TOP_K
                value = tl.load(dweight_ptr + arrived * TOP_K + k, mask=k < TOP_K, other=0.0)
                tl.store(to + k, value, mask=k < TOP_K)


@remembered
@triton.jit(do_not_specialize=["slots", "first"])
def _count_copies(
    choice_ptr, count_ptr, slots, first, experts, stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """How many copies in all slots are for experts from `first` on; one program."""
    at = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, slots, BLOCK):
        s = start + at
        for k in tl.static_range(TOP_K):
            expert = tl.load(choice_ptr + s * stride + k, mask=s < slots, other=-1)
            found += ((expert >= first) & (expert < first + experts)).to(tl.int32)
    tl.store(count_ptr, tl.sum(found, axis=0))


@remembered
@triton.jit(do_not_specialize=["offset"])
def _raise_flags(flags_table, offset, RANKS: tl.constexpr):
    """Set one flag at every peer, after everything that this stream wrote; wait where it is still set."""
    for peer in tl.static_range(RANKS):
        flag = tl.load(flags_table + peer).to(tl.pointer_type(tl.int32)) + offset
        seen = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")
        while seen != 0:
            seen = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")


@remembered
@triton.jit(do_not_specialize=["offset"])
def _await_flags(flags_ptr, offset, RANKS: tl.constexpr):
    """Wait for the flags of every peer and take them down, before anything that this stream reads next."""
    for peer in tl.static_range(RANKS):
        flag = flags_ptr + offset + peer
        seen = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
        while seen != 1:
            seen = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")


def push_tokens(x_TW, expert_TK, weight_TK, tables, *, rank, max_tokens, per_rank):
    """Write rows (int32 words) to every rank that holds one of their experts.

    Shapes: x_TW int32; expert_TK int32; weight_TK float32, or None to send rows alone. `tables` are int64
    tensors of addresses by rank: of rows `[n * max_tokens, W]` and of choices `[n * max_tokens, 2 K]` int32.
    """
    tokens, words = x_TW.shape
    top_k = expert_TK.shape[1]
    size, chunks = _chunks(words, max_tokens)
    rows_table, choice_table = tables
    _push_tokens[(min(max_tokens, PROGRAMS), chunks)](
        x_TW, expert_TK, x_TW if weight_TK is None else weight_TK.view(torch.int32), rows_table, choice_table,
        tokens, rank, max_tokens, words, per_rank,
        CHOICE=weight_TK is not None, RANKS=rows_table.shape[0], TOP_K=top_k,
        TOP_K_PAD=next_power_of_2(top_k), WORDS=size, num_warps=_warps(size),
    )  # fmt: skip


def push_sums(rows_RD, row_AK, weight_AK, dweight_AK, tables, *, rank, max_tokens):
    """Write `sum_k weight_ak rows[row_ak]` to the rank of each token that has copies here.

    Shapes: as in `benthic.kernels.ops.sum_copies`; weight_AK and dweight_AK float32 or None. `tables` are
    int64 tensors of addresses by rank: of sums `[n * max_tokens, D]` in the rows' dtype and of weights'
    gradients `[n * max_tokens, K]` float32.
    """
    slots, top_k = row_AK.shape
    width, few = rows_RD.shape[1], max_tokens > FEW_TOKENS
    size, chunks = _chunks(width, FEW_TOKENS)  # parts of rows: sums wait for memory three times
    rows_table, dweight_table = tables
    _push_sums[(slots if few else min(slots, PROGRAMS), chunks)](
        rows_RD, row_AK if weight_AK is None else weight_AK, row_AK,
        row_AK if dweight_AK is None else dweight_AK, rows_table, dweight_table,
        rank, slots, max_tokens, width, rows_RD.stride(0),
        WEIGHTED=weight_AK is not None, DWEIGHT=dweight_AK is not None, TOP_K=top_k,
        TOP_K_PAD=next_power_of_2(top_k), FEW=few, WIDTH=size, num_warps=_warps(size),
    )  # fmt: skip


def count_copies(choice_S2, *, first, experts):
    """How many copies are for experts `[first, first + experts)`, int32 without dims.

    Shapes: choice_S2 int32 `[n * max_tokens, 2 K]`, as `push_tokens` writes choices.
    """
    slots, stride = choice_S2.shape
    count = torch.empty((), dtype=torch.int32, device=choice_S2.device)
    _count_copies[(1,)](
        choice_S2, count, slots, first, experts, stride, TOP_K=stride // 2, BLOCK=4096, num_warps=16
    )
    return count


def raise_flags(flags_table, offset):
    """Set the flag at word `offset` of every rank's flags: what this stream wrote before is there."""
    _raise_flags[(1,)](flags_table, offset, RANKS=flags_table.shape[0], num_warps=1)


def await_flags(flags, offset, ranks):
    """Wait for the `ranks` own flags at word `offset` and take them down."""
    _await_flags[(1,)](flags, offset, RANKS=ranks, num_warps=1)


def _chunks(width, max_tokens):
    """Elements that a program moves of a row, and how many programs a row needs."""
    size = min(1024, next_power_of_2(width)) if max_tokens <= FEW_TOKENS else next_power_of_2(width)
    return size, cdiv(width, size)


def _warps(size):
    return min(16, max(1, size // 512))
