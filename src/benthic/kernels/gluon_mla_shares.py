# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What MLA decode in Gluon shares: equal shares of all pages, and how their parts become outputs.

All pages of all sequences, one after another, are cut into equal shares. A share may meet the end of one
sequence and the beginning of others, and leaves a part of each, at `share + sequence` among all: the greatest
score m of each row, total = sum 2^(score - m) and sum 2^(score - m) value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benthic.kernels.gluon_tiles import DTYPES

PAGE = gl.constexpr(64)
LATENT = gl.constexpr(512)
LEAST_PAGES = 2
"""Of a share: parts of single pages would cost more to combine than they save."""


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def share_of(context_ptr, sequences, number, shares, LEAST: gl.constexpr, MANY: gl.constexpr):
    """The pages of a share: the sequence and page where they begin, and their number."""
    layout: gl.constexpr = gl.BlockedLayout([MANY // 128], [32], [4], [0])
    index = gl.arange(0, MANY, layout=layout)
    context = gl.load(context_ptr + index, mask=index < sequences, other=0)
    pages = (context + PAGE - 1) // PAGE
    end = gl.associative_scan(pages, 0, _add)
    total = gl.sum(pages, axis=0)
    share = gl.maximum((total + shares - 1) // shares, LEAST)
    first = number * share
    sequence = gl.sum((end <= first).to(gl.int32), axis=0)
    page = first - gl.max(gl.where(end <= first, end, 0), axis=0)
    return sequence, page, gl.minimum(share, total - first)


@gluon.jit
def pages_of(context_ptr, sequence, page, left):
    """Context of a sequence, and how many of its pages from `page` on belong to a share of `left`."""
    context = gl.load(context_ptr + sequence)
    return context, gl.minimum((context + PAGE - 1) // PAGE - page, left)


@triton.jit(do_not_specialize=["sequences", "shares"])
def combine(
    part_ptr, most_ptr, total_ptr, out_ptr, context_ptr, sequences, rows, shares,
    ROWS: tl.constexpr, LEAST: tl.constexpr, MANY: tl.constexpr, MOST: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one row: bring the parts of its sequence to one greatest score, add up and divide."""
    sequence, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    index, dim = tl.arange(0, MANY), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pages = (tl.load(context_ptr + index, mask=index < sequences, other=0) + 63) // 64
    share = tl.maximum(tl.cdiv(tl.sum(pages, axis=0), shares), LEAST)
    first = tl.sum(tl.where(index < sequence, pages, 0), axis=0)
    own = tl.sum(tl.where(index == sequence, pages, 0), axis=0)
    parts = tl.where(own > 0, (first + own - 1) // share - first // share + 1, 0)
    base = ((sequence + first // share) * ROWS + row).to(tl.int64)
    every = tl.arange(0, MOST)
    m = tl.load(most_ptr + base + every * ROWS, mask=every < parts, other=float("-inf"))
    most = tl.max(m, axis=0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.load(total_ptr + base + every * ROWS, mask=every < parts, other=0.0)
    total = tl.sum(tl.exp2(m - most) * total, axis=0)
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        some = start + tl.arange(0, PARTS)
        weight = tl.load(most_ptr + base + some * ROWS, mask=some < parts, other=float("-inf"))
        at = (base + some * ROWS)[:, None] * 512 + dim[None, :]
        value = tl.load(part_ptr + at, mask=(some < parts)[:, None], other=0.0)
        acc += tl.sum(tl.exp2(weight - most)[:, None] * value, axis=0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * 512 + dim, out.to(out_ptr.dtype.element_ty))


def parts_of(sequences, shares, padded, device):
    """Memory for parts of `padded` rows: sums of values, greatest scores, totals; and the width of a scan."""
    parts, many = (shares + sequences) * padded, max(128, triton.next_power_of_2(sequences))
    most, total = torch.empty(2, parts, dtype=torch.float32, device=device)
    return torch.empty(parts, LATENT.value, dtype=torch.float32, device=device), most, total, many


def add_up(parts, context_S, out_SQHC, shares):
    """Outputs from parts."""
    part, most, total = parts
    sequences, queries, heads, latent = out_SQHC.shape
    tile, columns = (32, 128) if sequences <= 16 else (8, 512)
    combine[(sequences * queries * heads, latent // columns)](
        part, most, total, out_SQHC, context_S, sequences, queries * heads, shares,
        ROWS=part.shape[0] // (shares + sequences), LEAST=LEAST_PAGES,
        MANY=max(128, triton.next_power_of_2(sequences)), MOST=triton.next_power_of_2(shares), PARTS=tile,
        COLUMNS=columns,
    )  # fmt: skip


def pieces_of(cache_PBW, width):
    """A descriptor of blocks of a page's tokens by `width` dims."""
    layout = gl.NVMMASharedLayout.get_default_for([64, width], DTYPES[cache_PBW.dtype])
    rows_TW = cache_PBW.flatten(0, 1)
    return TensorDescriptor(rows_TW, list(rows_TW.shape), list(rows_TW.stride()), [64, width], layout)
