"""How schedules are coloured and labelled, the same in the terminal and in SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benthic.sched.pipeline.table import Action, Kind


@dataclass(frozen=True)
class Paint:
    """Look of one kind of action: colours of even and odd microbatches, filler where there are none."""

    name: str
    even: str
    odd: str
    filler: str


PAINTS: Final[dict[Kind, Paint]] = {
    "F": Paint("forward", "#2563eb", "#1e40af", "-"),
    "B": Paint("backward", "#059669", "#065f46", "="),
    "I": Paint("backward, input", "#0891b2", "#155e75", "+"),
    "W": Paint("backward, weights", "#d97706", "#92400e", "~"),
}
INK: Final = "#ffffff"


def colour(action: Action) -> str:
    """Neighbouring microbatches differ in shade, so that their borders show."""
    paint = PAINTS[action.kind]
    return paint.odd if action.microbatch % 2 else paint.even


def kinds_in(actions: set[Kind]) -> tuple[Kind, ...]:
    """The kinds that occur, in the order of the legend."""
    return tuple(kind for kind in PAINTS if kind in actions)
