"""Definition of the optimizer's update."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class AdamWStep(NamedTuple):
    """The numbers of one update.

    step_size: the learning rate over `1 - beta1^t`. decay: the learning rate times the weight decay.
    correction: `1 - beta2^t`. scale: what the gradient is multiplied with first.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    decay: float
    correction: float
    scale: float = 1.0


def adamw(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, by: AdamWStep) -> None:
    """Loshchilov and Hutter (2019), algorithm 2, in the master's dtype; moments are rounded as stored.

    `.to()` is the moment itself when it is kept in that dtype, a copy otherwise.
    """
    gradient = gradient * by.scale
    new_first = first.to(master.dtype).lerp_(gradient, 1.0 - by.beta1)
    new_second = second.to(master.dtype).mul_(by.beta2)
    new_second.addcmul_(gradient, gradient, value=1.0 - by.beta2)
    for moment, value in ((first, new_first), (second, new_second)):
        if value is not moment:
            moment.copy_(value)
    master.mul_(1.0 - by.decay)
    root = new_second.div(by.correction).sqrt_().add_(by.eps)
    master.addcdiv_(new_first, root, value=-by.step_size)


def accumulate(into: Tensor, x: Tensor) -> None:
    """`into += x`, x widened first."""
    into.add_(x.to(into.dtype))
