# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""The gate's product for some hundreds of rows, by so few programs that a larger product runs beside them.

A library's product of as many rows and 64 experts has some thirty programs. Beside shared experts, whose
product fills all but four of a Hopper's multiprocessors, they begin when that ends, and the choice of experts
waits; four programs begin at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered
from benthic.kernels.triton_tiles import precision

PROGRAMS = 4
"""Up to 512 rows: what a product in one wave of 128 programs leaves of 132 multiprocessors."""
_WIDTH, _SHARED = 128, 160 * 1024
"""Columns of a step, and bytes of shared memory for steps ahead."""


@remembered
@triton.jit
def _gate_tiles(
    x_ptr, weight_ptr, out_ptr, rows, experts, width, stride_x, stride_w,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, e] = sum_d x[t, d] * weight[e, d] in float32, for ROWS rows and all experts."""
    wait_for_inputs(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, d = tl.arange(0, EXPERTS), tl.arange(0, WIDTH)
    row_kept, expert_kept = (row < rows)[:, None], (expert < experts)[None, :]
    x_at = x_ptr + row.to(tl.int64)[:, None] * stride_x + d[None, :]
    weight_at = weight_ptr + expert[None, :] * stride_w + d[:, None]
    acc = tl.zeros([ROWS, EXPERTS], tl.float32)
    for first in range(0, width, WIDTH):
        if WHOLE:
            x = tl.load(x_at, mask=row_kept, other=0.0)
            weight = tl.load(weight_at, mask=expert_kept, other=0.0)
        else:
            kept = d < width - first
            x = tl.load(x_at, mask=row_kept & kept[None, :], other=0.0)
            weight = tl.load(weight_at, mask=expert_kept & kept[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_at += WIDTH
        weight_at += WIDTH
    out_at = out_ptr + row.to(tl.int64)[:, None] * experts + expert[None, :]
    tl.store(out_at, acc, mask=row_kept & expert_kept)


def tiles(dtype, rows, experts):
    """Rows and padded experts of a program, its warps, and how many steps are on their way."""
    block, padded = 64 if rows <= 64 * PROGRAMS else 128, max(16, next_power_of_2(experts))
    ahead = _SHARED // ((block + padded) * _WIDTH * dtype.itemsize)
    return block, padded, 4 if block == 64 else 8, min(5, max(1, ahead))


def gate_logits(x_TD, weight_ED):
    """See `benthic.kernels.ops.gate_logits`; computes no gradients."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    weight_ED = weight_ED if weight_ED.stride(1) == 1 else weight_ED.contiguous()
    (rows, width), experts = x_TD.shape, weight_ED.shape[0]
    out_TE = torch.empty(rows, experts, dtype=torch.float32, device=x_TD.device)
    block, padded, warps, stages = tiles(x_TD.dtype, rows, experts)
    if rows:
        _gate_tiles[(cdiv(rows, block),)](
            x_TD, weight_ED, out_TE, rows, experts, width, x_TD.stride(0), weight_ED.stride(0),
            ROWS=block, EXPERTS=padded, WIDTH=_WIDTH, WHOLE=width % _WIDTH == 0,
            PRECISION=precision(x_TD.dtype), num_warps=warps, num_stages=stages, **early(x_TD.device, rows),
        )  # fmt: skip
    return out_TE
