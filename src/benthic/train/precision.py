"""What numbers are kept in: products of the `linear` socket, and running weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.model.fp8_products import Fp8Products, MixedLinear, RunningWeights, fp8_parameters
from benthic.model.products import PlainProducts
from benthic.model.split_linear import SplitLinear

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.model.network import DeepSeek
    from benthic.model.products import WeightGradients
    from benthic.model.sockets import Linear
    from benthic.train.config import PrecisionConfig

DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def keep_weights(model: DeepSeek, weights: str) -> None:
    """Bring a model's parameters to the dtype that they are kept in.

    With "fp8", parameters that multiply in FP8 are the float32 masters themselves; all others are bfloat16.
    """
    if weights == "auto":
        return
    model.to(DTYPES["bfloat16" if weights == "fp8" else weights])
    if weights == "fp8":
        for param in fp8_parameters(model).values():
            param.data = param.data.float()


def linear_socket(config: PrecisionConfig, sink: WeightGradients, models: Iterable[DeepSeek]) -> Linear:
    """The socket for products in `matmul` of weights kept in `weights`; `sink` takes weight gradients."""
    if config.matmul == "fp8":
        return _fp8_socket(sink, models, power_of_two=config.power_of_two_scales)
    same = config.weights == config.matmul
    return SplitLinear(PlainProducts(None if same else DTYPES[config.matmul]), sink)


def _fp8_socket(sink: WeightGradients, models: Iterable[DeepSeek], *, power_of_two: bool) -> MixedLinear:
    running = RunningWeights(power_of_two)
    return MixedLinear(
        narrow=frozenset(param for model in models for param in fp8_parameters(model).values()),
        fp8=SplitLinear(Fp8Products(running, power_of_two), sink),
        wide=SplitLinear(PlainProducts(torch.bfloat16, wide_gradients=True), sink),
        running=running,
    )
