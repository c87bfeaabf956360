"""Triton kernels that say where an exchange's rows lie: a counting sort and look-ups, without atomics.

Plain torch takes a sort and a dozen helpers for the first, and ten kernels for the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_counting_sort import sort_copies


@remembered
@triton.jit(do_not_specialize=["tokens"])
def _choose_ranks(
    expert_ptr, goes_ptr, count_ptr, tokens, per_rank, ranks, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Which tokens go to one rank; how many, and how many of their copies."""
    n, at = tl.program_id(0), tl.arange(0, BLOCK)
    leaving, copies = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(0, tokens, BLOCK):
        t = first + at
        here = tl.zeros([BLOCK], tl.int32)
        for k in tl.static_range(TOP_K):
            expert = tl.load(expert_ptr + t * TOP_K + k, mask=t < tokens, other=2147483647)
            here += (expert // per_rank == n).to(tl.int32)
        tl.store(goes_ptr + t * ranks + n, here > 0, mask=t < tokens)
        leaving += (here > 0).to(tl.int32)
        copies += here
    tl.store(count_ptr + 2 * n, tl.sum(leaving, axis=0).to(tl.int64))
    tl.store(count_ptr + 2 * n + 1, tl.sum(copies, axis=0).to(tl.int64))


@remembered
@triton.jit(do_not_specialize=["tokens"])
def _place_departures(
    goes_ptr, token_ptr, slot_ptr, tokens, ranks, BLOCK: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """The rows that leave for one rank, after those for lower ones."""
    n, at, lower = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, RANKS)
    before = tl.zeros([BLOCK, RANKS], tl.int32)
    for first in range(0, tokens, BLOCK):
        t = first + at
        kept = (t < tokens)[:, None] & (lower < n)[None, :]
        before += tl.load(goes_ptr + t[:, None] * ranks + lower[None, :], mask=kept, other=0).to(tl.int32)
    slot = tl.sum(tl.sum(before, axis=1), axis=0)
    for first in range(0, tokens, BLOCK):
        t = first + at
        goes = tl.load(goes_ptr + t * ranks + n, mask=t < tokens, other=0).to(tl.int32)
        place = slot + tl.cumsum(goes, axis=0) - goes
        tl.store(slot_ptr + t * ranks + n, tl.where(goes > 0, place, -1).to(tl.int64), mask=t < tokens)
        tl.store(token_ptr + place, t.to(tl.int64), mask=goes > 0)
        slot += tl.sum(goes, axis=0)


@remembered
@triton.jit
def _home_slots(
    expert_ptr, side_ptr, slot_ptr, dweight_ptr, tokens, per_rank, ranks, max_tokens, side_stride,
    DWEIGHT: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Where each rank wrote the sums of some tokens, and the gradients of their weights."""
    t, n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANKS)
    kept = t < tokens
    count = tl.zeros([TOKENS, RANKS], tl.int32)
    for k in tl.static_range(TOP_K):
        rank = tl.load(expert_ptr + t * TOP_K + k, mask=kept, other=0) // per_rank
        count += (rank[:, None] == n[None, :]).to(tl.int32)
        if DWEIGHT:
            slot = rank.to(tl.int64) * max_tokens + t
            dweight = tl.load(side_ptr + slot * side_stride + k, mask=kept, other=0.0)
            tl.store(dweight_ptr + t * TOP_K + k, dweight, mask=kept)
    slot = tl.where(count > 0, n[None, :] * max_tokens + t[:, None], -1)
    at = slot_ptr + t[:, None] * ranks + n[None, :]
    tl.store(at, slot.to(tl.int64), mask=kept[:, None] & (n < ranks)[None, :])


def place_copies(expert_AK, *, first, experts, rows):
    """See `benthic.kernels.ops.place_copies`."""
    ends_E, row_AK, copy_R = sort_copies(expert_AK, first=first, experts=experts)
    return ends_E, row_AK, copy_R[:rows]


def choose_ranks(expert_TK, *, per_rank, ranks):
    """See `benthic.kernels.ops.choose_ranks`."""
    expert_TK, (tokens, top_k) = expert_TK.contiguous(), expert_TK.shape
    goes_Tn = torch.empty(tokens, ranks, dtype=torch.bool, device=expert_TK.device)
    counts_n2 = torch.empty(ranks, 2, dtype=torch.int64, device=expert_TK.device)
    _choose_ranks[(ranks,)](
        expert_TK, goes_Tn, counts_n2, tokens, per_rank, ranks, TOP_K=top_k, BLOCK=1024, num_warps=4
    )
    return goes_Tn, counts_n2


def place_departures(goes_Tn, *, rows):
    """See `benthic.kernels.ops.place_departures`."""
    goes_Tn, (tokens, ranks) = goes_Tn.contiguous(), goes_Tn.shape
    padded = next_power_of_2(ranks)
    token_S = torch.empty(rows, dtype=torch.int64, device=goes_Tn.device)
    slot_Tn = torch.empty(tokens, ranks, dtype=torch.int64, device=goes_Tn.device)
    _place_departures[(ranks,)](
        goes_Tn.view(torch.uint8), token_S, slot_Tn, tokens, ranks,
        BLOCK=max(16, min(1024, 8192 // padded)), RANKS=padded, num_warps=4,
    )  # fmt: skip
    return token_S, slot_Tn


def home_slots(expert_TK, dweight_SK, *, per_rank, ranks, max_tokens):
    """See `benthic.kernels.ops.home_slots`."""
    expert_TK, (tokens, top_k) = expert_TK.contiguous(), expert_TK.shape
    given, device = dweight_SK is not None, expert_TK.device
    slot_Tn = torch.empty(tokens, ranks, dtype=torch.int64, device=device)
    dweight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device) if given else None
    if tokens:
        _home_slots[(cdiv(tokens, 32),)](
            expert_TK, dweight_SK if given else slot_Tn, slot_Tn, dweight_TK if given else slot_Tn,
            tokens, per_rank, ranks, max_tokens, dweight_SK.stride(0) if given else 0,
            DWEIGHT=given, TOP_K=top_k, TOKENS=32, RANKS=next_power_of_2(ranks), num_warps=4,
        )  # fmt: skip
    return slot_Tn, dweight_TK
