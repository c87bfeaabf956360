"""The kernel of few copies as it was: one program a copy, one an expert's end."""

import torch
import triton
import triton.language as tl

from benthic.kernels.host import next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.reference.moe import Permuted, RowMaps


def _unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(padded):
    return min(16, max(1, padded // 512))


@triton.jit
def _chosen(slot_ptr, at, copies, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """Where the expert of a copy stands: with SLOTS, that of the first token for a token without one."""
    if SLOTS:
        slot = tl.load(slot_ptr + at // TOP_K, mask=at < copies, other=0)
        at = tl.where(slot < 0, at % TOP_K, at)
    return at


@triton.jit(do_not_specialize=["copies"])
def _permute_few(
    x_ptr, expert_ptr, slot_ptr, out_ptr, row_ptr, copy_ptr, ends_ptr, copies, width, stride,
    TOP_K: tl.constexpr, COPIES: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A copy goes after those of lower experts and the earlier ones of its own.

    Programs after those of all copies find one expert's end each. All experts are read by each program.
    """
    wait_for_inputs(PDL)
    own, at = tl.program_id(0), tl.arange(0, COPIES)
    expert = tl.load(
        expert_ptr + _chosen(slot_ptr, at, copies, TOP_K, SLOTS), mask=at < copies, other=2147483647
    )
    if own < copies:
        column = tl.arange(0, WIDTH)
        x = tl.load(x_ptr + (own // TOP_K).to(tl.int64) * stride + column, mask=column < width)
        mine = tl.load(expert_ptr + _chosen(slot_ptr, own, copies, TOP_K, SLOTS))
        before = (expert < mine) | ((expert == mine) & (at < own))
        row = tl.sum(before.to(tl.int32), axis=0).to(tl.int64)
        tl.store(out_ptr + row * width + column, x, mask=column < width)
        tl.store(row_ptr + own, row)
        tl.store(copy_ptr + row, own.to(tl.int64))
    else:
        tl.store(ends_ptr + own - copies, tl.sum((expert <= own - copies).to(tl.int32), axis=0))


def permute_few(x_TD, expert_TK, num_experts, slot_T=None):
    """See `benthic.kernels.ops.permute`: sorting and gathering in one kernel. Computes no gradients."""
    x_TD, expert_TK = _unit_stride(x_TD), expert_TK.to(torch.int32).contiguous()
    (_, top_k), copies, (_, width), device = expert_TK.shape, expert_TK.numel(), x_TD.shape, x_TD.device
    rows_RD = torch.empty(copies, width, dtype=x_TD.dtype, device=device)
    row_TK = torch.empty(expert_TK.shape, dtype=torch.int64, device=device)
    copy_R = torch.empty(copies, dtype=torch.int64, device=device)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    padded = next_power_of_2(width)
    _permute_few[(copies + num_experts,)](
        x_TD, expert_TK, expert_TK if slot_T is None else slot_T.contiguous(),
        rows_RD, row_TK, copy_R, ends_E, copies, width, x_TD.stride(0),
        TOP_K=top_k, COPIES=max(128, next_power_of_2(copies)), WIDTH=padded, SLOTS=slot_T is not None,
        num_warps=_warps(padded), **early(device, copies),
    )  # fmt: skip
    return Permuted(rows_RD, ends_E, RowMaps(row_TK, copy_R))
