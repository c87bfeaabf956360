"""When a loss or a gradient is no longer finite: find the first tensor to blame, and stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from benthic.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from benthic.train.data.microbatch import Microbatch
    from benthic.train.executor import Executor, Sums
    from benthic.train.losses import Weights


def check_losses(
    step: int, sums: Sums, executor: Executor, batch: Sequence[Microbatch], weights: Weights
) -> None:
    """Stop when a loss is not finite, naming the first module whose output is not.

    Raises:
        NumericsError: with step, loss, and the module or parameter to blame.
    """
    named = {"loss": sums.main, "balance loss": sums.balance}
    named |= {f"MTP loss of depth {depth + 1}": loss for depth, loss in enumerate(sums.mtp)}
    for name, value in named.items():
        if not math.isfinite(value):
            culprit = _culprit(executor, batch, weights)
            message = (
                f"step {step}: {name} is {value}; the first tensor that is not finite is {culprit}. "
                "The parameters were not updated. Resume from the last checkpoint with a lower train.lr, or "
                "look at the rows of this step."
            )
            raise NumericsError(message)


def check_gradients(step: int, norm: float, named: Callable[[], Mapping[str, Tensor]]) -> None:
    """Stop when the gradient norm is not finite, naming the gradients of `named()` that are not.

    Raises:
        NumericsError: with step and parameters.
    """
    if math.isfinite(norm):
        return
    gradients = named()
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    where = f"gradients of {', '.join(bad[:4])} ({len(bad)} of {len(gradients)})" if bad else "only their sum"
    message = (
        f"step {step}: the gradient norm is {norm}; not finite: {where}. The parameters were not updated. "
        "Resume from the last checkpoint with a lower train.lr."
    )
    raise NumericsError(message)


def _culprit(executor: Executor, batch: Sequence[Microbatch], weights: Weights) -> str:
    """The first tensor that is not finite, in the order of the network; every rank looks at its own part."""
    found = _bad_parameter(executor.models) or _bad_output(executor, batch, weights)
    return executor.first(found) or "the loss itself"


def _bad_parameter(models: Sequence[nn.Module]) -> str | None:
    for model in models:
        for name, tensor in model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                return f"parameter {name}"
    return None


def _bad_output(executor: Executor, batch: Sequence[Microbatch], weights: Weights) -> str | None:
    """Run the step again, watching every module."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if not found and isinstance(out, torch.Tensor) and not bool(torch.isfinite(out).all()):
                found.append(f"the output of {name}")

        return hook

    named = [pair for model in executor.models for pair in model.named_modules()]
    hooks = [module.register_forward_hook(watch(name)) for name, module in named if name]
    try:
        executor.run(batch, weights)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
