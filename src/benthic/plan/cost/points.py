"""Measured points of one kind of operation, and what lies between them.

What is interpolated is utilisation, the roofline's time over the measured one, which changes slowly: the time
itself spans six decades. Distances are in doublings of a size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Place = tuple[float, ...]

NEIGHBOURS: Final = 6
REACH: Final = 2.0  # doublings beyond which the nearest point says little about this size
_EXACT: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Found:
    """Utilisation at a place, its least and most among the neighbours, and how far the nearest is."""

    utilisation: float
    least: float
    most: float
    distance: float


class Points:
    """Utilisations at sizes.

    Args:
        points: sizes and the utilisation there, in (0, inf).
    """

    def __init__(self, points: Sequence[tuple[Place, float]]) -> None:
        self._cells: dict[tuple[int, ...], list[tuple[Place, float]]] = defaultdict(list)
        self._all = [(_doublings(at), math.log(share)) for at, share in points]
        for one in self._all:
            self._cells[_cell(one[0])].append(one)

    def __len__(self) -> int:
        return len(self._all)

    def find(self, at: Place, *, without: Place | None = None) -> Found | None:
        """The utilisation at `at`; `without` leaves one point out (to see how well it is foretold).

        The geometric mean of the nearest points, weighted by inverse squared distance; None without points.
        """
        here = _doublings(at)
        left_out = None if without is None else _doublings(without)
        near = [one for one in self._near(here) if one[1][0] != left_out][:NEIGHBOURS]
        if not near:
            return None
        if near[0][0] < _EXACT:
            same = sorted(log for distance, (_, log) in near if distance < _EXACT)
            low, middle, high = (math.exp(same[i]) for i in (0, len(same) // 2, -1))
            return Found(middle, low, high, 0.0)
        logs = [log for _, (_, log) in near]
        return Found(math.exp(_mean(near)), math.exp(min(logs)), math.exp(max(logs)), near[0][0])

    def _near(self, here: Place) -> list[tuple[float, tuple[Place, float]]]:
        """Points by distance: those of the cells around, or all where these hold too few."""
        found = [one for cell in _around(_cell(here)) for one in self._cells.get(cell, ())]
        if len(found) <= NEIGHBOURS:
            found = self._all
        return sorted(((math.dist(here, one[0]), one) for one in found), key=_distance)


def _distance(one: tuple[float, tuple[Place, float]]) -> float:
    return one[0]


def _mean(near: list[tuple[float, tuple[Place, float]]]) -> float:
    weights = [1.0 / (distance**2) for distance, _ in near]
    return sum(w * log for w, (_, (_, log)) in zip(weights, near, strict=True)) / sum(weights)


def _doublings(at: Place) -> Place:
    return tuple(math.log2(size) for size in at)


def _cell(here: Place) -> tuple[int, ...]:
    return tuple(math.floor(size) for size in here)


def _around(cell: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from product(*((size - 1, size, size + 1) for size in cell))
