# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What MLA decode in Gluon shares: how pages are cut into shares, and how parts of a sequence become outputs.

All pages of all sequences, one after another, are cut into shares, one a program (or a row of programs). Each
program finds its share from the contexts, which lie on the device. Balance comes first:

- by default shares are equal, `length = ceil(pages / shares)`, and end anywhere in a sequence;
- where sequences are so alike that `length / SLACK` more pages allow it, a share has whole sequences (the
  same number each), or a sequence has whole shares. 64 contexts of 64 pages over 66 shares are then 64 shares
  of 64, where equal ones of 63 would cut every sequence.

What holds all pages of a sequence writes outputs. Other parts leave normalised outputs in float32 and lse,
the logarithm to base 2 of the sum of powers 2^score, for each row. A share has at most two parts of that
kind: one that goes on with a sequence, at `2 share`, and one that begins a sequence, at `2 share + 1`.
`ends` says in which shares a sequence begins and ends. A second kernel weighs parts, passes over sequences of
one part and writes zeros for empty contexts:

    out = sum_p 2^(lse_p - lse) out_p,  lse = log2 sum_p 2^lse_p
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from benthic.kernels.gluon_tiles import blocks_of, copy, meet
from benthic.kernels.host import cdiv, next_power_of_2

PAGE = gl.constexpr(64)
LATENT = gl.constexpr(512)
SLACK = gl.constexpr(16)
"""A share may be longer by one of so many pages when nothing, or less, is cut then."""
MOST_A_WARP = gl.constexpr(512)
"""Contexts that a warp adds up alone: sixteen a thread."""
LEAST_PAGES = 2
"""Of a share: parts of single pages would cost more to combine than they save."""


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def share_of(context_ptr, sequences, number, shares, LEAST: gl.constexpr, MANY: gl.constexpr):
    """The pages of a share: the sequence and page where they begin, and their number (none: 0 or less).

    Each of four warps adds up all contexts, so that no sum waits for other warps; of more than `MOST_A_WARP`
    it has a quarter.
    """
    WARPS: gl.constexpr = 1 if MANY <= MOST_A_WARP else 4
    layout: gl.constexpr = gl.BlockedLayout([MANY // 32 // WARPS, 1], [32, 1], [WARPS, 4 // WARPS], [1, 0])
    index = gl.arange(0, MANY, layout=gl.SliceLayout(1, layout))[:, None]
    context = gl.load(context_ptr + index, mask=index < sequences, other=0)
    pages = (context + PAGE - 1) // PAGE
    end = gl.associative_scan(pages, 0, _add)
    total, longest = gl.sum(pages, axis=0), gl.max(pages, axis=0)
    length = gl.maximum((total + shares - 1) // shares, LEAST)
    first = number * length
    before = gl.max(gl.where(end <= first[None, :], end, 0), axis=0)
    passed = gl.sum(gl.where(end <= first[None, :], 1, 0), axis=0)
    # Alike: `group` sequences a share, or `parts` shares a sequence; one of the two is 1.
    group = (sequences + shares - 1) // shares
    parts = gl.maximum(gl.minimum(shares // sequences, longest // LEAST), 1)
    alike = group * ((longest + parts - 1) // parts) <= length + length // SLACK
    sequence = number // parts * group
    begun = index >= sequence[None, :]
    own = gl.sum(gl.where(begun & (index < sequence[None, :] + group), pages, 0), axis=0)
    step = gl.maximum((own + parts - 1) // parts, LEAST)
    page = number % parts * step
    left = gl.where(alike, gl.minimum(step, own - page), gl.minimum(length, total - first))
    sequence, page = gl.where(alike, sequence, passed), gl.where(alike, page, first - before)
    return gl.max(sequence, axis=0), gl.max(page, axis=0), gl.max(left, axis=0)


@gluon.jit
def pages_of(context_ptr, sequence, page, left):
    """Context of a sequence, and how many of its pages from `page` on belong to a share of `left`."""
    context = gl.load(context_ptr + sequence)
    return context, gl.minimum((context + PAGE - 1) // PAGE - page, left)


@gluon.jit
def begins_and_ends(context, page, pages):
    """Whether `pages` of a context from `page` on are its first, and its last."""
    return page == 0, (page + pages) * PAGE >= context


@gluon.jit
def copy_rows(
    place, ptr, strides, sequence, first_row, rows, heads, ROWS: gl.constexpr, DIMS: gl.constexpr
):  # fmt: skip
    """Begin to copy some dims of some rows of a sequence to shared memory, zeros behind the last row."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIMS, DIMS // 8], [4, 1], [1, 0])
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, DIMS, layout=gl.SliceLayout(0, layout))
    by_sequence, by_query, by_head = strides
    ptr += sequence.to(gl.int64) * by_sequence
    at = ptr + (row // heads * by_query + row % heads * by_head)[:, None] + dim[None, :]
    copy(place, at, mask=(row < rows)[:, None])


@gluon.jit
def copied():
    """Wait for all copies: the tensor cores may read them."""
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    meet()


@gluon.jit
def conclude(m, total, scale, factors, bars, part):
    """Return lse of a part's rows; `1 / total` goes to those who sum values, once they have read the last.

    A row that has seen no token has total = 0, sums of zeros and lse = -inf.
    """
    concluded, read = bars
    blind = total == 0.0
    total = gl.where(blind, 1.0, total)
    mbarrier.wait(read, (part - 1) & 1, pred=part > 0)
    factors.store(1.0 / total)
    meet()
    mbarrier.arrive(concluded, count=1)
    return gl.where(blind, float("-inf"), m * scale + gl.log2(total))


@gluon.jit
def factor_of(factors, bars, part, ROWS_LAYOUT: gl.constexpr):
    """What sums of values of a part's rows are multiplied with at last."""
    concluded, read = bars
    mbarrier.wait(concluded, part & 1)
    factor = factors.load(ROWS_LAYOUT)
    mbarrier.arrive(read, count=1)
    return factor


@gluon.jit
def note(ends_ptr, sequences, sequence, share, begins, ends):
    """Where a sequence begins and ends."""
    if begins:
        gl.store(ends_ptr + sequence, share)
    if ends:
        gl.store(ends_ptr + sequences + sequence, share)


@triton.jit(do_not_specialize=["sequences"])
def combine(
    part_ptr, lse_ptr, out_ptr, context_ptr, ends_ptr, sequences, rows,
    PADDED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows of a sequence: weigh its parts, if it has several."""
    blocks = tl.cdiv(rows, ROWS)
    sequence = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dim = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out_at = out_ptr + (sequence * rows + row).to(tl.int64)[:, None] * 512 + dim[None, :]
    context = tl.load(context_ptr + sequence)
    first, last = tl.load(ends_ptr + sequence), tl.load(ends_ptr + sequences + sequence)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if context <= 0:
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
    elif first < last:
        m, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        for start in range(first, last + 1, PARTS):
            share = start + tl.arange(0, PARTS)
            place = 2 * share + (share == first).to(tl.int32)
            at = place[:, None] * PADDED + row[None, :]
            kept = (share <= last)[:, None] & (row < rows)[None, :]
            lse = tl.load(lse_ptr + at, mask=kept, other=float("-inf"))
            value_at = part_ptr + at[:, :, None] * 512 + dim[None, None, :]
            value = tl.load(value_at, mask=kept[:, :, None], other=0.0)
            m_new = tl.maximum(m, tl.max(lse, axis=0))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight, alpha = tl.exp2(lse - shift[None, :]), tl.exp2(m - shift)
            total = total * alpha + tl.sum(weight, axis=0)
            acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * value, axis=0)
            m = m_new
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


def parts_of(sequences, shares, padded, device):
    """Memory for parts of `padded` rows: outputs, lse, ends of sequences; and the width of a scan."""
    rows = 2 * shares * padded
    part = torch.empty(rows, LATENT.value, dtype=torch.float32, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    ends = torch.empty(2, sequences, dtype=torch.int32, device=device)
    return part, lse, ends, max(128, next_power_of_2(sequences))


def tiles(shares, sequences):
    """`(parts, rows, columns)` that a program of `combine` reads at once."""
    if shares < 2 * sequences:
        return 2, 4, 512
    return (4, 2, 512) if shares < 4 * sequences else (16, 1, 128)


def add_up(parts, context_S, out_SQHC, shares):
    """Outputs of sequences that lie in several shares, and of empty ones."""
    part, lse, ends = parts
    sequences, queries, heads, latent = out_SQHC.shape
    rows = queries * heads
    few, height, columns = tiles(shares, sequences)
    combine[(sequences * cdiv(rows, height), latent // columns)](
        part, lse, out_SQHC, context_S, ends, sequences, rows,
        PADDED=part.shape[0] // (2 * shares), PARTS=few, ROWS=height, COLUMNS=columns,
    )  # fmt: skip


def rows_of(x_SQHd):
    """`x`, or a copy of which 16 bytes at a time can be copied; strides to a sequence, query and head."""
    steps = [step for step, size in zip(x_SQHd.stride(), x_SQHd.shape[:3], strict=False) if size > 1]
    if x_SQHd.stride(-1) != 1 or x_SQHd.data_ptr() % 16 or any(step % 16 for step in steps):
        x_SQHd = x_SQHd.clone(memory_format=torch.contiguous_format)
    return x_SQHd, [x_SQHd.stride(dim) if x_SQHd.shape[dim] > 1 else 0 for dim in range(3)]


def pieces_of(cache_PBW, width, tokens=64):
    """A descriptor of blocks of a page's tokens, or some of them, by `width` dims."""
    return blocks_of(cache_PBW, tokens, width)
