"""A schedule as lines of a terminal: one row per rank, time to the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.text import Text

from benthic.plan.palette import INK, PAINTS, colour, legend, look
from benthic.plan.schedule import summarise

if TYPE_CHECKING:
    from benthic.plan.palette import Look
    from benthic.sched.pipeline.simulate import Timed, Timeline
    from benthic.sched.pipeline.table import Action, Table

_WIDEST_UNIT: Final = 4
_NARROWEST: Final = 10


def draw_text(timeline: Timeline, *, width: int, colours: bool, until: float | None = None) -> Text:
    """Draw `timeline` in at most `width` columns, with title, legend and figures.

    Without colours each kind has its own filler, so that the picture also reads in a file. Slots carry the
    number of their microbatch where there is room for it. The rows end at time `until`, by default the
    makespan, so that pictures below each other can share their scale.
    """
    summary = summarise(timeline)
    until = max(until or 0, timeline.makespan)
    label = len(f"rank {timeline.table.ranks - 1} ")
    columns = _columns(until, max(width - label, _NARROWEST))
    scale = columns / (until or 1)
    pen = _Pen(timeline.table, colours, _numbered(timeline, scale))
    text = Text(no_wrap=True)
    text.append(f"{summary.title}\n", style="bold")
    for rank, slots in enumerate(timeline.slots):
        text.append(f"rank {rank}".ljust(label), style="dim")
        text.append_text(_row(slots, scale, columns, pen))
        text.append("\n")
    text.append_text(_legend(timeline, pen, width))
    for line in summary.lines:
        text.append(f"\n{line}")
    return text


def _columns(until: float, available: int) -> int:
    """Columns for the whole time: a whole number per unit of cost if units fit, else all there are."""
    per_unit = int(available // until) if until else 0
    if per_unit < 1 or until != int(until):
        return available
    return int(until) * min(per_unit, _WIDEST_UNIT)


@dataclass(frozen=True)
class _Pen:
    """How actions look: with colours or fillers, and which kinds carry the number of their microbatch."""

    table: Table
    colours: bool
    numbered: frozenset[Look]

    def cell(self, action: Action, width: int) -> Text:
        """One action, `width` columns wide."""
        found = look(self.table, action)
        label = str(action.microbatch) if found in self.numbered else ""
        if self.colours:
            return Text(label.ljust(width), style=f"{INK} on {colour(self.table, action)}")
        return Text(label.ljust(width, PAINTS[found].filler))


def _numbered(timeline: Timeline, scale: float) -> frozenset[Look]:
    """Looks whose every slot has room for its number, and for a gap where columns are no whole units."""
    spare = 0 if scale >= 1 and scale == int(scale) else 1
    cramped: set[Look] = set()
    for timed in (timed for slots in timeline.slots for timed in slots):
        start, end = round(timed.start * scale), round(timed.end * scale)
        room = (end - start) // len(timed.slot.actions)
        long = (a for a in timed.slot.actions if len(str(a.microbatch)) + spare > room)
        cramped.update(look(timeline.table, action) for action in long)
    return frozenset(PAINTS.keys() - cramped)


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


def _legend(timeline: Timeline, pen: _Pen, width: int) -> Text:
    """Samples of the paints, in as many lines as they need."""
    looks = {look(timeline.table, action) for _, action in timeline.table.actions()}
    entries = [
        (Text("  ", style=f"on {paint.even}") if pen.colours else Text(paint.filler * 2)).append(
            f" {name}   "
        )
        for paint, name in legend([timeline.table])
    ]
    entries.append(Text("blank: idle; number: microbatch" if pen.numbered & looks else "blank: idle"))
    lines = [Text()]
    for entry in entries:
        if lines[-1].plain and len(lines[-1]) + len(entry.plain.rstrip()) > width:
            lines[-1].rstrip()
            lines.append(Text())
        lines[-1].append_text(entry)
    return Text("\n").join(lines)
