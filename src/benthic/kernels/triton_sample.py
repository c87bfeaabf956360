# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Triton kernels that draw tokens: the logits are read once, and piece by piece.

Every piece of a row says its greatest logit and the mass of its powers, in parallel; a second kernel adds the
pieces up, finds the one in which the draw falls, and reads that one again. Where rows have filters, a kernel
between the two finds, without a sort, the value down to which tokens are kept: a logit's bits, turned so that
they count like the logit, are found digit by digit from above, by counting (top-k) or adding up (top-p) what
is at least as great as each of sixteen candidates. Of tokens with that value the first few are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECE = 4096
STRETCH = 1024
"""Logits read at a time: of a piece, and by the search."""
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
def _ranked(x, SHIFT: tl.constexpr):
    """Bits that count like the numbers, as uint32; the lowest `SHIFT` bits are cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= SIGN, ~bits, bits | SIGN) >> SHIFT


@triton.jit
def _unranked(rank, SHIFT: tl.constexpr):
    """The number of which these are the bits; its lowest `SHIFT` bits are zero."""
    bits = (rank << SHIFT).to(tl.uint32)
    low = (1 << SHIFT) - 1
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
def _at_least(
    row_ptr, candidate, floor, best, temperature, least, ties_mass, vocab,
    MASS: tl.constexpr, SHIFT: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """Of every candidate: how many logits are at least as great or, with `MASS`, what their powers add up to.

    Of masses count those of logits above `floor` whose powers are at least `least`, and `ties_mass` for all
    that are equal to `floor`.
    """
    total = tl.zeros([WAYS], tl.float32)
    for start in range(0, vocab, STRETCH):
        v = start + tl.arange(0, STRETCH)
        x = _logits(row_ptr, v, vocab)
        rank = _ranked(x, SHIFT)
        if MASS:
            power = _powers(x, best, temperature)
            each = tl.where((rank > floor) & (power >= least) & (v < vocab), power, 0.0)
        else:
            each = tl.where(v < vocab, 1.0, 0.0)
        total += tl.sum(tl.where(rank[:, None] >= candidate[None, :], each[:, None], 0.0), axis=0)
    if MASS:
        total += tl.where(candidate <= floor, ties_mass, 0.0)
    return total


@triton.jit
def _last_with(
    row_ptr, wanted, floor, best, temperature, least, ties_mass, vocab,
    MASS: tl.constexpr, SHIFT: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """The greatest rank down to which `wanted` are reached, and what is reached above it."""
    way = tl.arange(0, WAYS).to(tl.uint32)
    found = tl.zeros([], tl.uint32)
    for digit in range((32 - SHIFT) // 4):
        candidate = found + (way << (28 - SHIFT - 4 * digit))
        total = _at_least(
            row_ptr, candidate, floor, best, temperature, least, ties_mass, vocab, MASS, SHIFT, STRETCH
        )
        reached = tl.sum((total >= wanted).to(tl.int32), axis=0)
        here = way == tl.maximum(reached - 1, 0).to(tl.uint32)
        found = tl.max(tl.where(here, candidate, 0), axis=0).to(tl.uint32)
    above = _at_least(
        row_ptr, found + 1 + 0 * way, floor, best, temperature, least, ties_mass, vocab, MASS, SHIFT, STRETCH
    )
    return found, tl.max(above, axis=0)


@triton.jit
def _filter(
    logits_ptr, temperature_ptr, least_ptr, top_k_ptr, top_p_ptr,
    best_ptr, mass_ptr, floor_ptr, ties_ptr, ties_before_ptr,
    vocab, stride, pieces,
    SHIFT: tl.constexpr, STRETCH: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The value down to which a row keeps tokens, how many of that value, and what mass its pieces keep.

    Min-p, then top-k, then top-p of what those leave.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature, greedy = _temperature(temperature_ptr, row)
    p = tl.arange(0, PIECES)
    best = tl.max(tl.load(best_ptr + row * pieces + p, mask=p < pieces, other=float("-inf")), axis=0)
    least = tl.load(least_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    floor = tl.zeros([], tl.uint32)
    ties = tl.full([], NEVER, tl.int32)
    if top_k < vocab and not greedy:
        wanted = tl.maximum(top_k, 1).to(tl.float32)
        floor, above = _last_with(
            row_ptr, wanted, floor, best, temperature, 0.0, 0.0, vocab, False, SHIFT, STRETCH
        )
        ties = (wanted - above).to(tl.int32)
    if top_p < 1.0 and not greedy:
        power = _powers(_unranked(floor, SHIFT), best, temperature)
        ties_mass = tl.where((ties < NEVER) & (power >= least), ties.to(tl.float32) * power, 0.0)
        candidate = tl.zeros([WAYS], tl.uint32)
        whole = _at_least(
            row_ptr, candidate, floor, best, temperature, least, ties_mass, vocab, True, SHIFT, STRETCH
        )
        wanted = top_p * tl.max(whole, axis=0)
        last, above = _last_with(
            row_ptr, wanted, floor, best, temperature, least, ties_mass, vocab, True, SHIFT, STRETCH
        )
        power = _powers(_unranked(last, SHIFT), best, temperature)
        enough = tl.maximum(tl.ceil((wanted - above) / power), 1.0)
        enough = tl.minimum(tl.where(enough == enough, enough, 1.0), 1e9).to(tl.int32)  # noqa: PLR0124 (a NaN)
        ties = tl.where(last > floor, enough, tl.minimum(ties, enough))
        floor = last
    before = tl.zeros([], tl.int32)
    for piece in range(pieces):
        v = piece * PIECE + tl.arange(0, PIECE)
        x = _logits(row_ptr, v, vocab)
        rank = _ranked(x, SHIFT)
        tied = (rank == floor) & (v < vocab)
        own = tl.load(best_ptr + row * pieces + piece)
        kept = (rank > floor) | (tied & (before + tl.cumsum(tied.to(tl.int32), axis=0) <= ties))
        kept &= _powers(x, best, temperature) >= least
        mass = tl.sum(tl.where(kept, _powers(x, own, temperature), 0.0), axis=0)
        tl.store(mass_ptr + row * pieces + piece, mass)
        tl.store(ties_before_ptr + row * pieces + piece, before)
        before += tl.sum(tied.to(tl.int32), axis=0)
    tl.store(floor_ptr + row, floor.to(tl.int32, bitcast=True))
    tl.store(ties_ptr + row, ties)


@triton.jit
def _mixed(word):
    """One output of splitmix64 for a state, as uint64."""
    z = word + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed_ptr, position_ptr, row):
    """The row's number in [0, 1), a multiple of 2^-24."""
    seed = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(position_ptr + row).to(tl.uint64, bitcast=True)
    word = _mixed(_mixed(seed) + position * 0x9E3779B97F4A7C15)
    return (word >> 40).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def _draw(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, least_ptr,
    best_ptr, first_ptr, mass_ptr, floor_ptr, ties_ptr, ties_before_ptr, token_ptr,
    vocab, stride, pieces,
    FILTERED: tl.constexpr, SHIFT: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
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
        mass = tl.load(mass_ptr + place, mask=here, other=0.0) * _powers(own, best, temperature)
        running = tl.cumsum(mass, axis=0)
        target = _uniform(seed_ptr, position_ptr, row) * tl.max(running, axis=0)
        last = tl.max(tl.where(mass > 0.0, p, 0), axis=0)
        piece = tl.minimum(tl.min(tl.where((running > target) & (mass > 0.0), p, PIECES), axis=0), last)
        below = tl.sum(tl.where(p == piece - 1, running, 0.0), axis=0)
        scale = tl.sum(tl.where(p == piece, _powers(own, best, temperature), 0.0), axis=0)
        v = piece * PIECE + tl.arange(0, PIECE)
        x = _logits(logits_ptr + row * stride, v, vocab)
        power = _powers(x, tl.load(best_ptr + row * pieces + piece), temperature)
        if FILTERED:
            floor = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)
            rank = _ranked(x, SHIFT)
            tied = (rank == floor) & (v < vocab)
            before = tl.load(ties_before_ptr + row * pieces + piece) + tl.cumsum(tied.to(tl.int32), axis=0)
            kept = (rank > floor) | (tied & (before <= tl.load(ties_ptr + row)))
            kept &= _powers(x, best, temperature) >= tl.load(least_ptr + row)
            power = tl.where(kept, power, 0.0)
        passed = (below + tl.cumsum(power * scale, axis=0) > target) & (power > 0.0)
        token = tl.minimum(
            tl.min(tl.where(passed, v, NEVER), axis=0), tl.max(tl.where(power > 0.0, v, 0), axis=0)
        )
    tl.store(token_ptr + row, token.to(tl.int64))


def draw_tokens(logits_SV, temperature_S, seed_S, position_S, filters):
    """See `benthic.kernels.ops.draw_tokens`."""
    logits_SV = logits_SV if logits_SV.stride(-1) == 1 else logits_SV.contiguous()
    rows, vocab = logits_SV.shape
    pieces = triton.cdiv(vocab, PIECE)
    device = logits_SV.device
    token_S = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return token_S
    padded = triton.cdiv(rows, 4) * 4  # all parts then begin where the kernels were compiled for
    best_SP, mass_SP = torch.empty(2, padded, pieces, dtype=torch.float32, device=device)
    first_SP, ties_before_SP = torch.empty(2, padded, pieces, dtype=torch.int32, device=device)
    floor_S, ties_S = torch.empty(2, padded, dtype=torch.int32, device=device)
    stride = logits_SV.stride(0)
    width = {"PIECE": PIECE, "PIECES": triton.next_power_of_2(pieces)}
    shift = {torch.bfloat16: 16, torch.float16: 12}.get(
        logits_SV.dtype, 0
    )  # bits that are zero in every logit
    _weigh[(rows, pieces)](
        logits_SV, temperature_S, best_SP, first_SP, mass_SP, vocab, stride, pieces, PIECE=PIECE, num_warps=8
    )
    if filters is not None:
        _filter[(rows,)](
            logits_SV, temperature_S, filters.min_p_S, filters.top_k_S, filters.top_p_S,
            best_SP, mass_SP, floor_S, ties_S, ties_before_SP,
            vocab, stride, pieces, SHIFT=shift, STRETCH=STRETCH, **width, num_warps=8,
        )  # fmt: skip
    _draw[(rows,)](
        logits_SV, temperature_S, seed_S, position_S, temperature_S if filters is None else filters.min_p_S,
        best_SP, first_SP, mass_SP, floor_S, ties_S, ties_before_SP, token_S,
        vocab, stride, pieces, FILTERED=filters is not None, SHIFT=shift, **width, num_warps=8,
    )  # fmt: skip
    return token_S
