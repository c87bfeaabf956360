"""Random weights that depend on the seed and each parameter's name, and on nothing else."""

from __future__ import annotations

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from benthic.model.network import DeepSeek

THREADS: Final = 8
"""That draw at most: a core draws 100 to 200 million numbers a second, and a rank may hold ten billion."""


class Piece(NamedTuple):
    """A matrix, or a vector, that is drawn at once: of `shape`, of which `tensor` holds `box`."""

    tensor: Tensor
    key: str
    shape: tuple[int, ...]
    box: tuple[slice, ...]

    def drawn(self, std: float) -> Tensor:
        """What belongs into `tensor`, on the CPU in float32."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        return torch.empty(self.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)[self.box]


@torch.no_grad()
def initialise(model: DeepSeek, seed: int, boxes: Mapping[str, tuple[slice, ...]] | None = None) -> None:
    """Fill every parameter in place: matrices N(0, initializer_range), norms 1, router biases 0.

    DeepSeek-V3 report section 4.2 (standard deviation 0.006 for all learnable parameters). Numbers are drawn
    on the CPU in float32, matrix by matrix (each expert's apart), from a generator seeded by `(seed, name)`:
    the same weights come out whatever the device, the dtype (up to rounding), the order of construction or
    the part this instance holds. `boxes` names, by parameter, the part of it that `model` holds where it is
    not whole; what lies outside is drawn matrix by matrix and dropped. Threads draw, this one copies.
    """
    held, pieces = model.state_dict(), list[Piece]()
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
            pieces += _pieces(Piece(tensor, f"{seed}/{param.name}", tuple(param.shape), box))
    std, todo = model.config.initializer_range, iter(pieces)
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while few := list(itertools.islice(todo, 2 * threads)):
            for piece, drawn in zip(few, pool.map(lambda piece: piece.drawn(std), few), strict=True):
                piece.tensor.copy_(drawn)


def _pieces(piece: Piece) -> Iterator[Piece]:
    """One expert, or one of gate and up, at a time: no temporary larger than a matrix."""
    if piece.tensor.dim() <= 2:
        yield piece
        return
    for index, part in enumerate(piece.tensor, start=piece.box[0].start):
        yield from _pieces(Piece(part, f"{piece.key}/{index}", piece.shape[1:], piece.box[1:]))
