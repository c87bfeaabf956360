"""Weights that lie behind one another, so that one product multiplies the same rows by all of them.

What the hidden state is multiplied by on its way to queries, and to the latent: side by side on two streams
the products of some dozens of rows would wait for each other's tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.model.mla import Attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from benthic.model.network import DeepSeek


def latent_pairs(model: DeepSeek) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Of every layer the query's first weight and the latent's, `[O, hidden_size]` each."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield module.first.weight, module.kv_a.weight


def lay_together(weights: Sequence[nn.Parameter]) -> Tensor:
    """Move weights of one width and dtype behind one another; returns all of them as one, by rows."""
    both = torch.cat([weight.data.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
    for weight, part in zip(weights, both.split([each.shape[0] for each in weights]), strict=True):
        weight.data = part
    return both


def as_one(weights: Sequence[Tensor]) -> Tensor | None:
    """The one weight that several are, by rows; None where they do not lie so in memory."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        apart = weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if apart or weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return first.as_strided((sum(each.shape[0] for each in weights), first.shape[1]), first.stride())
