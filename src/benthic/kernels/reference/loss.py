"""Definition of the output head's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels.reference.norm import wide


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, *, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """`-log softmax(W h)[target]` per token and the best token, through the whole logits matrix.

    Returns `(loss_T, argmax_T)`; a token whose target is `ignore_index` has loss 0.
    """
    del chunk  # the definition has no chunks
    logits_TV = (hidden_TD @ weight_VD.T).to(wide(hidden_TD.dtype))
    loss_T = F.cross_entropy(logits_TV, target_T.long(), reduction="none", ignore_index=ignore_index)
    return loss_T, torch.argmax(logits_TV, dim=-1)
