# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, var-annotated"
"""Products of few rows with a weight, or with one an expert, in bfloat16 or FP8: as fast as weights are read.

Weights are the tall operand of the matrix instruction (64 of their rows at a time) and the few rows the
narrow one, the other way round than usual: so tensor cores are not padded, and what a row gives depends
neither on how many rows there are nor on which block of rows it falls into. Every program owns 64 columns
of one expert's output; experts without rows read nothing, and where rows are fewer than experts they have
no programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.table import triton_interprets
from benthic.kernels.triton_tiles import precision, product_of_chunk

COLUMNS = 64
"""Columns of a program: the fewest that a warp group's instruction takes."""


@triton.jit
def _owner(ends_ptr, place, rows, experts, EXPERTS: tl.constexpr):
    """An expert, its first row and its end; number `experts` is the zero tail, for the last place.

    With `EXPERTS`, places are only as many as can have rows: expert number `place` of those that do.
    """
    if EXPERTS == 0:
        expert = place
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert, mask=expert < experts, other=rows)
    else:
        each = tl.arange(0, EXPERTS)
        ends = tl.load(ends_ptr + each, mask=each < experts, other=0)
        starts = tl.load(ends_ptr + each - 1, mask=(each > 0) & (each < experts), other=0)
        owns = ends > starts
        here = owns & (tl.cumsum(owns.to(tl.int32), axis=0) == place + 1)
        tail = place == tl.num_programs(1) - 1
        expert = tl.where(tail, experts, tl.sum(tl.where(here, each, 0), axis=0))
        start = tl.where(tail, tl.max(ends, axis=0), tl.sum(tl.where(here, starts, 0), axis=0))
        end = tl.where(tail, rows, tl.sum(tl.where(here, ends, 0), axis=0))
    return expert, start, end


@triton.jit
def _gated(sums):
    """`silu(gate) * up` of gates and the ups below them, computed and rounded as `ops.swiglu` does."""
    pairs = sums.reshape(2, sums.shape[0] // 2, sums.shape[1]).permute(1, 2, 0)
    gate, up = tl.split(pairs.to(tl.float32))
    return (gate * tl.sigmoid(gate) * up).to(sums.dtype)


@triton.jit
def _few_rows(
    x_ptr, weight_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, stride_x, stride_e, stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k weight[expert of r, n, k] * x[r, k]; expert number `experts` is the zero tail.

    GATED: weights are [E, 2 * n_dim, K], gates first, and out is `silu(gate) * up` of what sums round to.
    Half of a tile's columns are then gates and half the ups that belong to them.
    """
    wait_for_inputs(PDL)
    expert, start, end = _owner(ends_ptr, tl.program_id(1), rows, experts, EXPERTS)
    OWN: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    first_column, index = tl.program_id(0) * OWN, tl.arange(0, BLOCK_N)
    column = first_column + (index % OWN if GATED else index)
    column_kept = column < n_dim
    source = column + index // OWN * n_dim if GATED else column
    k = tl.arange(0, BLOCK_K)
    weight_base = weight_ptr + expert.to(tl.int64) * stride_e + source[:, None].to(tl.int64) * stride_n
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        row_kept = row < end
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        if expert < experts:
            weight_at = weight_base + k[None, :]
            x_at = x_ptr + row.to(tl.int64)[None, :] * stride_x + k[:, None]
            for k_start in range(0, k_dim, BLOCK_K):
                if WHOLE:
                    weight = tl.load(weight_at, mask=column_kept[:, None], other=0.0)
                    x = tl.load(x_at, mask=row_kept[None, :], other=0.0)
                else:
                    k_kept = k < k_dim - k_start
                    weight = tl.load(weight_at, mask=column_kept[:, None] & k_kept[None, :], other=0.0)
                    x = tl.load(x_at, mask=k_kept[:, None] & row_kept[None, :], other=0.0)
                acc = tl.dot(weight, x, acc, input_precision=PRECISION)
                weight_at += BLOCK_K
                x_at += BLOCK_K
        out, written = acc.to(out_ptr.dtype.element_ty), first_column + tl.arange(0, OWN)
        if GATED:
            out = _gated(out)
        out_at = out_ptr + row.to(tl.int64)[None, :] * n_dim + written[:, None]
        tl.store(out_at, out, mask=(written < n_dim)[:, None] & row_kept[None, :])


@triton.jit
def _few_rows_of_blocks(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, out_ptr, ends_ptr,
    rows, experts, n_dim, k_dim, k_tiles, n_tiles, stride_scale, stride_tile, stride_weight_scale,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WHOLE: tl.constexpr, EMULATE: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_few_rows` for FP8 tiles: every chunk of K is multiplied by itself, scaled and added in float32."""
    wait_for_inputs(PDL)
    expert, start, end = tl.program_id(1), 0, rows
    if GROUPED:
        expert, start, end = _owner(ends_ptr, expert, rows, experts, EXPERTS)
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    column_kept = column < n_dim
    k = tl.arange(0, BLOCK_K)
    own = expert.to(tl.int64)
    weight_base = weight_ptr + (own * n_dim + column[:, None]) * k_dim
    weight_scale_at = weight_scale_ptr + (own * n_tiles + first_column // BLOCK_K) * stride_weight_scale
    for first in range(start, end, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        row_kept = row < end
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        if expert < experts:
            weight_at = weight_base + k[None, :]
            x_at = x_ptr + row[None, :] * k_dim + k[:, None]
            x_scale_at = x_scale_ptr + row * stride_scale
            own_scale_at = weight_scale_at + tl.zeros([BLOCK_R], tl.int64)
            # with stages named here scales, which no product reads, are loaded ahead like its operands
            for chunk in tl.range(k_tiles, num_stages=STAGES):
                if WHOLE:
                    weight = tl.load(weight_at, mask=column_kept[:, None], other=0.0)
                    x = tl.load(x_at, mask=row_kept[None, :], other=0.0)
                else:
                    k_kept = k < k_dim - chunk * BLOCK_K
                    weight = tl.load(weight_at, mask=column_kept[:, None] & k_kept[None, :], other=0.0)
                    x = tl.load(x_at, mask=k_kept[:, None] & row_kept[None, :], other=0.0)
                scale = tl.load(x_scale_at + chunk * stride_tile, mask=row_kept, other=0.0)
                scale *= tl.load(own_scale_at + chunk, mask=row_kept, other=0.0)
                acc += product_of_chunk(weight, x, EMULATE) * scale[None, :]
                weight_at += BLOCK_K
                x_at += BLOCK_K
        out_at = out_ptr + row[None, :] * n_dim + column[:, None]
        kept = column_kept[:, None] & row_kept[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _gate(
    x_ptr, weight_ptr, out_ptr, rows, experts, k_dim, stride_x, stride_e,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r, e] = sum_k x[r, k] * weight[e, k] in float32; two warps hold all weights of EXPERTS experts.

    These are loaded before anything is waited for: kernels that write weights let none start before they have
    ended.
    """
    expert, k = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS), tl.arange(0, WIDTH)
    kept = (expert < experts)[:, None] & (k < k_dim)[None, :]
    weight_at = weight_ptr + expert[:, None] * stride_e + k[None, :]
    weight = tl.load(weight_at, mask=kept, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    for index in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + index
        x_kept = k < tl.where(row < rows, k_dim, 0)
        x = tl.load(x_ptr + row.to(tl.int64) * stride_x + k, mask=x_kept, other=0.0)
        out = tl.sum(weight * x.to(tl.float32)[None, :], axis=1)
        tl.store(out_ptr + row * experts + expert, out, mask=expert < tl.where(row < rows, experts, 0))


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr, weight_ptr, out_ptr, rows, n_dim, k_dim, stride_x, stride_n,
    OWN: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k x[r, k] * weight[n, k]; a program holds all weights of OWN columns in its registers.

    Every warp owns WIDTH of K in each of CHUNKS, and sums of warps are added at the end, always in one order.
    Weights are loaded before anything is waited for, as the gate's are. The instruction takes 16 columns by 8
    rows: those past OWN and `rows` are zeros.
    """
    index, row = tl.arange(0, 16), tl.arange(0, 8)
    column = tl.program_id(0) * OWN + index
    column_kept, row_kept = (index < OWN) & (column < n_dim), row < rows
    k = tl.arange(0, WARPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    weight_at = weight_ptr + column.to(tl.int64)[None, :, None] * stride_n + k[:, None, :]
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        kept = column_kept[None, :, None]
        if not WHOLE:
            kept = kept & (k < k_dim - chunk * WARPS * WIDTH)[:, None, :]
        weights += (tl.load(weight_at + chunk * WARPS * WIDTH, mask=kept, other=0.0),)
    wait_for_inputs(PDL)
    x_at = x_ptr + row.to(tl.int64)[None, None, :] * stride_x + k[:, :, None]
    xs = ()
    for chunk in tl.static_range(CHUNKS):
        kept = row_kept[None, None, :]
        if not WHOLE:
            kept = kept & (k < k_dim - chunk * WARPS * WIDTH)[:, :, None]
        xs += (tl.load(x_at + chunk * WARPS * WIDTH, mask=kept, other=0.0),)
    acc = tl.zeros([WARPS, 16, 8], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        weight = weights[chunk]
        if PDL:  # or Triton 3.6 takes weights to shared memory, for which they must be there, before it waits
            weight = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [weight], weight.dtype, is_pure=False, pack=2
            )
        acc = tl.dot(weight, xs[chunk], acc, input_precision=PRECISION)
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + row[None, :] * n_dim + column[:, None]
    tl.store(out_at, out, mask=column_kept[:, None] & row_kept[None, :])


def gate_logits(x_TD, weight_ED):
    """See `benthic.kernels.ops.gate_logits`; computes no gradients."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    weight_ED = weight_ED if weight_ED.stride(1) == 1 else weight_ED.contiguous()
    (rows, width), experts = x_TD.shape, weight_ED.shape[0]
    out_TE = torch.empty(rows, experts, dtype=torch.float32, device=x_TD.device)
    block, padded = 1 if rows <= 8 else 4, next_power_of_2(width)
    own = max(1, 4096 // padded)
    if rows:
        _gate[(cdiv(rows, block), cdiv(experts, own))](
            x_TD, weight_ED, out_TE, rows, experts, width, x_TD.stride(0), weight_ED.stride(0),
            ROWS=block, EXPERTS=own, WIDTH=padded, num_warps=2, **early(x_TD.device, rows),
        )  # fmt: skip
    return out_TE


def linear(x_TI, weight_OI):
    """See `benthic.kernels.ops.linear`; computes no gradients."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    weight_OI = weight_OI if weight_OI.stride(1) == 1 else weight_OI.contiguous()
    rows, (n_dim, k_dim) = x_TI.shape[0], weight_OI.shape
    out_TO = torch.empty(rows, n_dim, dtype=x_TI.dtype, device=x_TI.device)
    own, warps, width = held(n_dim)
    if rows:
        _linear[(cdiv(n_dim, own),)](
            x_TI, weight_OI, out_TO, rows, n_dim, k_dim, x_TI.stride(0), weight_OI.stride(0),
            OWN=own, WARPS=warps, WIDTH=width, CHUNKS=cdiv(k_dim, warps * width),
            WHOLE=k_dim % (warps * width) == 0, PRECISION=precision(x_TI.dtype), num_warps=warps,
            **early(x_TI.device, rows),
        )  # fmt: skip
    return out_TO


def held(columns):
    """`(own, warps, width)` of `_linear`: narrow weights are spread over 128 programs and more.

    By arithmetic, other tilings were not timed: a program has 64 KB of a weight 2048 wide, and two run on a
    multiprocessor.
    """
    own = next(own for own in (16, 8, 4) if own == 4 or columns >= 128 * own)
    return own, 8, 128


def grouped_linear(x_RI, weight_EOI, ends_E):
    """See `benthic.kernels.ops.grouped_linear`; computes no gradients."""
    return _grouped(x_RI, weight_EOI, ends_E, weight_EOI.shape[1], gated=False)


def grouped_swiglu(x_RI, weight_EGI, ends_E):
    """See `benthic.kernels.ops.grouped_swiglu`; computes no gradients."""
    return _grouped(x_RI, weight_EGI, ends_E, weight_EGI.shape[1] // 2, gated=True)


def _grouped(x_RI, weight_EOI, ends_E, n_dim, *, gated):
    """Columns of `n_dim`: of all weights of an expert, or of its gates and as many ups.

    A tile of both is as large as one of a plain product, so the same programs have as much on its way.
    """
    x_RI = x_RI if x_RI.stride(1) == 1 else x_RI.contiguous()
    weight_EOI = weight_EOI if weight_EOI.stride(2) == 1 else weight_EOI.contiguous()
    rows, k_dim = x_RI.shape
    experts = weight_EOI.shape[0]
    out_RN = torch.empty(rows, n_dim, dtype=x_RI.dtype, device=x_RI.device)
    block_r, block_k, stages = tiles(x_RI.dtype, rows // experts)
    if rows:
        _few_rows[(cdiv(n_dim, COLUMNS // 2 if gated else COLUMNS), min(rows, experts) + 1)](
            x_RI, weight_EOI, out_RN, ends_E,
            rows, experts, n_dim, k_dim, x_RI.stride(0), weight_EOI.stride(0), weight_EOI.stride(1),
            BLOCK_R=block_r, BLOCK_N=COLUMNS, BLOCK_K=block_k,
            EXPERTS=_searched(rows, experts), WHOLE=k_dim % block_k == 0, PRECISION=precision(x_RI.dtype),
            GATED=gated, num_warps=4, num_stages=stages, **early(x_RI.device, rows),
        )  # fmt: skip
    return out_RN


def fp8_linear(x, weight, ends_E, *, dtype):
    """See `benthic.kernels.ops.fp8_linear`."""
    values, scale = weight.values.contiguous(), weight.scale
    rows, k_dim = x.values.shape
    n_dim, grouped = values.shape[-2], ends_E is not None
    if grouped or scale.stride(-1) != 1:
        scale = scale.contiguous()
    experts = ends_E.shape[0] if grouped else 1
    out_RN = torch.empty(rows, n_dim, dtype=dtype, device=values.device)
    # one weight gives few programs, which have to load far ahead
    block_r, block_k, stages = tiles(x.values.dtype, rows // experts) if grouped else (16, 128, 8)
    if rows:
        _few_rows_of_blocks[(cdiv(n_dim, COLUMNS), min(rows, experts) + 1 if grouped else 1)](
            x.values, x.scale, values, scale, out_RN, ends_E if grouped else values,
            rows, experts, n_dim, k_dim,
            scale.shape[-1], scale.shape[-2], *x.scale.stride(), scale.stride(-2),
            BLOCK_R=block_r, BLOCK_N=COLUMNS, BLOCK_K=block_k, GROUPED=grouped,
            EXPERTS=_searched(rows, experts) if grouped else 0, WHOLE=k_dim % block_k == 0,
            EMULATE=triton_interprets(), STAGES=None if grouped else stages, num_warps=4, num_stages=stages,
            **early(values.device, rows),
        )  # fmt: skip
    return out_RN


def _searched(rows, experts):
    """`EXPERTS` of `_owner`: experts are searched for those that have rows where some cannot have any."""
    return next_power_of_2(experts) if rows < experts else 0


def tiles(dtype, rows):
    """`(block_r, block_k, stages)` for about `rows` rows an expert.

    Measured on an H100 with 64 experts of 2816 x 2048 and 2048 x 1408: 128 of K at a time and four stages
    reach 3.0 TB/s. An expert with more rows than a block reads its weights again, from the cache.
    """
    if dtype == torch.float32:
        return 16, 32, 2
    if rows <= 8:
        return 16, 128, 4
    if rows <= 16:
        return 32, 128, 4
    return 64, 128, 3
