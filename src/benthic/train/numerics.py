"""When a loss or a gradient is no longer finite: find the first tensor to blame, and stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from benthic.errors import NumericsError
from benthic.train.losses import terms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Sockets
    from benthic.train.data.microbatch import Microbatch
    from benthic.train.executor import Outcome


def check_losses(
    step: int,
    outcome: Outcome,
    model: DeepSeek,
    batch: Sequence[Microbatch],
    sockets: Callable[[Microbatch], Sockets],
) -> None:
    """Stop when a loss is not finite, naming the first module whose output is not.

    Raises:
        NumericsError: with step, loss, and the module or parameter to blame.
    """
    named = {"loss": outcome.main, "balance loss": outcome.balance}
    named |= {f"MTP loss of depth {depth + 1}": loss for depth, loss in enumerate(outcome.mtp)}
    values = {name: float(loss) for name, loss in named.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            culprit = _bad_parameter(model) or _bad_output(model, batch, sockets) or "the loss itself"
            message = (
                f"step {step}: {name} is {value}; the first tensor that is not finite is {culprit}. "
                "The parameters were not updated. Resume from the last checkpoint with a lower train.lr, or "
                "look at the rows of this step."
            )
            raise NumericsError(message)


def check_gradients(step: int, norm: float, gradients: Mapping[str, Tensor]) -> None:
    """Stop when the gradient norm is not finite, naming the gradients that are not.

    Raises:
        NumericsError: with step and parameters.
    """
    if math.isfinite(norm):
        return
    bad = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    found = f"gradients of {', '.join(bad[:4])} ({len(bad)} of {len(gradients)})" if bad else "only their sum"
    message = (
        f"step {step}: the gradient norm is {norm}; not finite: {found}. The parameters were not updated. "
        "Resume from the last checkpoint with a lower train.lr."
    )
    raise NumericsError(message)


def _bad_parameter(model: nn.Module) -> str | None:
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            return f"parameter {name}"
    return None


@torch.no_grad()
def _bad_output(
    model: DeepSeek, batch: Sequence[Microbatch], sockets: Callable[[Microbatch], Sockets]
) -> str | None:
    """Run the step forward again, watching every module."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if not found and isinstance(out, torch.Tensor) and not bool(torch.isfinite(out).all()):
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    device = model.head_weight().device
    try:
        for microbatch in batch:
            here = microbatch.to(device)
            terms(model, here, sockets(here))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
