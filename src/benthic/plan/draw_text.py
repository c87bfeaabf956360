"""A schedule as lines of a terminal: one row per rank, time to the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.text import Text

from benthic.plan.palette import INK, PAINTS, colour, kinds_in
from benthic.plan.schedule import summarise

if TYPE_CHECKING:
    from benthic.sched.pipeline.simulate import Timed, Timeline
    from benthic.sched.pipeline.table import Action, Kind

_WIDEST_UNIT: Final = 4
_NARROWEST: Final = 10


def draw_text(timeline: Timeline, *, width: int, colours: bool) -> Text:
    """Draw `timeline` in at most `width` columns, with title, legend and figures.

    Without colours each kind has its own filler, so that the picture also reads in a file. Slots carry the
    number of their microbatch where there is room for it.
    """
    summary = summarise(timeline)
    label = len(f"rank {timeline.table.ranks - 1} ")
    columns = _columns(timeline, max(width - label, _NARROWEST))
    scale = columns / (timeline.makespan or 1)
    pen = _Pen(colours, _numbered(timeline, scale))
    text = Text(no_wrap=True)
    text.append(f"{summary.title}\n", style="bold")
    for rank, slots in enumerate(timeline.slots):
        text.append(f"rank {rank}".ljust(label), style="dim")
        text.append_text(_row(slots, scale, columns, pen))
        text.append("\n")
    text.append_text(_legend(timeline, pen))
    for line in summary.lines:
        text.append(f"\n{line}")
    return text


def _columns(timeline: Timeline, available: int) -> int:
    """Columns for the whole time: a whole number per unit of cost if units fit, else all there are."""
    per_unit = int(available // timeline.makespan) if timeline.makespan else 0
    if per_unit < 1 or timeline.makespan != int(timeline.makespan):
        return available
    return int(timeline.makespan) * min(per_unit, _WIDEST_UNIT)


@dataclass(frozen=True)
class _Pen:
    """How actions look: with colours or fillers, and which kinds carry the number of their microbatch."""

    colours: bool
    numbered: frozenset[Kind]

    def cell(self, action: Action, width: int) -> Text:
        """One action, `width` columns wide."""
        label = str(action.microbatch) if action.kind in self.numbered else ""
        if self.colours:
            return Text(label.ljust(width), style=f"{INK} on {colour(action)}")
        return Text(label.ljust(width, PAINTS[action.kind].filler))


def _numbered(timeline: Timeline, scale: float) -> frozenset[Kind]:
    """Kinds whose every slot has room for its number, and for a gap where columns are no whole units."""
    spare = 0 if scale >= 1 and scale == int(scale) else 1
    cramped: set[Kind] = set()
    for timed in (timed for slots in timeline.slots for timed in slots):
        start, end = round(timed.start * scale), round(timed.end * scale)
        room = (end - start) // len(timed.slot.actions)
        cramped |= {a.kind for a in timed.slot.actions if len(str(a.microbatch)) + spare > room}
    return frozenset(kind for kind in PAINTS if kind not in cramped)


def _row(slots: tuple[Timed, ...], scale: float, columns: int, pen: _Pen) -> Text:
    row, at = Text(), 0
    for timed in slots:
        start, end = round(timed.start * scale), round(timed.end * scale)
        row.append(" " * (start - at))
        middle = (start + end) // 2 if timed.slot.second else end
        row.append_text(pen.cell(timed.slot.first, middle - start))
        if timed.slot.second:
            row.append_text(pen.cell(timed.slot.second, end - middle))
        at = end
    row.append(" " * (columns - at))
    return row


def _legend(timeline: Timeline, pen: _Pen) -> Text:
    legend = Text()
    present = {action.kind for _, action in timeline.table.actions()}
    for kind in kinds_in(present):
        paint = PAINTS[kind]
        sample = Text("  ", style=f"on {paint.even}") if pen.colours else Text(paint.filler * 2)
        legend.append_text(sample).append(f" {paint.name}   ")
    return legend.append("blank: idle; number: microbatch" if pen.numbered & present else "blank: idle")
