"""Definition of a draw: a hash for randomness, filters, and the inversion of a distribution; all row by row.

A row's draw depends on its own logits, settings, seed and output position and on nothing else: the uniform
number is a hash of (seed, position), not the state of a generator. So the same seed gives the same tokens
whatever else is in the batch, after a preemption and on any device.

Shape suffixes: S rows, V vocabulary, K the most tokens that a row may keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15 - _WORD
_MIX_1 = 0xBF58476D1CE4E5B9 - _WORD
_MIX_2 = 0x94D049BB133111EB - _WORD
_UNIFORM_BITS = 24
NO_TOKEN = -1
"""What a row draws when its distribution is not finite."""


class Filters(NamedTuple):
    """What rows may keep of their distributions, in the order in which it applies.

    Attributes:
        min_p_S: float32 in [0, 1]: tokens at least so likely, relative to the likeliest.
        top_k_S: int64: so many of the likeliest tokens; the vocabulary size keeps all.
        top_p_S: float32 in (0, 1]: the likeliest tokens that make up this share of what is left.
        most_k: the greatest entry of `top_k_S`.
        some_top_k: whether some row sets top-k.
        some_top_p: whether some row sets top-p.
    """

    min_p_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    most_k: int
    some_top_k: bool = True
    some_top_p: bool = True


class Notes(NamedTuple):
    """Where `judge_greedy` writes, int64 all: T rows of logits, S sequences, N lines of F tokens to feed.

    Attributes:
        home_R: [T + S]: the token of each row, then how many drafts of each sequence held.
        newest_S: the token of each sequence's newest row.
        row_S: which row that is.
        owner_S: which line of `fed_NF` each sequence has; this one is read.
        fed_NF: gets the newest token in its first column, 0 for `NO_TOKEN`.
    """

    home_R: Tensor
    newest_S: Tensor
    row_S: Tensor
    owner_S: Tensor
    fed_NF: Tensor


def best_tokens(logits_SV: Tensor) -> Tensor:
    """See `benthic.kernels.ops.best_tokens`."""
    best_S, token_S = logits_SV.max(-1)
    return torch.where(best_S.isfinite(), token_S, NO_TOKEN)


def judge_greedy(logits_TV: Tensor, fed_SQ: Tensor, notes: Notes) -> None:
    """See `benthic.kernels.ops.judge_greedy`."""
    sequences, queries = fed_SQ.shape
    drawn_SQ = best_tokens(logits_TV).view(sequences, queries)
    held_S1 = (drawn_SQ[:, :-1] == fed_SQ[:, 1:]).cumprod(1).sum(1, keepdim=True)
    newest_S = drawn_SQ.gather(1, held_S1).squeeze(1)
    first_S = torch.arange(sequences, device=newest_S.device) * queries
    notes.home_R.copy_(torch.cat((drawn_SQ.flatten(), held_S1.flatten())))
    notes.newest_S.copy_(newest_S)
    notes.row_S.copy_(first_S + held_S1.squeeze(1))
    notes.fed_NF[:, 0].index_copy_(0, notes.owner_S, newest_S.clamp(min=0))


def draw_tokens(
    logits_SV: Tensor, temperature_S: Tensor, seed_S: Tensor, position_S: Tensor, filters: Filters | None
) -> Tensor:
    """See `benthic.kernels.ops.draw_tokens`."""
    logits_SV = logits_SV.to(torch.float32)
    best_S, best_token_S = logits_SV.max(-1)
    greedy_S = temperature_S == 0.0
    divisor_S1 = torch.where(greedy_S, 1.0, temperature_S).unsqueeze(-1)
    probs_SV = ((logits_SV - best_S.unsqueeze(-1)) / divisor_S1).softmax(-1)
    if filters is not None:
        probs_SV = keep_probable(probs_SV, filters)
    token_S = torch.where(greedy_S, best_token_S, draw(probs_SV, uniform(seed_S, position_S)))
    return torch.where(best_S.isfinite(), token_S, NO_TOKEN)


def splitmix64(word_S: Tensor) -> Tensor:
    """One output of the splitmix64 generator (Steele, Lea and Flood 2014) for each int64 state."""
    z = word_S + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(word_S: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64 (torch's is arithmetic)."""
    return (word_S >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """The one uniform number in [0, 1) of each (seed, output position), a float32 multiple of 2^-24."""
    word_S = splitmix64(splitmix64(seed_S) + position_S * _GOLDEN)
    return _shift(word_S, 64 - _UNIFORM_BITS).to(torch.float32) * 2.0**-_UNIFORM_BITS


def draw(probs_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """Invert each row's cumulative distribution at `uniform_S`; a token of probability 0 is never drawn.

    The tokens stay in vocabulary order (not sorted by probability), so that a rounding error in the logits
    moves a draw only with a probability of the size of that error. Rows of `probs_SV` need not sum to 1.
    """
    cumulative_SV = probs_SV.cumsum(-1, dtype=torch.float64)
    total_S1 = cumulative_SV[:, -1:]
    below_total_S1 = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    target_S1 = torch.minimum(uniform_S.to(torch.float64).unsqueeze(-1) * total_S1, below_total_S1)
    return torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(-1)


def keep_probable(probs_SV: Tensor, filters: Filters) -> Tensor:
    """Zero what min-p, top-k and top-p leave out, in that order; top-p counts the mass that top-k left.

    Each filter keeps a prefix of the row sorted by falling probability; among equals the lower token id comes
    first, so exactly `top_k` tokens are kept. At least one token always is. `probs_SV` is float32.
    """
    min_p_S, top_k_S, top_p_S, most_k, *_ = filters
    sorted_SK = probs_SV.topk(most_k, dim=-1).values
    rank_K = torch.arange(most_k, device=probs_SV.device)
    kept_SK = (rank_K < top_k_S.unsqueeze(-1)) & (sorted_SK >= min_p_S.unsqueeze(-1) * sorted_SK[:, :1])
    mass_SK = torch.where(kept_SK, sorted_SK, 0.0)
    before_SK = mass_SK.cumsum(-1) - mass_SK
    wanted_S1 = torch.where(top_p_S < 1.0, top_p_S, torch.inf).unsqueeze(-1) * mass_SK.sum(-1, keepdim=True)
    kept_SK &= before_SK < wanted_S1
    count_S1 = kept_SK.sum(-1, keepdim=True).clamp_(min=1)
    threshold_S1 = sorted_SK.gather(-1, count_S1 - 1)
    above_SV = probs_SV > threshold_S1
    equal_SV = probs_SV == threshold_S1
    ties_S1 = count_S1 - above_SV.sum(-1, keepdim=True)
    kept_SV = above_SV | (equal_SV & (equal_SV.cumsum(-1) <= ties_S1))
    return torch.where(kept_SV, probs_SV, 0.0)
