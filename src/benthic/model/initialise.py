"""Random weights that depend on the seed and each parameter's name, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from benthic.model.network import DeepSeek


@torch.no_grad()
def initialise(model: DeepSeek, seed: int, boxes: Mapping[str, tuple[slice, ...]] | None = None) -> None:
    """Fill every parameter in place: matrices N(0, initializer_range), norms 1, router biases 0.

    DeepSeek-V3 report section 4.2 (standard deviation 0.006 for all learnable parameters). Numbers are drawn
    on the CPU in float32, matrix by matrix (each expert's apart), from a generator seeded by `(seed, name)`:
    the same weights come out whatever the device, the dtype (up to rounding), the order of construction or
    the part this instance holds. `boxes` names, by parameter, the part of it that `model` holds where it is
    not whole; what lies outside is drawn matrix by matrix and dropped.
    """
    held = model.state_dict()
    for param in parameters(model.config):
        if not model.part.holds(param.name):
            continue
        tensor = held[param.name]
        if param.part == "norms":
            tensor.fill_(1.0)
        elif not param.trainable:
            tensor.zero_()
        else:
            whole = tuple(slice(0, size) for size in param.shape)
            box = whole if boxes is None else boxes.get(param.name, whole)
            key = f"{seed}/{param.name}"
            _fill_normal(tensor, model.config.initializer_range, key, param.shape, box)


def _fill_normal(
    tensor: Tensor, std: float, key: str, shape: tuple[int, ...], box: tuple[slice, ...]
) -> None:
    if tensor.dim() > 2:  # one expert, or one of gate and up, at a time: no temporary larger than a matrix
        for index, piece in enumerate(tensor, start=box[0].start):
            _fill_normal(piece, std, f"{key}/{index}", shape[1:], box[1:])
        return
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    tensor.copy_(torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)[box])
