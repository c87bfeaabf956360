"""How schedules are coloured and labelled, the same in the terminal, in SVG and in HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.sched.pipeline.table import Action, Kind, Table

    Look = tuple[Kind, int]


@dataclass(frozen=True)
class Paint:
    """Look of one kind of action: colours of even and odd microbatches, filler where there are none."""

    name: str
    even: str
    odd: str
    filler: str


PAINTS: Final[dict[Look, Paint]] = {
    ("F", 0): Paint("forward", "#2563eb", "#1e40af", "-"),
    ("F", 1): Paint("forward", "#8b5cf6", "#6d28d9", "."),
    ("B", 0): Paint("backward", "#059669", "#065f46", "="),
    ("B", 1): Paint("backward", "#65a30d", "#3f6212", "#"),
    ("I", 0): Paint("backward, input", "#0891b2", "#155e75", "+"),
    ("I", 1): Paint("backward, input", "#64748b", "#475569", "*"),
    ("W", 0): Paint("backward, weights", "#d97706", "#92400e", "~"),
    ("W", 1): Paint("backward, weights", "#db2777", "#9d174d", "^"),
}
INK: Final = "#ffffff"


def look(table: Table, action: Action) -> Look:
    """Kind, and 0 or 1: which of two ways a microbatch goes, or which of a rank's stages in turn it meets."""
    if len(table.routes) > 1:
        return action.kind, table.route_of[action.microbatch] % 2
    return action.kind, action.stage // table.ranks % 2


def colour(table: Table, action: Action) -> str:
    """Neighbouring microbatches differ in shade, so that their borders show."""
    paint = PAINTS[look(table, action)]
    return paint.odd if action.microbatch % 2 else paint.even


def legend(tables: Iterable[Table]) -> tuple[tuple[Paint, str], ...]:
    """The paints that occur in `tables`, each with its name, in order."""
    names: dict[Look, str] = {}
    for table in tables:
        other = "other way" if len(table.routes) > 1 else "other stage"
        for found in {look(table, action) for _, action in table.actions()}:
            name = PAINTS[found].name
            names.setdefault(found, f"{name}, {other}" if found[1] else name)
    return tuple((PAINTS[found], names[found]) for found in PAINTS if found in names)
