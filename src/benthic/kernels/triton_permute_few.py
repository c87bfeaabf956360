# mypy: disable-error-code="assignment"
"""Copies of few rows are sorted by expert and gathered in one Triton kernel, for steps that decode."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.reference.moe import Permuted, RowMaps
from benthic.kernels.triton_tiles import unit_stride

APART = 128
"""Copies up to which each has a program, on a multiprocessor of its own: so it has the shortest way."""


@triton.jit(do_not_specialize=["tokens"])
def _permute_few(
    x_ptr, expert_ptr, slot_ptr, out_ptr, row_ptr, copy_ptr, ends_ptr, tokens, experts, width, stride,
    PART: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A copy goes after those of lower experts and the earlier ones of its own.

    A program takes PART copies of a token; those after the tokens' find the ends of PART experts each. Every
    program reads all experts, and counts for each of its own how many keys (expert, then copy) lie below.
    With SLOTS, tokens without one have the experts of the first token.
    """
    wait_for_inputs(PDL)
    parts: tl.constexpr = TOP_K // PART
    own, token, column = tl.program_id(0) // parts, tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    here, kept, own_absent, absent = own < tokens, token < tokens, False, False
    place = tl.program_id(0) * PART
    if SLOTS:
        own_absent = tl.load(slot_ptr + own, mask=here, other=0) < 0
        absent = tl.load(slot_ptr + token, mask=kept, other=0) < 0
    x = tl.load(x_ptr + own.to(tl.int64) * stride + column, mask=column < tl.where(here, width, 0))
    first_K, expert_KT, bounds = (), (), ()
    for k in tl.static_range(TOP_K):  # all are asked for before one of them is used
        first_K += (tl.load(expert_ptr + k, mask=tokens > 0, other=0),)
        expert_KT += (tl.load(expert_ptr + token * TOP_K + k, mask=kept, other=0),)
    for i in tl.static_range(PART):
        expert = tl.load(expert_ptr + place + i, mask=here, other=0)
        if SLOTS:
            first = tl.load(expert_ptr + place - own * TOP_K + i, mask=here, other=0)
            expert = tl.where(own_absent, first, expert)
        above = (place - tokens * TOP_K + i + 1) * (TOP_K * TOKENS)
        bounds += (tl.where(here, expert * (TOP_K * TOKENS) + place + i, above),)
    keys = _keys(expert_KT, first_K, absent, kept, token, TOP_K, TOKENS, SLOTS)
    for k in tl.static_range(0, PART, 2):
        both = _two_counts(keys, bounds[k], bounds[min(k + 1, PART - 1)], k + 1 < PART, TOP_K)
        for i in tl.static_range(k, min(k + 2, PART)):
            count = (both >> (16 * (i - k))) & 65535
            if here:
                tl.store(out_ptr + count.to(tl.int64) * width + column, x, mask=column < width)
                tl.store(row_ptr + place + i, count.to(tl.int64))
                tl.store(copy_ptr + count, (place + i).to(tl.int64))
            else:
                end = place - tokens * TOP_K + i
                tl.store(ends_ptr + end, count, mask=end < experts)


@triton.jit
def _keys(
    expert_KT, first_K, absent, kept, token, TOP_K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr
):
    """Numbers that order copies by expert, and those of one expert as they come."""
    keys = ()
    for k in tl.static_range(TOP_K):
        expert = expert_KT[k]
        if SLOTS:
            expert = tl.where(absent, first_K[k], expert)
        keys += (tl.where(kept, (expert * TOKENS + token) * TOP_K + k, 2147483647),)
    return keys


@triton.jit
def _two_counts(keys, bound_0, bound_1, TWO: tl.constexpr, TOP_K: tl.constexpr):
    """How many keys lie below each of two bounds, the second count in the word's upper half."""
    counts = tl.zeros_like(keys[0])
    for i in tl.static_range(TOP_K):
        counts += tl.where(keys[i] < bound_0, 1, 0)
        if TWO:
            counts += tl.where(keys[i] < bound_1, 65536, 0)
    return tl.sum(counts, axis=0)


def permute_few(x_TD, expert_TK, num_experts, slot_T=None):
    """See `benthic.kernels.ops.permute`: sorting and gathering in one kernel. Computes no gradients."""
    x_TD, expert_TK = unit_stride(x_TD), expert_TK.to(torch.int32).contiguous()
    (tokens, top_k), width, device = expert_TK.shape, x_TD.shape[1], x_TD.device
    copies = tokens * top_k
    rows_RD = torch.empty(copies, width, dtype=x_TD.dtype, device=device)
    row_TK = torch.empty(expert_TK.shape, dtype=torch.int64, device=device)
    copy_R = torch.empty(copies, dtype=torch.int64, device=device)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    padded, part = next_power_of_2(width), 1 if copies <= APART else top_k
    _permute_few[(copies // part + cdiv(num_experts, part),)](
        x_TD, expert_TK, expert_TK if slot_T is None else slot_T.contiguous(),
        rows_RD, row_TK, copy_R, ends_E, tokens, num_experts, width, x_TD.stride(0),
        PART=part, TOP_K=top_k, TOKENS=_tokens_counted(tokens), WIDTH=padded, SLOTS=slot_T is not None,
        num_warps=min(16, max(4, padded // 256)), **early(device, copies),
    )  # fmt: skip
    return Permuted(rows_RD, ends_E, RowMaps(row_TK, copy_R))


def _tokens_counted(tokens):
    """Tokens for which `_permute_few` is compiled: few numbers of them, each four times the one before."""
    counted = 4
    while counted < tokens:
        counted *= 4
    return counted
