"""Functions of whole matrices on sharded ones: each matrix meets on one rank, its result goes back in parts.

ZeRO cuts a bucket into flat shards without regard for matrices. An update that needs them whole (Muon) is
computed where a matrix lies entirely inside a shard, and otherwise on one of the ranks that hold some of it,
chosen so that the work is even (Moonlight report, section 2.3.2, gathers every matrix on every rank that
holds some of it). Cost: what is not at home travels once each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.parallel.collectives import exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from benthic.parallel.mesh import Group


class Matrix(NamedTuple):
    """A matrix of `rows` x `columns` that starts at `start` of a bucket's flat array."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.rows * self.columns


class Stretch(NamedTuple):
    """Elements `[start, stop)` of matrix number `matrix`, counted from its first, which `rank` holds."""

    matrix: int
    rank: int
    start: int
    stop: int


def matrices_of(shapes: Mapping[str, tuple[int, ...]], starts: Mapping[str, int]) -> list[Matrix]:
    """The matrices of parameters that start at `starts`: `[..., rows, columns]` holds one for each index."""
    found = []
    for name, shape in shapes.items():
        rows, columns = shape[-2:]
        count = torch.Size(shape[:-2]).numel()
        found += [Matrix(starts[name] + k * rows * columns, rows, columns) for k in range(count)]
    return found


def stretches(matrices: Sequence[Matrix], length: int) -> list[Stretch]:
    """What each rank holds of each matrix when the flat array is cut into shards of `length` elements."""
    found = []
    for number, matrix in enumerate(matrices):
        for rank in range(matrix.start // length, -(-matrix.stop // length)):
            start, stop = max(matrix.start, rank * length), min(matrix.stop, (rank + 1) * length)
            found.append(Stretch(number, rank, start - matrix.start, stop - matrix.start))
    return found


def owners(matrices: Sequence[Matrix], held: Iterable[Stretch], size: int) -> list[int]:
    """Which rank computes each matrix: the only one that holds it, or the least busy of those that do.

    Work is counted as rows x columns x the smaller of the two; large matrices are placed first.
    """
    holders: list[list[int]] = [[] for _ in matrices]
    for stretch in held:
        holders[stretch.matrix].append(stretch.rank)
    work = [m.rows * m.columns * min(m.rows, m.columns) for m in matrices]
    busy, chosen = [0] * size, [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda n: (len(holders[n]) > 1, -work[n], n)):
        rank = min(holders[number], key=lambda r: (busy[r], r))
        busy[rank] += work[number]
        chosen[number] = rank
    return chosen


@dataclass(frozen=True)
class WholeMatrices:
    """Where the matrices of one bucket are, and who computes them.

    outgoing: this rank's stretches by their matrix's owner. incoming: stretches of the matrices that this
    rank owns, by the rank that holds them.
    """

    group: Group
    length: int
    matrices: tuple[Matrix, ...]
    outgoing: tuple[Stretch, ...]
    incoming: tuple[Stretch, ...]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], length: int, group: Group) -> WholeMatrices:
        """Plan for the ranks of `group`, each of which holds `length` elements."""
        held = stretches(matrices, length)
        owner = owners(matrices, held, group.size)
        mine = [s for s in held if s.rank == group.index]
        here = [s for s in held if owner[s.matrix] == group.index]
        return cls(
            group=group,
            length=length,
            matrices=tuple(matrices),
            outgoing=tuple(sorted(mine, key=lambda s: (owner[s.matrix], s.matrix))),
            incoming=tuple(sorted(here, key=lambda s: (s.rank, s.matrix))),
            owner=tuple(owner),
        )

    def apply(self, function: Callable[[list[Tensor]], list[Tensor]], shard: Tensor) -> None:
        """Replace every matrix of which `shard` holds some by the function's; all ranks must call it.

        `function` takes this rank's matrices and returns as many of the same shapes.
        """
        out, into = self._sizes()
        arrived = exchange(
            torch.cat([self._of_shard(shard, s) for s in self.outgoing] or [shard[:0]]), out, into, self.group
        )
        owned = {
            n: shard.new_empty(m.rows, m.columns)
            for n, m in enumerate(self.matrices)
            if self.owner[n] == self.group.index
        }
        for stretch, part in zip(
            self.incoming, arrived.split([s.stop - s.start for s in self.incoming]), strict=True
        ):
            owned[stretch.matrix].view(-1)[stretch.start : stretch.stop] = part
        results = dict(zip(owned, function(list(owned.values())), strict=True))
        parts = [results[s.matrix].reshape(-1)[s.start : s.stop] for s in self.incoming]
        back = exchange(torch.cat(parts or [shard[:0]]), into, out, self.group)
        for stretch, part in zip(
            self.outgoing, back.split([s.stop - s.start for s in self.outgoing]), strict=True
        ):
            self._of_shard(shard, stretch).copy_(part)

    def _of_shard(self, shard: Tensor, stretch: Stretch) -> Tensor:
        at = self.matrices[stretch.matrix].start + stretch.start - self.group.index * self.length
        return shard[at : at + stretch.stop - stretch.start]

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank on the way to the owners."""
        out, into = [0] * self.group.size, [0] * self.group.size
        for stretch in self.outgoing:
            out[self.owner[stretch.matrix]] += stretch.stop - stretch.start
        for stretch in self.incoming:
            into[stretch.rank] += stretch.stop - stretch.start
        return out, into
