"""Triton kernels that take the greatest logit of each row and judge drafts by it, in two launches.

Every piece of a row says its greatest logit and where it first is; a second kernel goes through the pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.launch import early, wait_for_inputs
from benthic.kernels.relaunch import remembered

PIECE = 4096
"""Logits of a program: 8 KiB in bfloat16, of which 16 programs fit a multiprocessor."""


@triton.jit
def _greater(a, b):
    """The greater of two, a NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@remembered
@triton.jit
def _best_of_pieces(
    logits_ptr, best_ptr, first_ptr, vocab, stride, pieces, PIECE: tl.constexpr, PDL: tl.constexpr
):
    """Greatest logit of a piece of a row, a NaN before all, and where it first is."""
    wait_for_inputs(PDL)
    piece, row = tl.program_id(0), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + v, mask=v < vocab, other=float("-inf"))
    x = x.to(tl.float32)
    best = tl.reduce(x, 0, _greater)
    place = row * pieces + piece
    tl.store(best_ptr + place, best)
    tl.store(first_ptr + place, tl.min(tl.where(x == best, v, vocab), axis=0))


@triton.jit
def _token(best_ptr, first_ptr, row, pieces, PIECES: tl.constexpr):
    """Where the greatest logit of a row first is, -1 if it is not finite."""
    p = tl.arange(0, PIECES)
    place = row * pieces + p
    own = tl.load(best_ptr + place, mask=p < pieces, other=float("-inf"))
    first = tl.load(first_ptr + place, mask=p < pieces, other=2147483647)
    own = tl.where(own == own, own, float("inf"))  # noqa: PLR0124 (a NaN)
    best = tl.max(own, axis=0)
    first = tl.min(tl.where(own == best, first, 2147483647), axis=0)
    return tl.where((best > float("-inf")) & (best < float("inf")), first, -1).to(tl.int64)


@remembered
@triton.jit
def _choose(best_ptr, first_ptr, token_ptr, pieces, PIECES: tl.constexpr, PDL: tl.constexpr):
    """The token of a row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    tl.store(token_ptr + row, _token(best_ptr, first_ptr, row, pieces, PIECES))


@remembered
@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["owner_ptr"])
def _judge(
    best_ptr, first_ptr, fed_ptr, home_ptr, newest_ptr, row_ptr, owner_ptr, line_ptr,
    pieces, line_stride, sequences,
    QUERIES: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The tokens of a sequence's rows, how many of its drafts held, and the newest token: noted where due."""
    wait_for_inputs(PDL)
    sequence = tl.program_id(0)
    start = sequence * QUERIES
    newest = _token(best_ptr, first_ptr, start, pieces, PIECES)
    tl.store(home_ptr + start, newest)
    held, holds, token = newest * 0, newest == newest, newest  # noqa: PLR0124 (of their types)
    for q in tl.static_range(1, QUERIES):
        holds = holds & (token == tl.load(fed_ptr + start + q))
        token = _token(best_ptr, first_ptr, start + q, pieces, PIECES)
        tl.store(home_ptr + start + q, token)
        newest, held = tl.where(holds, token, newest), tl.where(holds, q, held)
    tl.store(home_ptr + sequences * QUERIES + sequence, held)
    tl.store(newest_ptr + sequence, newest)
    tl.store(row_ptr + sequence, start + held)
    tl.store(line_ptr + tl.load(owner_ptr + sequence) * line_stride, tl.maximum(newest, 0))


def _pieces(logits_TV):
    """The best of every piece and where it is; how many pieces a row has, and how the next kernel starts."""
    (rows, vocab), device = logits_TV.shape, logits_TV.device
    pieces, how = cdiv(vocab, PIECE), early(device, rows)
    logits_TV = logits_TV if logits_TV.stride(-1) == 1 else logits_TV.contiguous()
    best_TP = torch.empty(rows, pieces, dtype=torch.float32, device=device)
    first_TP = torch.empty(rows, pieces, dtype=torch.int32, device=device)
    _best_of_pieces[(pieces, rows)](
        logits_TV, best_TP, first_TP, vocab, logits_TV.stride(0), pieces, PIECE=PIECE, num_warps=4, **how
    )
    return best_TP, first_TP, pieces, {"PIECES": next_power_of_2(pieces), "num_warps": 1, **how}


def best_tokens(logits_SV):
    """See `benthic.kernels.ops.best_tokens`."""
    token_S = torch.empty(logits_SV.shape[0], dtype=torch.int64, device=logits_SV.device)
    if token_S.numel():
        best_SP, first_SP, pieces, how = _pieces(logits_SV)
        _choose[(token_S.numel(),)](best_SP, first_SP, token_S, pieces, **how)
    return token_S


def judge_greedy(logits_TV, fed_SQ, notes):
    """See `benthic.kernels.ops.judge_greedy`."""
    sequences, queries = fed_SQ.shape
    if sequences:
        best_TP, first_TP, pieces, how = _pieces(logits_TV)
        _judge[(sequences,)](
            best_TP, first_TP, fed_SQ.contiguous(), notes.home_R, notes.newest_S, notes.row_S, notes.owner_S,
            notes.fed_NF, pieces, notes.fed_NF.stride(0), sequences, QUERIES=queries, **how,
        )  # fmt: skip
