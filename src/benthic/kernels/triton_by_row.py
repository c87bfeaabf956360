# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Products whose rows do not feel each other: what a row gives depends on that row and the weights alone.

One order of summation whatever the number of rows: the inner dim is walked from its beginning to its end by
one program, in steps of the matrix instruction, into one float32 sum; nothing is split over programs and
added up afterwards. Weights are the tall operand and rows the narrow one, for few rows and for many: so the
instruction is the same but for how many rows it takes along, which decides speed and no bit (tested on a GPU
over all tilings). Libraries choose among kernels with other orders by the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.triton_tiles import find_tile, precision

FEW_ROWS = 32
"""Rows a group, on average, up to which one program takes all rows of a group and reads its weights once."""
TILINGS = (
    (16, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (64, 64, 128, 4, 3),
    (128, 128, 64, 8, 3),
    (256, 128, 64, 8, 3),
)
"""`(block_r, block_n, block_k, warps, stages)` that give the same bits; any one of them would do for all."""
_ENOUGH = 80  # programs from which a larger tile is worth more than busier multiprocessors


@triton.jit
def _tile(
    x_ptr, weight_ptr, out_ptr, first, end, column, n_dim, k_dim,
    stride_x, stride_n, stride_k, stride_out, real,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one group from `first` on, before `end`; zeros where no weight is for them (not `real`)."""
    row, k = (first + tl.arange(0, BLOCK_R)).to(tl.int64), tl.arange(0, BLOCK_K)
    row_kept, column_kept = row < end, column < n_dim
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    weight_at = weight_ptr + column[:, None].to(tl.int64) * stride_n + k[None, :] * stride_k
    x_at = x_ptr + row[None, :] * stride_x + k[:, None]
    if real:
        for k_start in range(0, k_dim, BLOCK_K):
            if WHOLE:
                weight = tl.load(weight_at, mask=column_kept[:, None], other=0.0)
                x = tl.load(x_at, mask=row_kept[None, :], other=0.0)
            else:
                k_kept = k < k_dim - k_start
                weight = tl.load(weight_at, mask=column_kept[:, None] & k_kept[None, :], other=0.0)
                x = tl.load(x_at, mask=k_kept[:, None] & row_kept[None, :], other=0.0)
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
            weight_at += BLOCK_K * stride_k
            x_at += BLOCK_K
    out_at = out_ptr + row[None, :] * stride_out + column[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=column_kept[:, None] & row_kept[None, :])


@triton.jit(do_not_specialize=["rows"])
def _product(
    x_ptr, weight_ptr, out_ptr, ends_ptr,
    rows, groups, n_dim, k_dim, stride_x, stride_xg, stride_wg, stride_n, stride_k, stride_out, stride_og,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SORTED: tl.constexpr, SEARCH: tl.constexpr, GROUPS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k weight[group, n, k] * x[r, k], k in order.

    `SORTED`: rows lie one group after another and `ends` says where each ends; rows past the last give zeros.
    A program then has a tile of rows, whose group it has to `SEARCH`, or all rows of a group, which are few.
    Otherwise every group has all rows (the third axis of the grid), and operands have a stride for it.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SORTED and not SEARCH:
        group = tl.program_id(1)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(ends_ptr + group, mask=group < groups, other=rows)
        weight_at = weight_ptr + group.to(tl.int64) * stride_wg
        for first in range(start, end, BLOCK_R):
            _tile(
                x_ptr, weight_at, out_ptr, first, end, column, n_dim, k_dim,
                stride_x, stride_n, stride_k, stride_out, group < groups,
                BLOCK_R, BLOCK_N, BLOCK_K, WHOLE, PRECISION,
            )  # fmt: skip
    else:
        group, start, end = tl.program_id(2), tl.program_id(1) * BLOCK_R, rows
        if SEARCH:
            group, start, end = find_tile(ends_ptr, tl.program_id(1), rows, groups, BLOCK_R, GROUPS)
        own = group.to(tl.int64)
        _tile(
            x_ptr + own * stride_xg, weight_ptr + own * stride_wg, out_ptr + own * stride_og,
            start, end, column, n_dim, k_dim, stride_x, stride_n, stride_k, stride_out, group < groups,
            BLOCK_R, BLOCK_N, BLOCK_K, WHOLE, PRECISION,
        )  # fmt: skip


def linear_by_row(x_TI, weight_OI, *, dtype):
    """See `benthic.kernels.ops.linear_by_row`."""
    out_TO = torch.empty(x_TI.shape[0], weight_OI.shape[0], dtype=dtype, device=x_TI.device)
    return _multiply(x_TI.unsqueeze(1), weight_OI.unsqueeze(0), out_TO.unsqueeze(1)).squeeze(1)


def heads_linear_by_row(x_THI, weight_HOI):
    """See `benthic.kernels.ops.heads_linear_by_row`."""
    tokens, heads, _ = x_THI.shape
    out_THO = torch.empty(tokens, heads, weight_HOI.shape[1], dtype=x_THI.dtype, device=x_THI.device)
    return _multiply(x_THI, weight_HOI, out_THO)


def grouped_linear_by_row(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear_by_row`."""
    out_RO = torch.empty(x_RI.shape[0], weight_EOI.shape[1], dtype=x_RI.dtype, device=x_RI.device)
    return _multiply(x_RI.unsqueeze(1), weight_EOI, out_RO.unsqueeze(1), ends_E).squeeze(1)


def _multiply(x_TGI, weight_GOI, out_TGO, ends_G=None):
    """Fill `out[t, g] = weight_g x[t, g]`; with `ends_G`, G of x and out is 1 and rows lie group by group."""
    if x_TGI.stride(2) != 1:
        x_TGI = x_TGI.contiguous()
    rows, (groups, n_dim, k_dim) = x_TGI.shape[0], weight_GOI.shape
    sorted_rows = ends_G is not None
    each = rows // groups if sorted_rows else rows
    block_r, block_n, block_k, warps, stages = tiles(x_TGI.dtype, each, n_dim, groups)
    search = sorted_rows and rows > FEW_ROWS * groups
    row_tiles = cdiv(rows, block_r)
    if sorted_rows:
        row_tiles = (rows // block_r if search else 0) + groups + 1
    if rows:
        _product[(cdiv(n_dim, block_n), row_tiles, 1 if sorted_rows else groups)](
            x_TGI, weight_GOI, out_TGO, ends_G if sorted_rows else x_TGI,
            rows, groups, n_dim, k_dim, x_TGI.stride(0), 0 if sorted_rows else x_TGI.stride(1),
            *weight_GOI.stride(), out_TGO.stride(0), 0 if sorted_rows else out_TGO.stride(1),
            BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=block_k,
            SORTED=sorted_rows, SEARCH=search, GROUPS=next_power_of_2(groups + 2) if search else 1,
            WHOLE=k_dim % block_k == 0, PRECISION=precision(x_TGI.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_TGO


def tiles(dtype, rows, columns, groups):
    """The tiling for about `rows` rows in each of `groups` groups: the largest that keeps a GPU busy.

    It holds all rows, or 64 of them, since weights are read again for every tile of rows.
    """
    if dtype == torch.float32:
        return 16, 64, 32, 4, 2
    tall = [tiling for tiling in TILINGS if tiling[0] >= min(rows, 64)]
    busy = [
        tiling
        for tiling in tall
        if 2 * rows > tiling[0] and cdiv(rows, tiling[0]) * cdiv(columns, tiling[1]) * groups >= _ENOUGH
    ]
    return busy[-1] if busy else tall[0] if tall else TILINGS[-1]
