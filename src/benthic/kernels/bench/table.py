"""Lines of one run as a table: ours beside the best of the others, and how near the machine's limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.kernels.bench.timing import Line

OURS: Final = ("gluon", "gluon_three", "triton", "native", "chunked")
"""Implementations that are written here; the others call a library or are the definition."""

ROOFS: Final = {"TB/s": "roof: copy", "TFLOP/s": "roof: product"}
"""Which line says what the machine can do, by unit."""


@dataclass(frozen=True)
class Row:
    """One op and shape. Rates, and `roof`, what this machine can do (0: not known), are in `unit`."""

    op: str
    shape: str
    unit: str
    ours: Line | None
    peer: Line | None
    roof: float

    @property
    def of_roof(self) -> float | None:
        """Our share of what the machine can do, or that of the best other one; None where it is not known."""
        best = self.ours or self.peer
        return best.rate / self.roof if best is not None and self.roof else None

    @property
    def ratio(self) -> float | None:
        """Our rate over the best other one; None where either is missing."""
        return None if self.ours is None or self.peer is None else self.ours.rate / self.peer.rate


def compared(lines: Sequence[Line]) -> list[Row]:
    """A row for every op, shape and unit, in the order in which they were timed; roofs have none."""
    roofs = {
        unit: max([each.rate for each in lines if each.op == op], default=0.0) for unit, op in ROOFS.items()
    }
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line.op not in ROOFS.values():
            groups.setdefault((line.op, line.shape, line.unit), []).append(line)
    rows = []
    for (op, shape, unit), each in groups.items():
        ours = _best([line for line in each if line.implementation in OURS])
        peer = _best([line for line in each if line.implementation not in OURS])
        rows.append(Row(op, shape, unit, ours, peer, roofs[unit]))
    return rows


def _best(lines: Sequence[Line]) -> Line | None:
    return max(lines, key=lambda line: line.rate, default=None)
