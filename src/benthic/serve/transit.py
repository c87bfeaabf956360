"""Small arrays on their way to the device, and results on their way back, without the host waiting.

Only pinned memory crosses while the host goes on; torch's pinned allocator gives a block out again when the
copies that were queued from it are done, so nobody has to keep one alive. On a CPU nothing crosses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """The array on `device`: shared on a CPU, queued behind the device's work elsewhere."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def tensor_of(values: Sequence[float], dtype: type[np.generic], device: torch.device) -> Tensor:
    """Some numbers on `device`."""
    return to_device(np.array(values, dtype=dtype), device)


class Homeward(NamedTuple):
    """Tensors whose copies to the host are queued behind the work that computes them.

    `wait` is the one place where a serving step waits for the device.
    """

    copies: tuple[Tensor, ...]
    done: torch.cuda.Event | None

    @classmethod
    def start(cls, *tensors: Tensor) -> Self:
        """Queue the copies; CPU tensors are taken as they are."""
        if not tensors or not tensors[0].is_cuda:
            return cls(tensors, None)
        pinned = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        return cls.into(pinned, tensors)

    @classmethod
    def into(cls, pinned: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Self:
        """Queue the copies into memory that nobody else writes before they were read."""
        for target, tensor in zip(pinned, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        if not tensors[0].is_cuda:
            return cls(pinned, None)
        done = torch.cuda.Event()
        done.record()
        return cls(pinned, done)

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, complete."""
        if self.done is not None:
            self.done.synchronize()
        return self.copies
