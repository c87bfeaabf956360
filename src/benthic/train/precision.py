"""What numbers are kept in: products of the `linear` socket, and running weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.model.products import PlainProducts, SplitLinear

if TYPE_CHECKING:
    from benthic.model.products import WeightGradients
    from benthic.model.sockets import Linear
    from benthic.train.config import PrecisionConfig

DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def linear_socket(config: PrecisionConfig, sink: WeightGradients) -> Linear:
    """The socket for products in `matmul` of weights kept in `weights`; `sink` takes weight gradients."""
    same = config.weights == config.matmul
    return SplitLinear(PlainProducts(None if same else DTYPES[config.matmul]), sink)
