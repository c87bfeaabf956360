"""Definitions of the ops that watch over how evenly experts are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def balance_loss(
    scores_TE: Tensor, *, top_k: int, rows: int, factor: float, mean: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`sum_i f_i P_i` of every sequence (DeepSeek-V3 report eq. (17)-(20)), times `factor` and as it is."""
    experts = scores_TE.shape[1]
    scores_STE = scores_TE.view(rows, -1, experts)
    chosen_SK = scores_STE.detach().topk(top_k, dim=-1).indices.flatten(1)
    f_SE = F.one_hot(chosen_SK, experts).sum(1).float() * (experts / chosen_SK.shape[1])
    if mean is not None:
        f_SE = mean(f_SE)
    share_STE = scores_STE / scores_STE.sum(-1, keepdim=True)
    loss = (f_SE * share_STE.mean(1)).sum()
    return loss * factor, loss.detach()


def count_experts(count_E: Tensor, expert_TK: Tensor) -> None:
    """`count_e += |{(t, k): expert_tk = e}|`; the host does not wait, as it would for `bincount`."""
    chosen = expert_TK.flatten().to(torch.int64)
    count_E.scatter_add_(0, chosen, torch.ones_like(chosen))
