"""Keeping experts evenly loaded: the sequence-wise balance loss, and the bias update that needs no loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from benthic.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Mean = Callable[[Tensor], Tensor]
    """Averages a tensor, without gradient, over the ranks that share the tokens of the same sequences."""


def sequence_balance_loss(scores_TE: Tensor, *, top_k: int, rows: int, mean: Mean | None = None) -> Tensor:
    """Sum over sequences of `sum_i f_i P_i`, DeepSeek-V3 report eq. (17)-(20) without its factor α.

    f_i counts how often expert i is among the `top_k` highest scores (without bias and without groups), times
    experts / (top_k * tokens); P_i is the mean share of expert i in a token's scores. The gradient flows
    through P alone. Each sequence contributes 1 when perfectly balanced.
    Where several ranks share the tokens of a sequence in equal parts, `mean` averages f over them, and the
    results of these ranks add up to the loss times their number, as P is linear in the tokens.
    Shapes: scores_TE float32 [rows * tokens, experts], the sequences one after another, all of one length.
    Raises: ShapeError when the tokens do not divide into `rows`.
    """
    tokens, experts = scores_TE.shape
    if tokens % rows:
        message = f"{tokens} tokens do not divide into {rows} sequences; every sequence has one length."
        raise ShapeError(message)
    scores_STE = scores_TE.view(rows, -1, experts)
    chosen_SK = scores_STE.detach().topk(top_k, dim=-1).indices.flatten(1)
    f_SE = _counts_by_row(chosen_SK, experts) * (experts / chosen_SK.shape[1])
    if mean is not None:
        f_SE = mean(f_SE)
    share_STE = scores_STE / scores_STE.sum(-1, keepdim=True)
    return (f_SE * share_STE.mean(1)).sum()


def expert_counts(expert_TK: Tensor, experts: int) -> Tensor:
    """How many rows each expert got: int64 [experts]. The host does not wait, as it would for `bincount`."""
    chosen = expert_TK.flatten().to(torch.int64)
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, *, speed: float, recentre: bool) -> None:
    """Raise the bias of underloaded experts by γ and lower that of overloaded ones, in place.

    `b_i += γ sign(mean(c) - c_i)`, DeepSeek-V3 report section 2.1.2; an expert at the mean stays. The sign is
    taken of integers, so it is exact for any count. `recentre` subtracts the mean of the signs (Moonlight).
    Shapes: bias_E float32; count_E int64, tokens over the whole global batch.
    """
    experts = count_E.numel()
    sign_E = torch.sign(count_E.sum() - experts * count_E).to(bias_E.dtype)
    if recentre:
        sign_E -= sign_E.mean()
    bias_E.add_(sign_E, alpha=speed)


def max_vio(count_E: Tensor) -> float:
    """How far the fullest expert is above the mean, `max(c) / mean(c) - 1` (Wang et al., 2024, eq. (4))."""
    total = int(count_E.sum())
    return float(count_E.max()) * count_E.numel() / total - 1.0 if total else 0.0


def _counts_by_row(chosen_SK: Tensor, experts: int) -> Tensor:
    return F.one_hot(chosen_SK, experts).sum(1).float()
