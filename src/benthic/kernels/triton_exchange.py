"""Triton kernels that write rows straight into the memory of other GPUs of one host, and flags between them.

A peer's memory is an address: kernels take tables of addresses, one a rank, so that any memory that this
process can reach may stand in for a peer's (tests let several processes share files). Rows travel as int32
words, whatever they hold.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_permute import sum_of_few_rows, sum_of_rows
from benthic.kernels.triton_tiles import multiprocessors

PART = 1024
"""Most columns of a sum that a program makes. All tokens' first columns leave first, then their next ones."""

FEW_TOKENS = 256
"""Up to so many tokens a row is cut into several programs, since there are too few rows to fill a GPU."""

PROGRAMS = 1024
"""Programs that share many rows; each takes every 1024th."""

HOME_SHARE = 2
"""One of so many multiprocessors sums at home and waits there. Beside another kernel one finds no room, whatever
registers are left, where it wants the memory of a multiprocessor divided otherwise: with two small programs on
every one of them the pushes that they waited for never began."""

HOME_TOKENS = 8
"""Tokens of which each program asks for a part at a time: a warp asks for 2 KiB of bf16 from every rank."""

HOME_WARPS = 8
"""Of each of them."""


class Signals(NamedTuple):
    """Flags of a mailbox for kernels that raise and await them themselves.

    At word `full` of the flags begin those of each part from each rank, at `free` those from each rank.
    `pushed` (of each part) and `read` are counts of this rank alone, int32: programs that are over, 0 between
    kernels.
    """

    flags_table: torch.Tensor
    pushed: torch.Tensor
    read: torch.Tensor
    full: int
    free: int


@remembered
@triton.jit(do_not_specialize=["tokens", "rank", "full"])
def _push_tokens(
    x_ptr, expert_ptr, weight_ptr, rows_table, choice_table, flags_table, count_ptr, full,
    tokens, rank, max_tokens, words, per_rank,
    CHOICE: tl.constexpr, RANKS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    WORDS: tl.constexpr, RAISES: tl.constexpr,
):  # fmt: skip
    """Row t goes to slot (rank, t) of every rank that holds one of its experts; the choice goes to all.

    Slots of tokens that this rank does not have get expert -1. RAISES: the last program raises the flags.
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
    if RAISES:
        programs = tl.num_programs(0) * tl.num_programs(1)
        if _is_last(count_ptr, programs):
            _raise_all(flags_table, full + rank, RANKS)


@remembered
@triton.jit(do_not_specialize=["rank", "full"])
def _push_sums(
    rows_ptr, weight_ptr, row_ptr, dweight_ptr, rows_table, dweight_table, flags_table, count_ptr, full,
    rank, slots, max_tokens, width, stride,
    WEIGHTED: tl.constexpr, DWEIGHT: tl.constexpr, RANKS: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr, FEW: tl.constexpr, WIDTH: tl.constexpr, RAISES: tl.constexpr,
):  # fmt: skip
    """The sum of the copies of each token with some here goes to slot (rank, t) of the token's own rank.

    FEW: only rows that are here are asked for, in pairs, and not all at once; the bits are the same.
    RAISES: ranks take turns, so that the links are busy all the time, and the last program of each part
    raises its flags.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, TOP_K_PAD)
    for s in range(tl.program_id(0), slots, tl.num_programs(0)):
        arrived = tl.cast(s, tl.int64)
        if RAISES:
            arrived = arrived % RANKS * max_tokens + arrived // RANKS
        row = tl.load(row_ptr + arrived * TOP_K + k, mask=k < TOP_K, other=-1)
        if tl.max(row, axis=0) >= 0:
            home, slot = arrived // max_tokens, rank * max_tokens + arrived % max_tokens
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
    if RAISES:
        part = tl.program_id(1)
        if _is_last(count_ptr + part, tl.num_programs(0)):
            _raise_all(flags_table, full + part * RANKS + rank, RANKS)


@remembered
@triton.jit(do_not_specialize=["full", "free", "tokens", "rank"])
def _sum_home(
    rows_ptr, side_ptr, expert_ptr, out_ptr, dweight_ptr, flags_table, count_ptr, full, free,
    tokens, rank, max_tokens, width, per_rank,
    DWEIGHT: tl.constexpr, RANKS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over ranks, in order, of slot (rank, t): part by part as it comes; dweight with the first.

    The last program takes the flags of all parts down, and then tells the peers that all was read.
    """
    flags_ptr = tl.load(flags_table + rank).to(tl.pointer_type(tl.int32)) + full
    start, step = tl.program_id(0) * TOKENS, tl.num_programs(0) * TOKENS
    parts = tl.cdiv(width, WIDTH)
    k = tl.arange(0, TOP_K_PAD)[None, :]
    for part in range(parts):
        following = _experts_of(expert_ptr, start, tokens, TOP_K, TOP_K_PAD, TOKENS)
        _await_all(flags_ptr + part * RANKS, RANKS)
        column = part * WIDTH + tl.arange(0, WIDTH)[None, :]
        for first in range(start, tokens, step):
            expert = following  # read one turn ahead: rows wait for them
            following = _experts_of(expert_ptr, first + step, tokens, TOP_K, TOP_K_PAD, TOKENS)
            holder = tl.where(expert >= 0, expert // per_rank, -1)
            t = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
            if DWEIGHT:
                given = (holder >= 0) & (part == 0)
                slot = holder.to(tl.int64) * max_tokens + t
                dweight = tl.load(side_ptr + slot * TOP_K + k, mask=given, other=0.0)
                tl.store(dweight_ptr + t * TOP_K + k, dweight, mask=given)
            acc = tl.zeros([TOKENS, WIDTH], tl.float32)
            for peer in tl.static_range(RANKS):
                came = tl.max((holder == peer).to(tl.int32), axis=1, keep_dims=True) > 0
                row = rows_ptr + (peer * max_tokens + t) * width
                acc += tl.load(row + column, mask=came & (column < width), other=0.0).to(tl.float32)
            out = acc.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + t * width + column, out, mask=(t < tokens) & (column < width))
    if _is_last(count_ptr, tl.num_programs(0)):
        for flag in range(parts * RANKS):
            tl.atomic_xchg(flags_ptr + flag, 0)
        _raise_all(flags_table, free + rank, RANKS)


@triton.jit
def _experts_of(
    expert_ptr, first, tokens, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, TOKENS: tl.constexpr
):
    """Choices of some tokens, -1 beyond them."""
    t, k = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, TOP_K_PAD)[None, :]
    return tl.load(expert_ptr + t * TOP_K + k, mask=(t < tokens) & (k < TOP_K), other=-1)


@triton.jit
def _is_last(count_ptr, programs):
    """Whether all others were here before: what they read and wrote is over then. The count is 0 again."""
    tl.debug_barrier()  # an atomic orders what its own thread did; others of this program may be behind
    last = tl.atomic_add(count_ptr, 1, sem="release") == programs - 1
    if last:
        tl.atomic_xchg(count_ptr, 0, sem="acq_rel")  # acquires what all released
    return last


@triton.jit
def _raise_all(flags_table, offset, RANKS: tl.constexpr):
    """Set one flag at every peer, where it is known to be down."""
    for peer in tl.static_range(RANKS):
        flag = tl.load(flags_table + peer).to(tl.pointer_type(tl.int32)) + offset
        tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def _await_all(flags_ptr, RANKS: tl.constexpr):
    """Wait for the flags of every peer and leave them up."""
    for peer in tl.static_range(RANKS):
        seen = tl.atomic_add(flags_ptr + peer, 0, sem="acquire", scope="sys")
        while seen == 0:
            seen = tl.atomic_add(flags_ptr + peer, 0, sem="acquire", scope="sys")


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


def push_tokens(x_TW, expert_TK, weight_TK, tables, *, rank, max_tokens, per_rank, signals=None):
    """Write rows (int32 words) to every rank that holds one of their experts; with signals raise their flags.

    Shapes: x_TW int32; expert_TK int32; weight_TK float32, or None to send rows alone. `tables` are int64
    tensors of addresses by rank: of rows `[n * max_tokens, W]` and of choices `[n * max_tokens, 2 K]` int32.
    """
    tokens, words = x_TW.shape
    top_k = expert_TK.shape[1]
    size, chunks = _chunks(words, max_tokens)
    rows_table, choice_table = tables
    _push_tokens[(min(max_tokens, PROGRAMS), chunks)](
        x_TW, expert_TK, x_TW if weight_TK is None else weight_TK.view(torch.int32), rows_table, choice_table,
        *_raised(signals, rows_table), tokens, rank, max_tokens, words, per_rank,
        CHOICE=weight_TK is not None, RANKS=rows_table.shape[0], TOP_K=top_k,
        TOP_K_PAD=next_power_of_2(top_k), WORDS=size, RAISES=signals is not None, num_warps=_warps(size),
    )  # fmt: skip


def push_sums(rows_RD, row_AK, weight_AK, dweight_AK, tables, *, rank, max_tokens, signals=None):
    """Write `sum_k weight_ak rows[row_ak]` to the rank of each token that has copies here.

    With signals, raise the flags of each part as soon as it is written.

    Shapes: as in `benthic.kernels.ops.sum_copies`; weight_AK and dweight_AK float32 or None. `tables` are
    int64 tensors of addresses by rank: of sums `[n * max_tokens, D]` in the rows' dtype and of weights'
    gradients `[n * max_tokens, K]` float32.
    """
    slots, top_k = row_AK.shape
    width, few = rows_RD.shape[1], max_tokens > FEW_TOKENS
    size, chunks = _part(width)  # sums wait for memory three times
    rows_table, dweight_table = tables
    _push_sums[(slots if few else min(slots, PROGRAMS), chunks)](
        rows_RD, row_AK if weight_AK is None else weight_AK, row_AK,
        row_AK if dweight_AK is None else dweight_AK, rows_table, dweight_table,
        *_raised(signals, rows_table), rank, slots, max_tokens, width, rows_RD.stride(0),
        WEIGHTED=weight_AK is not None, DWEIGHT=dweight_AK is not None, RANKS=rows_table.shape[0],
        TOP_K=top_k, TOP_K_PAD=next_power_of_2(top_k), FEW=few, WIDTH=size, RAISES=signals is not None,
        num_warps=_warps(size),
    )  # fmt: skip


def sum_home(rows_SD, dweight_SK, expert_TK, signals, *, rank, ranks, per_rank, max_tokens):
    """Sum what `push_sums` of all ranks writes here while it is coming, and say that it was read.

    Waits on the device, in programs so few that pushes run beside them: this rank's own may not be over, nor
    begun. Takes the place of `await_flags`, `ops.home_slots`, `ops.sum_copies` and `raise_flags`: same bits.
    Shapes: rows_SD `[n * max_tokens, D]`; dweight_SK float32 `[n * max_tokens, K]` or None; expert_TK int32.
    Returns: sums [T, D] and weights' gradients float32 [T, K], or None.
    """
    (tokens, top_k), width = expert_TK.shape, rows_SD.shape[1]
    out_TD = torch.empty(tokens, width, dtype=rows_SD.dtype, device=rows_SD.device)
    given = dweight_SK is not None
    dweight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=rows_SD.device) if given else None
    size, _ = _part(width)
    most = multiprocessors(rows_SD.device) // HOME_SHARE
    _sum_home[(max(1, min(most, cdiv(tokens, HOME_TOKENS))),)](
        rows_SD, dweight_SK if given else rows_SD, expert_TK, out_TD, dweight_TK if given else out_TD,
        signals.flags_table, signals.read, signals.full, signals.free,
        tokens, rank, max_tokens, width, per_rank,
        DWEIGHT=given, RANKS=ranks, TOP_K=top_k, TOP_K_PAD=next_power_of_2(top_k),
        TOKENS=HOME_TOKENS, WIDTH=size, num_warps=HOME_WARPS,
    )  # fmt: skip
    return out_TD, dweight_TK


def parts_of(width):
    """How many parts of sums are pushed one behind the other."""
    return _part(width)[1]


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


def _raised(signals, table):
    """What a push takes to raise flags; anything where it raises none."""
    return (table, table, 0) if signals is None else (signals.flags_table, signals.pushed, signals.full)


def _part(width):
    """Columns of one part of a sum, and how many parts there are."""
    size = min(PART, next_power_of_2(width))
    return size, cdiv(width, size)


def _chunks(width, max_tokens):
    """Elements that a program moves of a row, and how many programs a row needs."""
    size = min(1024, next_power_of_2(width)) if max_tokens <= FEW_TOKENS else next_power_of_2(width)
    return size, cdiv(width, size)


def _warps(size):
    return min(16, max(1, size // 512))
