"""AdamW (Loshchilov and Hutter, 2019) with float32 masters and moments in float32 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.train.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from benthic.parallel.buckets import Piece
    from benthic.train.config import OptimizerConfig


class AdamW:
    """Updates what this rank holds of the masters, in place, and rounds them into narrower weights.

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
            by = self._numbers(lr, scale, decays=len(piece.shape) >= 2)
            moments = self._first[name], self._second[name]
            ops.adamw(piece.master, piece.gradient, *moments, by, running=piece.running)

    def _numbers(self, lr: float, scale: float, *, decays: bool) -> ops.AdamWStep:
        c = self.config
        return ops.AdamWStep(
            beta1=c.beta1,
            beta2=c.beta2,
            eps=c.eps,
            step_size=lr / (1.0 - c.beta1**self.steps),
            decay=lr * c.weight_decay if decays else 0.0,
            correction=1.0 - c.beta2**self.steps,
            scale=scale,
        )

    def moments(self, name: str) -> dict[str, Tensor]:
        """The first and second moment of one parameter's piece, flat; what updates change beside masters."""
        return {"first": self._first[name], "second": self._second[name]}
