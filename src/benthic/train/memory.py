"""What a trainer keeps for every parameter, summed over the tensors it really holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.model.fp8_products import MixedLinear

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from benthic.train.trainer import Trainer

TERMS = ("running weight", "master weight", "gradient", "first moment", "second moment")


@dataclass(frozen=True)
class KeptBytes:
    """Bytes of each term for some parameters; float32 weights without a copy are masters alone."""

    parameters: int
    terms: dict[str, int]

    @property
    def per_parameter(self) -> float:
        """All terms, in bytes per parameter."""
        return sum(self.terms.values()) / max(1, self.parameters)


def measure(trainer: Trainer, names: Collection[str] | None = None) -> KeptBytes:
    """Sum running weights, masters, gradients and moments of the named parameters (None: all of them).

    Gradients and FP8 copies exist from the first step on.
    """
    params = dict(trainer.model.named_parameters())
    pieces = {piece.name: piece for bucket in trainer.buckets for piece in bucket.pieces()}
    terms = dict.fromkeys(TERMS, 0)
    names = params if names is None else names
    for name in names:
        piece, moments = pieces[name], trainer.optimizer.moments(name)
        running, master = _weights(trainer, params[name], None if piece.running is None else piece.kept)
        terms["running weight"] += running
        terms["master weight"] += master
        terms["gradient"] += _bytes(piece.gradient)
        terms["first moment"] += _bytes(moments["first"])
        terms["second moment"] += _bytes(moments["second"])
    return KeptBytes(sum(params[name].numel() for name in names), terms)


def _weights(trainer: Trainer, param: Tensor, master: Tensor | None) -> tuple[int, int]:
    """Bytes of what products read and of what is kept of the float32 master, of one parameter."""
    if master is not None or param.dtype != torch.float32:
        return _bytes(param), _bytes(master)
    linear = trainer.executor.linear
    copies = linear.running.bytes_of(param) if isinstance(linear, MixedLinear) else 0
    return copies, _bytes(param)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
