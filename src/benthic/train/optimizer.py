"""AdamW (Loshchilov and Hutter, 2019) with float32 masters and moments in float32 or bfloat16."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.kernels import ops
from benthic.train.precision import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from benthic.parallel.buckets import Piece
    from benthic.train.config import OptimizerConfig


class AdamW:
    """Updates what this rank holds of the masters, in place, and rounds them into narrower weights.

    Written here because torch's AdamW refuses bfloat16 moments of float32 parameters on CPUs. Weight decay
    touches matrices, not norms. Arithmetic is float32 whatever the moments are kept in. Pieces that lie one
    behind the other and decay alike are updated by one call.

    Args:
        pieces: of the parameters of each bucket, from `parallel.buckets`; their masters are float32.
        config: settings.
    """

    def __init__(self, pieces: Iterable[Iterable[Piece]], config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self._runs: list[_Run] = []
        self._moments: dict[str, dict[str, Tensor]] = {}
        for run in itertools.chain.from_iterable(map(_runs, pieces)):
            sizes = [piece.kept.numel() for piece in run]
            flat = _Run.of(run, sum(sizes), DTYPES[config.moment_dtype])
            self._runs.append(flat)
            parts = zip(run, flat.first.split(sizes), flat.second.split(sizes), strict=True)
            self._moments |= {piece.name: {"first": f, "second": s} for piece, f, s in parts}

    @property
    def update_bytes(self) -> int:
        """What an update allocates on a GPU: it is one kernel a piece."""
        return 0

    @torch.no_grad()
    def step(self, *, lr: float, scale: float = 1.0) -> None:
        """One update with `scale` times the gradients (the clipping factor)."""
        self.steps += 1
        numbers = [self._numbers(lr, scale, decays=decays) for decays in (False, True)]
        for run in self._runs:
            by, changed = numbers[run.decays], (run.gradient, run.first, run.second)
            if run.kept.dtype == torch.float32:
                ops.adamw(run.kept, *changed, by, running=run.running)
            else:
                assert run.running is not None  # noqa: S101 (remainders are of weights)
                ops.adamw_split(run.running, run.kept, *changed, by)

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
        return self._moments[name]


class _Run(NamedTuple):
    """Pieces one behind the other, as one: flat."""

    kept: Tensor
    gradient: Tensor
    running: Tensor | None
    first: Tensor
    second: Tensor
    decays: bool

    @classmethod
    def of(cls, pieces: list[Piece], size: int, dtype: torch.dtype) -> _Run:
        """Fresh moments in `dtype`."""
        start = pieces[0]
        kept, gradient = (x.as_strided((size,), (1,)) for x in (start.kept, start.gradient))
        running = None if start.running is None else start.running.as_strided((size,), (1,))
        first, second = (torch.zeros_like(kept, dtype=dtype) for _ in range(2))
        return cls(kept, gradient, running, first, second, _decays(start))


def _runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of one bucket in order, cut wherever one does not begin where the one before ends."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _follows(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _follows(before: Piece, piece: Piece) -> bool:
    end = before.kept.storage_offset() + before.kept.numel()
    return end == piece.kept.storage_offset() and _decays(before) == _decays(piece)


def _decays(piece: Piece) -> bool:
    return len(piece.shape) >= 2
