"""Muon (Jordan et al. 2024) as Moonlight trains with it: matrices are moved along their orthogonal factor.

"Muon is Scalable for LLM Training" (Moonlight report), section 2.2: with gradient G, momentum mu, learning
rate eta and weight decay lambda, a matrix W of A x B becomes

    M <- mu M + G                O = NewtonSchulz5(G + mu M)
    W <- W - eta (0.2 sqrt(max(A, B)) O + lambda W)

so that an update has about the root mean square of AdamW's and both share one learning rate. Embedding, head,
norms and routers are AdamW's. Every expert's gate, up and down projections are matrices of their own, and so
are the gate and the up projection of an MLP; `q_b`, `kv_b` and the other attention projections are one matrix
each, with all their heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benthic.parallel.setup import MUON_PARTS
from benthic.parallel.whole_matrices import WholeMatrices, matrices_of
from benthic.train.optimizer import AdamW
from benthic.train.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from benthic.parallel.buckets import Bucket, Piece
    from benthic.spec.parameters import Param
    from benthic.train.config import OptimizerConfig

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_STEPS: Final = 5
_RMS: Final = 0.2
_AT_ONCE: Final = 2**26


def newton_schulz(g_NAB: Tensor, dtype: torch.dtype) -> Tensor:
    """About `U V^T` of each `G = U S V^T`, by five quintic iterations in `dtype`; returns float32.

    X <- a X + (b X X^T + c (X X^T)^2) X, from X = G / |G|, on the wide side (Moonlight report eq. (2)). The
    coefficients leave singular values between about 0.7 and 1.2. Zeros stay zeros.
    Shapes: g_NAB float32 [matrices, A, B].
    """
    a, b, c = _COEFFICIENTS
    tall = g_NAB.shape[-2] > g_NAB.shape[-1]
    x = g_NAB / torch.linalg.vector_norm(g_NAB, dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = (x.mT if tall else x).to(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


@dataclass(frozen=True)
class _Part:
    """Muon's pieces of one bucket, and the matrices they are cut from."""

    bucket: Bucket
    pieces: tuple[Piece, ...]
    whole: WholeMatrices


class Muon:
    """Muon for the matrices of the network, AdamW for everything else; updates masters in place.

    Every rank must call `step`: matrices that are cut by ZeRO's shards meet on one rank. The result does not
    depend on how they are cut.

    Args:
        buckets: of this rank, in the order of the network.
        config: settings.
        params: the model's parameters by name.
    """

    def __init__(
        self, buckets: Sequence[Bucket], config: OptimizerConfig, params: Mapping[str, Param]
    ) -> None:
        self.config = config
        found = (_part(bucket, params) for bucket in buckets)
        self._parts = tuple(part for part in found if part is not None)
        pieces = [list(bucket.pieces()) for bucket in buckets]
        rest = [[p for p in each if params[p.name].part not in MUON_PARTS] for each in pieces]
        self._rest = AdamW(rest, config)
        self._pieces = {p.name: p for each in pieces for p in each if params[p.name].part in MUON_PARTS}
        dtype = DTYPES[config.moment_dtype]
        self._momentum = {n: torch.zeros_like(p.kept, dtype=dtype) for n, p in self._pieces.items()}

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self._rest.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._rest.steps = count

    @property
    def update_bytes(self) -> int:
        """The most that an update allocates: one bucket's matrices as moves, as matrices, and back."""
        sizes = (
            sum(piece.kept.numel() for piece in part.pieces) * (24 if part.bucket.group.size > 1 else 20)
            for part in self._parts
        )
        return max(sizes, default=0)

    @torch.no_grad()
    def step(self, *, lr: float, scale: float = 1.0) -> None:
        """One update with `scale` times the gradients (the clipping factor)."""
        for part in self._parts:
            self._update(part, lr, scale)
        self._rest.step(lr=lr, scale=scale)

    def moments(self, name: str) -> dict[str, Tensor]:
        """What updates of one parameter change beside its master: flat, this rank's piece."""
        return {"momentum": self._momentum[name]} if name in self._momentum else self._rest.moments(name)

    def _update(self, part: _Part, lr: float, scale: float) -> None:
        moves = torch.zeros_like(part.bucket.kept, dtype=torch.float32)
        for piece in part.pieces:
            self._at(moves, part.bucket, piece).copy_(self._nesterov(piece, scale))
        part.whole.apply(self._orthogonalise, moves)
        for piece in part.pieces:
            master = piece.master
            master.mul_(1.0 - lr * self.config.weight_decay)
            master.sub_(self._at(moves, part.bucket, piece), alpha=lr)
            piece.write(master)

    def _nesterov(self, piece: Piece, scale: float) -> Tensor:
        """G + mu M, after M <- mu M + G."""
        gradient, mu = piece.gradient * scale, self.config.momentum
        kept = self._momentum[piece.name]
        momentum = kept.float().mul_(mu).add_(gradient)
        if momentum is not kept:
            kept.copy_(momentum)
        return gradient.add_(momentum, alpha=mu)

    def _at(self, shard: Tensor, bucket: Bucket, piece: Piece) -> Tensor:
        first = bucket.place_of(piece)
        return shard[first : first + piece.stop - piece.start]

    def _orthogonalise(self, matrices: list[Tensor]) -> list[Tensor]:
        """The scaled updates; matrices of one shape together, as many as memory is worth."""
        found: dict[int, Tensor] = {}
        dtype = DTYPES[self.config.newton_schulz_dtype]
        for numbers in _batches(matrices):
            stacked = newton_schulz(torch.stack([matrices[n] for n in numbers]), dtype)
            stacked *= _RMS * math.sqrt(max(stacked.shape[-2:]))
            found |= dict(zip(numbers, stacked, strict=True))
        return [found[n] for n in range(len(matrices))]


def _part(bucket: Bucket, params: Mapping[str, Param]) -> _Part | None:
    shapes = {n: tuple(p.shape) for n, p in bucket.params.items() if params[n].part in MUON_PARTS}
    if not shapes:
        return None
    whole = WholeMatrices.of(matrices_of(shapes, bucket.starts), bucket.length, bucket.group)
    return _Part(bucket, tuple(p for p in bucket.pieces() if p.name in shapes), whole)


def _batches(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of matrices of equal shape, at most so many elements together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(number)
    batches = []
    for shape, numbers in by_shape.items():
        room = max(1, _AT_ONCE // shape.numel())
        batches += [numbers[at : at + room] for at in range(0, len(numbers), room)]
    return batches
