# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels that draw tokens: the logits are read once, and piece by piece.

Every piece of a row says its greatest logit and the mass of its powers, in parallel; a second kernel adds the
pieces up, finds the one in which the draw falls, and reads that one again. Where rows have filters, kernels
between the two find, without a sort, the value down to which tokens are kept: a logit's bits, turned so that
they count like the logit, are found digit by digit from above, one kernel a digit, in which every piece
counts (top-k) or adds up (top-p) what is at least as great as each of sixteen candidates. Of the tokens with
that value the first few are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv, next_power_of_2
from benthic.kernels.triton_hash import drawn

PIECE = 4096
STRETCH = 256
"""Logits of a program, and those that it compares with all candidates at a time."""
SPARE_BITS = {torch.bfloat16: 16, torch.float16: 12}
"""The lowest bits that are zero when such a logit is a float32; in digits of four."""
WAYS = tl.constexpr(16)
"""Candidates of a digit."""
SIGN = tl.constexpr(0x80000000)
NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _logits(row_ptr, v, vocab):
    """Some logits of a row; -inf behind its end, and a NaN counts as the greatest."""
    x = tl.load(row_ptr + v, mask=v < vocab, other=float("-inf")).to(tl.float32) + 0.0
    return tl.where(x != x, float("inf"), x)  # noqa: PLR0124 (a NaN)


@triton.jit
def _powers(x, best, temperature):
    """`exp((x - best) / temperature)`, at most 1, and 0 where both are -inf."""
    return tl.where(x > float("-inf"), tl.exp((x - best) / temperature), 0.0)


@triton.jit
def _ranked(x, SPARE: tl.constexpr):
    """Bits that count like the numbers, as uint32; the lowest `SPARE` bits are cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= SIGN, ~bits, bits | SIGN) >> SPARE


@triton.jit
def _unranked(rank, SPARE: tl.constexpr):
    """The number of which these are the bits; its lowest `SPARE` bits are zero."""
    bits = (rank << SPARE).to(tl.uint32)
    low = (1 << SPARE) - 1
    return tl.where(bits >= SIGN, bits ^ SIGN, ~(bits | low)).to(tl.float32, bitcast=True)


@triton.jit
def _temperature(temperature_ptr, row):
    """A divisor also where the likeliest token is taken, and whether it is."""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature > 0.0, temperature, 1.0), temperature == 0.0


@triton.jit
def _weigh(
    logits_ptr, temperature_ptr, best_ptr, first_ptr, mass_ptr, vocab, stride, pieces, PIECE: tl.constexpr
):
    """Greatest logit of a piece of a row, where it first is, and the mass of its powers."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    x = _logits(logits_ptr + row * stride, v, vocab)
    best = tl.max(x, axis=0)
    temperature, _ = _temperature(temperature_ptr, row)
    place = row * pieces + piece
    tl.store(best_ptr + place, best)
    tl.store(first_ptr + place, tl.min(tl.where(x == best, v, vocab), axis=0))
    tl.store(mass_ptr + place, tl.sum(_powers(x, best, temperature), axis=0))


@triton.jit
def _best_of(best_ptr, row, pieces, PIECES: tl.constexpr):
    """The greatest logit of a row."""
    p = tl.arange(0, PIECES)
    return tl.max(tl.load(best_ptr + row * pieces + p, mask=p < pieces, other=float("-inf")), axis=0)


@triton.jit
def _narrowed(share_ptr, found_ptr, above_ptr, wanted_ptr, row, pieces, digit, PIECES: tl.constexpr):
    """The search after a digit: the greatest candidate that reaches what is wanted, and what lies above it.

    `share_ptr` holds what each piece found for the candidates of that digit.
    """
    way, p = tl.arange(0, WAYS), tl.arange(0, PIECES)
    place = (row * pieces + p[:, None]) * WAYS + way[None, :]
    total = tl.sum(tl.load(share_ptr + place, mask=p[:, None] < pieces, other=0.0), axis=0)
    reached = tl.maximum(tl.sum((total >= tl.load(wanted_ptr + row)).to(tl.int32), axis=0) - 1, 0)
    found = tl.load(found_ptr + row).to(tl.uint32, bitcast=True) + (reached.to(tl.uint32) << digit)
    next_one = tl.sum(tl.where(way == reached + 1, total, 0.0), axis=0)
    return found, tl.where(reached + 1 < WAYS, next_one, tl.load(above_ptr + row))


@triton.jit(do_not_specialize=["digit"])
def _survey(
    logits_ptr, temperature_ptr, least_ptr, floor_ptr, ties_ptr, best_ptr,
    share_in_ptr, found_in_ptr, above_in_ptr, wanted_ptr, share_ptr, found_ptr, above_ptr,
    vocab, stride, pieces, digit,
    MASS: tl.constexpr, SPARE: tl.constexpr, PIECE: tl.constexpr, STRETCH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """How many logits of a piece are at least each candidate for the next digit, or the mass of their powers.

    Masses are those of logits above the floor whose powers are at least `least`, and of the floor's ties.
    The digit before is settled first: all pieces come to the same, and the first notes it. Before the first
    digit nothing has been found, which settles to zero.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    found, above = _narrowed(
        share_in_ptr, found_in_ptr, above_in_ptr, wanted_ptr, row, pieces, tl.minimum(digit + 4, 31), PIECES
    )
    if piece == 0:
        tl.store(found_ptr + row, found.to(tl.int32, bitcast=True))
        tl.store(above_ptr + row, above)
    way = tl.arange(0, WAYS)
    candidate = found + (way.to(tl.uint32) << digit)
    temperature, _ = _temperature(temperature_ptr, row)
    best = _best_of(best_ptr, row, pieces, PIECES)
    totals = tl.zeros([STRETCH, WAYS], tl.float32)
    for start in range(piece * PIECE, piece * PIECE + PIECE, STRETCH):
        v = start + tl.arange(0, STRETCH)
        x = _logits(logits_ptr + row * stride, v, vocab)
        rank = _ranked(x, SPARE)
        each = tl.where(v < vocab, 1.0, 0.0)
        if MASS:
            power = _powers(x, best, temperature)
            floor = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)
            each = tl.where((rank > floor) & (power >= tl.load(least_ptr + row)), power * each, 0.0)
        totals += tl.where(rank[:, None] >= candidate[None, :], each[:, None], 0.0)
    total = tl.sum(totals, axis=0)
    if MASS and piece == 0:
        total += _mass_of_ties(floor_ptr, ties_ptr, least_ptr, row, best, temperature, candidate, SPARE)
    tl.store(share_ptr + (row * pieces + piece) * WAYS + way, total)


@triton.jit
def _mass_of_ties(floor_ptr, ties_ptr, least_ptr, row, best, temperature, candidate, SPARE: tl.constexpr):
    """What the floor's kept tokens add to each candidate that is not above it."""
    floor, ties = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True), tl.load(ties_ptr + row)
    power = _powers(_unranked(floor, SPARE), best, temperature)
    mass = tl.where((ties < NEVER) & (power >= tl.load(least_ptr + row)), ties.to(tl.float32) * power, 0.0)
    return tl.where(candidate <= floor, mass, 0.0)


@triton.jit
def _conclude(
    temperature_ptr, wish_ptr, best_ptr, share_ptr, found_ptr, above_ptr, wanted_ptr, floor_ptr, ties_ptr,
    whole, pieces,
    MASS: tl.constexpr, SPARE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Raise the floor of a row that wishes for less than the whole, and say how many of its ties are kept."""
    row = tl.program_id(0).to(tl.int64)
    found, above = _narrowed(share_ptr, found_ptr, above_ptr, wanted_ptr, row, pieces, 0, PIECES)
    wanted = tl.load(wanted_ptr + row)
    floor, ties = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True), tl.load(ties_ptr + row)
    each = wanted * 0.0 + 1.0
    if MASS:
        temperature, _ = _temperature(temperature_ptr, row)
        each = _powers(_unranked(found, SPARE), _best_of(best_ptr, row, pieces, PIECES), temperature)
    enough = tl.maximum(tl.ceil((wanted - above) / each), 1.0)
    enough = tl.minimum(tl.where(enough == enough, enough, 1.0), 1e9).to(tl.int32)  # noqa: PLR0124 (a NaN)
    enough = tl.where(found > floor, enough, tl.minimum(ties, enough))
    if tl.load(wish_ptr + row) < whole:
        tl.store(floor_ptr + row, found.to(tl.int32, bitcast=True))
        tl.store(ties_ptr + row, enough)


@triton.jit
def _want(share_ptr, top_p_ptr, wanted_ptr, pieces, PIECES: tl.constexpr):
    """The mass that a row's top-p is of: what its pieces found for the first candidate, which is zero."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PIECES)
    whole = tl.sum(tl.load(share_ptr + (row * pieces + p) * WAYS, mask=p < pieces, other=0.0), axis=0)
    tl.store(wanted_ptr + row, tl.load(top_p_ptr + row) * whole)


@triton.jit
def _settle(
    logits_ptr, temperature_ptr, least_ptr, floor_ptr, best_ptr, mass_ptr, tied_ptr,
    vocab, stride, pieces,
    SPARE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The mass that a piece keeps above the floor, relative to its greatest logit, and how many are tied."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * pieces + piece
    v = piece * PIECE + tl.arange(0, PIECE)
    x = _logits(logits_ptr + row * stride, v, vocab)
    rank, floor = _ranked(x, SPARE), tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)
    temperature, _ = _temperature(temperature_ptr, row)
    best = _best_of(best_ptr, row, pieces, PIECES)
    kept = (rank > floor) & (_powers(x, best, temperature) >= tl.load(least_ptr + row))
    power = _powers(x, tl.load(best_ptr + place), temperature)
    tl.store(mass_ptr + place, tl.sum(tl.where(kept, power, 0.0), axis=0))
    tl.store(tied_ptr + place, tl.sum(((rank == floor) & (v < vocab)).to(tl.int32), axis=0))


@triton.jit
def _uniform(seed_ptr, position_ptr, row):
    """The row's number in [0, 1), a multiple of 2^-24."""
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    return drawn(seed, position).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def _draw(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, least_ptr, floor_ptr, ties_ptr,
    best_ptr, first_ptr, mass_ptr, tied_ptr, token_ptr,
    vocab, stride, pieces,
    FILTERED: tl.constexpr, SPARE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The token of a row: in the first piece whose running mass passes the row's number, likewise there.

    Running masses are compared and not differences of them, and pieces and tokens without mass are passed
    over, so that no rounding draws what has none.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature, greedy = _temperature(temperature_ptr, row)
    p = tl.arange(0, PIECES)
    here, place = p < pieces, row * pieces + p
    own = tl.load(best_ptr + place, mask=here, other=float("-inf"))
    best = tl.max(own, axis=0)
    first = tl.min(tl.where(own == best, tl.load(first_ptr + place, mask=here, other=vocab), vocab), axis=0)
    token = tl.where((best > float("-inf")) & (best < float("inf")), first, -1)
    if not greedy and token >= 0:
        scales = _powers(own, best, temperature)
        mass = tl.load(mass_ptr + place, mask=here, other=0.0) * scales
        floor, left = tl.zeros([], tl.uint32), tl.zeros([PIECES], tl.int32)
        if FILTERED:
            floor = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)
            tied = tl.load(tied_ptr + place, mask=here, other=0)
            left = tl.maximum(tl.load(ties_ptr + row) - (tl.cumsum(tied, axis=0) - tied), 0)
            power = _powers(_unranked(floor, SPARE), best, temperature)
            power = tl.where(power >= tl.load(least_ptr + row), power, 0.0)
            mass += tl.minimum(tied, left).to(tl.float32) * power
        running = tl.cumsum(mass, axis=0)
        target = _uniform(seed_ptr, position_ptr, row) * tl.max(running, axis=0)
        last = tl.max(tl.where(mass > 0.0, p, 0), axis=0)
        piece = tl.minimum(tl.min(tl.where((running > target) & (mass > 0.0), p, PIECES), axis=0), last)
        below = tl.sum(tl.where(p == piece - 1, running, 0.0), axis=0)
        scale = tl.sum(tl.where(p == piece, scales, 0.0), axis=0)
        v = piece * PIECE + tl.arange(0, PIECE)
        x = _logits(logits_ptr + row * stride, v, vocab)
        power = _powers(x, tl.load(best_ptr + row * pieces + piece), temperature)
        if FILTERED:
            rank = _ranked(x, SPARE)
            equal = (rank == floor) & (v < vocab)
            ties = tl.sum(tl.where(p == piece, left, 0), axis=0)
            kept = (rank > floor) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= ties))
            kept &= _powers(x, best, temperature) >= tl.load(least_ptr + row)
            power = tl.where(kept, power, 0.0)
        passed = (below + tl.cumsum(power * scale, axis=0) > target) & (power > 0.0)
        token = tl.minimum(
            tl.min(tl.where(passed, v, NEVER), axis=0), tl.max(tl.where(power > 0.0, v, 0), axis=0)
        )
    tl.store(token_ptr + row, token.to(tl.int64))


class _Pieces:
    """One call: the logits, how they are cut up, and what the kernels tell each other."""

    def __init__(self, logits_SV, temperature_S):
        self.rows, vocab = logits_SV.shape
        self.pieces = cdiv(vocab, PIECE)
        self.logits_SV, self.temperature_S = logits_SV, temperature_S
        self.sizes = vocab, logits_SV.stride(0), self.pieces
        self.spare = SPARE_BITS.get(logits_SV.dtype, 0)
        self.padded = cdiv(self.rows, 4) * 4  # all parts begin where the kernels were compiled for
        self.best_SP, self.mass_SP = self.empty(2, self.padded, self.pieces)
        self.first_SP, self.tied_SP = self.empty(2, self.padded, self.pieces, dtype=torch.int32)
        self.floor_S, self.ties_S = self.empty(2, self.padded, dtype=torch.int32)
        self.piecewise = {"PIECE": PIECE, "num_warps": 8}
        self.whole = {"PIECES": next_power_of_2(self.pieces)}

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.logits_SV.device)

    def weigh(self):
        _weigh[(self.rows, self.pieces)](
            self.logits_SV, self.temperature_S, self.best_SP, self.first_SP, self.mass_SP, *self.sizes,
            **self.piecewise,
        )  # fmt: skip

    def filter(self, filters):
        """Find each row's floor and how many of its ties are kept; `mass_SP` is what lies above it then."""
        vocab = self.sizes[0]
        self.floor_S.zero_()
        self.ties_S.fill_(NEVER.value)
        if filters.some_top_k:
            wanted_S = filters.top_k_S.clamp(min=1).to(torch.float32)
            self.raise_floor(filters, filters.top_k_S, vocab, wanted_S, mass=False)
        if filters.some_top_p:
            self.raise_floor(filters, filters.top_p_S, 1.0, filters.top_p_S.clone(), mass=True)
        _settle[(self.rows, self.pieces)](
            self.logits_SV, self.temperature_S, filters.min_p_S, self.floor_S, self.best_SP, self.mass_SP,
            self.tied_SP, *self.sizes, SPARE=self.spare, **self.piecewise, **self.whole,
        )  # fmt: skip

    def raise_floor(self, filters, wish_S, whole, wanted_S, *, mass):
        """One search: for so many tokens or, once the whole is known, for a share of the mass; above 0."""
        kind = {"MASS": mass, "SPARE": self.spare}
        share_SPW = torch.zeros((self.padded, self.pieces, WAYS.value), device=wish_S.device)
        found_S, above_S = torch.zeros((2, self.padded), device=wish_S.device)
        found_S = found_S.view(torch.int32)
        for digit in range(28 - self.spare, -4, -4):
            before = share_SPW, found_S, above_S
            share_SPW, found_S = torch.empty_like(share_SPW), torch.empty_like(found_S)
            above_S = torch.empty_like(above_S)
            _survey[(self.rows, self.pieces)](
                self.logits_SV, self.temperature_S, filters.min_p_S, self.floor_S, self.ties_S, self.best_SP,
                *before, wanted_S, share_SPW, found_S, above_S, *self.sizes, digit,
                STRETCH=STRETCH, **kind, **self.piecewise, **self.whole,
            )  # fmt: skip
            if mass and digit == 28 - self.spare:
                _want[(self.rows,)](share_SPW, wish_S, wanted_S, self.pieces, **self.whole)
        _conclude[(self.rows,)](
            self.temperature_S, wish_S, self.best_SP, share_SPW, found_S, above_S, wanted_S,
            self.floor_S, self.ties_S, whole, self.pieces, **kind, **self.whole,
        )  # fmt: skip

    def draw(self, seed_S, position_S, filters):
        token_S = self.empty(self.rows, dtype=torch.int64)
        least_S = self.temperature_S if filters is None else filters.min_p_S
        _draw[(self.rows,)](
            self.logits_SV, self.temperature_S, seed_S, position_S, least_S, self.floor_S, self.ties_S,
            self.best_SP, self.first_SP, self.mass_SP, self.tied_SP, token_S, *self.sizes,
            FILTERED=filters is not None, SPARE=self.spare, **self.piecewise, **self.whole,
        )  # fmt: skip
        return token_S


def draw_tokens(logits_SV, temperature_S, seed_S, position_S, filters):
    """See `benthic.kernels.ops.draw_tokens`."""
    logits_SV = logits_SV if logits_SV.stride(-1) == 1 else logits_SV.contiguous()
    if not logits_SV.shape[0]:
        return torch.empty(0, dtype=torch.int64, device=logits_SV.device)
    pieces = _Pieces(logits_SV, temperature_S)
    pieces.weigh()
    if filters is not None:
        pieces.filter(filters)
    return pieces.draw(seed_S, position_S, filters)
