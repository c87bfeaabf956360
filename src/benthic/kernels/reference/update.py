"""Definition of the optimizer's update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from benthic.kernels.reference.fp8 import E4M3_MAX
from benthic.kernels.reference.fp8_linear import TILE, quantise_weight
from benthic.kernels.reference.sampling import uniform

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.fp8_linear import Fp8

_NAN: Final = 0x7FC0


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


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    running: Tensor | None = None,
) -> None:
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
    if running is not None:
        running.copy_(master)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """Float32 masters from their bfloat16 weights and int16 remainders, which `split_master` made of them."""
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(remainder).view(torch.float32)


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write float32 masters as bfloat16 weights, rounded to the nearest, and int16 remainders of their bits.

    `bits(master) = 2^16 bits(weight) + remainder`. A master between two weights, one in 2^16, is rounded away
    from zero, where `.bfloat16()` takes the even one: the other remainder, 2^15, is no int16. So every master
    but NaN comes back bit for bit, those whose weight is infinite too; NaN gives NaNs.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16).masked_fill_(master.isnan(), _NAN)
    weight.view(torch.int16).copy_(high)
    remainder.copy_(torch.sub(bits, high.bitwise_left_shift_(16), out=high))


def adamw_split(
    weight: Tensor, remainder: Tensor, gradient: Tensor, first: Tensor, second: Tensor, by: AdamWStep
) -> None:
    """`adamw` of the master that weight and remainder make."""
    master = join_master(weight, remainder)
    adamw(master, gradient, first, second, by)
    split_master(master, weight, remainder)


def adamw_fp8(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    copy: Fp8,
    *,
    power_of_two: bool,
    seed: int | None,
) -> None:
    """`adamw`, then the block tiles of the new master, rounded to the nearest or with numbers from `seed`."""
    adamw(master, gradient, first, second, by)
    values, scale = quantise_weight(master, power_of_two=power_of_two)
    copy.scale.copy_(scale)
    if seed is not None:
        outer, inner = master.shape[-2:]
        each = scale.repeat_interleave(TILE, -2)[..., :outer, :].repeat_interleave(TILE, -1)[..., :inner]
        values = spread((master.float() / each).clamp(-E4M3_MAX, E4M3_MAX), seed).to(values.dtype)
    copy.values.copy_(values)


def spread(x: Tensor, seed: int) -> Tensor:
    """Round `|x| <= 448` to one of its two neighbours in E4M3, each with the probability of its nearness.

    The number that decides about element i is the hash of (seed, i), see `reference.sampling.uniform`.
    """
    position = torch.arange(x.numel(), device=x.device).view(x.shape)
    number = uniform(torch.full_like(position, seed), position)
    magnitude = x.double().abs()
    # 2^(e - 3), where 2^e <= |x|: the distance of neighbours; at least 2^-9
    step = torch.exp2(magnitude.clamp(min=2.0**-6).frexp().exponent.double() - 4.0)
    return ((magnitude / step + number).floor() * step).copysign(x).to(x.dtype)


def accumulate(into: Tensor, x: Tensor, *, fresh: bool = False) -> None:
    """`into += x`, x widened first; with `fresh`, `into = x`."""
    if fresh:
        into.copy_(x)
    else:
        into.add_(x.to(into.dtype))
