"""Log-probabilities of what was drawn, and seeds as words.

Shape suffixes: L rows that want log-probabilities, V vocabulary.
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


def to_int64(seed: int) -> int:
    """Fold any Python integer into the signed 64-bit word with the same low bits."""
    word = seed % _WORD
    return word - _WORD if word >= _WORD // 2 else word


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
