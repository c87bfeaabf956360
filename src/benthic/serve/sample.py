"""The mathematics of sampling: a hash for randomness, filters, the draw, log-probabilities; all row by row.

A row's draw depends on its own logits, settings, seed and output position and on nothing else: the uniform
number is a hash of (seed, position), not the state of a generator. So the same seed gives the same tokens
whatever else is in the batch, after a preemption and on any device.

Shape suffixes: S rows that sample this step, V vocabulary, L rows that want log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.serve.messages import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Logprobs = tuple[TokenLogprob, ...]

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15 - _WORD
_MIX_1 = 0xBF58476D1CE4E5B9 - _WORD
_MIX_2 = 0x94D049BB133111EB - _WORD
_UNIFORM_BITS = 24
NO_TOKEN = -1
"""What a row draws when its distribution is not finite."""


def to_int64(seed: int) -> int:
    """Fold any Python integer into the signed 64-bit word with the same low bits."""
    word = seed % _WORD
    return word - _WORD if word >= _WORD // 2 else word


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


def keep_probable(
    probs_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, *, most_k: int
) -> Tensor:
    """Zero what min-p, top-k and top-p leave out, in that order; top-p counts the mass that top-k left.

    Each filter keeps a prefix of the row sorted by falling probability; among equals the lower token id comes
    first, so exactly `top_k` tokens are kept. At least one token always is.

    Args:
        probs_SV: float32 distributions.
        top_k_S: int64 number of tokens to keep; the vocabulary size keeps all.
        top_p_S: float32 in (0, 1].
        min_p_S: float32 in [0, 1], relative to the row's greatest probability.
        most_k: the greatest entry of `top_k_S`: only so many tokens are sorted.
    """
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


class Measured(NamedTuple):
    """Log-probabilities of given tokens and of the likeliest ones, as tensors of any device.

    Shapes: token, logprob and rank [L]; best_value and best_token [L, most].
    """

    token_L: Tensor
    logprob_L: Tensor
    rank_L: Tensor
    best_value_LM: Tensor
    best_token_LM: Tensor


def measure(logits_LV: Tensor, token_L: Tensor, most: int) -> Measured:
    """Natural-log probabilities under the raw logits of `token_L` (int64) and of the `most` likeliest tokens.

    A rank is one more than the number of strictly likelier tokens.
    """
    logprob_LV = logits_LV.to(torch.float32).log_softmax(-1)
    chosen_L1 = logprob_LV.gather(-1, token_L.unsqueeze(-1))
    rank_L = (logprob_LV > chosen_L1).sum(-1) + 1
    best = logprob_LV.topk(most, dim=-1)
    return Measured(token_L, chosen_L1.squeeze(-1), rank_L, best.values, best.indices)


def logprobs_from(measured: Measured, best: Sequence[int]) -> list[Logprobs]:
    """For each row its token, then the `best[i]` likeliest, whose ranks count from 1 in that order."""
    rows = zip(*(column.tolist() for column in measured), best, strict=True)
    return [
        (
            TokenLogprob(token, logprob, rank),
            *(TokenLogprob(ids[i], values[i], i + 1) for i in range(count)),
        )
        for token, logprob, rank, values, ids, count in rows
    ]


def logprobs_of(logits_LV: Tensor, tokens: Sequence[int], best: Sequence[int]) -> list[Logprobs]:
    """`measure` and `logprobs_from` in one go, waiting for the device: `best[i]` likeliest of row i."""
    token_L = torch.tensor(tokens, device=logits_LV.device)
    return logprobs_from(measure(logits_LV, token_L, max(best)), best)
