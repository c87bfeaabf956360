"""AdamW (Loshchilov and Hutter, 2019) with float32 masters and moments in float32 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import TensorMismatchError
from benthic.train.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from benthic.parallel.buckets import Piece
    from benthic.train.config import OptimizerConfig


class AdamW:
    """Updates what this rank holds of the masters, in place.

    Written here because torch's AdamW refuses bfloat16 moments of float32 parameters on CPUs. Weight decay
    touches matrices, not norms. Arithmetic is float32 whatever the moments are kept in.

    Args:
        pieces: of the parameters, from `parallel.buckets`; their masters are float32.
        config: settings.
    """

    def __init__(self, pieces: Iterable[Piece], config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self._pieces = {piece.name: piece for piece in pieces}
        dtype = DTYPES[config.moment_dtype]
        masters = {name: piece.master for name, piece in self._pieces.items()}
        self._first = {n: torch.zeros_like(master, dtype=dtype) for n, master in masters.items()}
        self._second = {n: torch.zeros_like(master, dtype=dtype) for n, master in masters.items()}

    @torch.no_grad()
    def step(self, *, lr: float, scale: float = 1.0) -> None:
        """One update with `scale` times the gradients (the clipping factor)."""
        self.steps += 1
        for name, piece in self._pieces.items():
            self._update(name, piece, piece.gradient * scale, lr)

    def state(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs beside the parameters and `steps`; flat, piece by piece."""
        narrow = {n: p.master for n, p in self._pieces.items() if p.narrow}
        groups = {"first": self._first, "second": self._second, "master": narrow}
        return {f"{group}.{name}": t for group, held in groups.items() for name, t in held.items()}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Take over what `state` gave.

        Raises:
            TensorMismatchError: tensors missing, extra or of another dtype, all named.
        """
        copy_state(self.state(), state)
        self.steps = steps

    def _update(self, name: str, piece: Piece, gradient: Tensor, lr: float) -> None:
        """One tensor; `.float()` is the moment itself when it is kept in float32, a copy otherwise."""
        c, master = self.config, piece.master
        first = self._first[name].float().lerp_(gradient, 1.0 - c.beta1)
        second = self._second[name].float().mul_(c.beta2).addcmul_(gradient, gradient, value=1.0 - c.beta2)
        _keep(self._first[name], first)
        _keep(self._second[name], second)
        if len(piece.shape) >= 2:
            master.mul_(1.0 - lr * c.weight_decay)
        root = second.div(1.0 - c.beta2**self.steps).sqrt_().add_(c.eps)
        master.addcdiv_(first, root, value=-lr / (1.0 - c.beta1**self.steps))


def _keep(moment: Tensor, value: Tensor) -> None:
    if value is not moment:
        moment.copy_(value)


@torch.no_grad()
def copy_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Fill an optimizer's own tensors with those of a checkpoint.

    Raises:
        TensorMismatchError: tensors missing, extra or of another dtype, all named.
    """
    wrong = sorted(set(own) ^ set(state))
    wrong += [name for name in set(own) & set(state) if own[name].dtype != state[name].dtype]
    if wrong:
        message = (
            f"{len(wrong)} tensors differ between optimizer ({len(own)}) and checkpoint ({len(state)}): "
            f"{', '.join(wrong[:8])}. "
            "Keep optimizer.moment_dtype, optimizer.name and precision.weights as they were."
        )
        raise TensorMismatchError(message)
    for name, tensor in own.items():
        tensor.copy_(state[name].view(-1))
