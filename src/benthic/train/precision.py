"""What numbers are kept in: products of the `linear` socket, running weights, float32 gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import ScheduleError
from benthic.model.fp8_products import Fp8Products, MixedLinear, RunningWeights, fp8_parameters
from benthic.model.products import PlainProducts, SplitLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

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


def linear_socket(config: PrecisionConfig, sink: WeightGradients, model: DeepSeek) -> Linear:
    """The socket for products in `matmul` of weights kept in `weights`; `sink` takes weight gradients."""
    if config.matmul == "fp8":
        return _fp8_socket(sink, model, power_of_two=config.power_of_two_scales)
    same = config.weights == config.matmul
    return SplitLinear(PlainProducts(None if same else DTYPES[config.matmul]), sink)


def _fp8_socket(sink: WeightGradients, model: DeepSeek, *, power_of_two: bool) -> MixedLinear:
    running = RunningWeights(power_of_two)
    return MixedLinear(
        narrow=frozenset(fp8_parameters(model).values()),
        fp8=SplitLinear(Fp8Products(running, power_of_two), sink),
        wide=SplitLinear(PlainProducts(torch.bfloat16, wide_gradients=True), sink),
        running=running,
    )


class Gradients:
    """The gradients of a model in float32, summed over microbatches.

    Float32 parameters keep them in `.grad`. For narrower parameters each microbatch's gradient is added to a
    float32 sum as soon as it is complete, and freed (DeepSeek-V3 report section 3.3.3). Weight gradients that
    pass through `sink` reach that sum without being rounded to the parameter's dtype.
    """

    def __init__(self, model: nn.Module, sink: WeightGradients) -> None:
        self._sink = sink
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        narrow = {n: p for n, p in self._params.items() if p.dtype != torch.float32}
        self._sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in narrow.items()}
        for name, param in narrow.items():
            sink.sum_into(param, self._sums[name])
        self._hooks = [p.register_post_accumulate_grad_hook(_adder(self._sums[n])) for n, p in narrow.items()]

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        for name, param in self._params.items():
            param.grad = None
            if name in self._sums:
                self._sums[name].zero_()

    def named(self) -> dict[str, Tensor]:
        """Every gradient by the name of its parameter; parameters that took no part are left out.

        Raises:
            ScheduleError: weight gradients are still waiting, so the sums are incomplete.
        """
        if self._sink.pending:
            message = (
                f"{self._sink.pending} chunks of weight gradients have not run; the schedule must run as "
                "many as it defers before the step ends."
            )
            raise ScheduleError(message)
        found = {name: self._sums.get(name, param.grad) for name, param in self._params.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def norm(self) -> Tensor:
        """The global 2-norm, a float32 scalar."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.named().values()]
        return torch.linalg.vector_norm(torch.stack(norms))


class _adder:  # noqa: N801 (used as a function)
    """Adds a parameter's gradient to `target` and frees it."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def __call__(self, param: Tensor) -> None:
        if param.grad is not None:
            self._target.add_(param.grad)
            param.grad = None
