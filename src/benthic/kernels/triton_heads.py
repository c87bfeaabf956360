"""A Triton kernel that writes the two parts of every head side by side, at the speed of a copy.

Torch's own concatenation of strided operands moves one element a thread and reaches a sixth of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.relaunch import remembered

_TILE = 8192  # elements of a program


@remembered
@triton.jit(do_not_specialize=["rows"])
def _join(
    first_ptr, second_ptr, out_ptr,
    rows, first_stride_t, first_stride_h, second_stride_t, second_stride_h,
    HEADS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    ROWS: tl.constexpr, FIRST_PAD: tl.constexpr, SECOND_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    column_1, column_2 = tl.arange(0, FIRST_PAD), tl.arange(0, SECOND_PAD)
    mask_1 = (row < rows)[:, None] & (column_1 < FIRST)[None, :]
    mask_2 = (row < rows)[:, None] & (column_2 < SECOND)[None, :]
    place_1 = (token * first_stride_t + head * first_stride_h)[:, None] + column_1[None, :]
    place_2 = (token * second_stride_t + head * second_stride_h)[:, None] + column_2[None, :]
    first = tl.load(first_ptr + place_1, mask=mask_1)
    second = tl.load(second_ptr + place_2, mask=mask_2)
    place = row.to(tl.int64)[:, None] * (FIRST + SECOND)
    tl.store(out_ptr + place + column_1[None, :], first, mask=mask_1)
    tl.store(out_ptr + place + FIRST + column_2[None, :], second, mask=mask_2)


def join_head_dims(first_THa, second):
    """See `benthic.kernels.ops.join_head_dims`."""
    return _Join.apply(first_THa, second)


def split_head_dims(x_THw, first):
    """See `benthic.kernels.ops.split_head_dims`; the gradients of both parts become one in one kernel."""
    return _Split.apply(x_THw, first)


class _Join(torch.autograd.Function):
    """A concatenation; its gradients are views, or a sum over heads where they share an operand."""

    @staticmethod
    def forward(ctx, first_THa, second):
        """Save where the border is."""
        ctx.first, ctx.shared = first_THa.shape[-1], second.dim() == 2
        return _joined(first_THa, second)

    @staticmethod
    def backward(ctx, dout_THw):
        """Gradients of both operands."""
        dfirst, dsecond = dout_THw[..., : ctx.first], dout_THw[..., ctx.first :]
        return dfirst, (dsecond.sum(1) if ctx.shared else dsecond)


class _Split(torch.autograd.Function):
    """Two views; the gradient is their concatenation."""

    @staticmethod
    def forward(ctx, x_THw, first):  # noqa: ARG004 (nothing is saved)
        """View."""
        return x_THw[..., :first], x_THw[..., first:]

    @staticmethod
    def backward(ctx, dfirst, dsecond):  # noqa: ARG004 (nothing was saved)
        """Gradient of the whole."""
        return _joined(dfirst, dsecond), None


def tiles(first, second):
    """`(rows, padded first, padded second)` of a program, about 8,192 elements."""
    padded = next_power_of_2(first), next_power_of_2(second)
    fit = max(1, _TILE // sum(padded))
    return 1 << (fit.bit_length() - 1), *padded


def _joined(first_THa, second):
    (tokens, heads, a), b = first_THa.shape, second.shape[-1]
    if first_THa.stride(-1) != 1:
        first_THa = first_THa.contiguous()
    if second.stride(-1) != 1:
        second = second.contiguous()
    out = torch.empty(tokens, heads, a + b, dtype=first_THa.dtype, device=first_THa.device)
    block, a_pad, b_pad = tiles(a, b)
    if out.numel():
        _join[(cdiv(tokens * heads, block),)](
            first_THa, second, out, tokens * heads, *first_THa.stride()[:2],
            second.stride(0), second.stride(1) if second.dim() == 3 else 0,
            HEADS=heads, FIRST=a, SECOND=b, ROWS=block, FIRST_PAD=a_pad, SECOND_PAD=b_pad, num_warps=4,
        )  # fmt: skip
    return out
