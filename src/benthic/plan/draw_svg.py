"""A schedule as an SVG picture: a string that needs nothing else, readable on light and dark pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from benthic.plan.palette import INK, PAINTS, colour, kinds_in
from benthic.plan.schedule import number, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.simulate import Timed, Timeline
    from benthic.sched.pipeline.table import Action

_WIDTH: Final = 1080
_LEFT, _TOP = 76, 46
_ROW, _BAR = 30, 24
_CHARACTER: Final = 7.2
_STYLE: Final = (
    "text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2937}"
    ".title{font-size:16px;font-weight:600}"
    f".in{{fill:{INK};text-anchor:middle;dominant-baseline:central}}"
    ".rank{text-anchor:end;dominant-baseline:central}"
    ".tick{text-anchor:middle;fill:#6b7280}.idle{fill:#e5e7eb}.page{fill:#ffffff}"
    "@media (prefers-color-scheme:dark){text{fill:#e5e7eb}.in{fill:#fff}"
    ".idle{fill:#374151}.page{fill:#111827}}"
)


def draw_svg(timeline: Timeline) -> str:
    """Draw `timeline` as a whole SVG document; hovering over a slot names it with its times."""
    summary = summarise(timeline)
    bottom = _TOP + _ROW * timeline.table.ranks
    height = bottom + 96
    size = f'width="{_WIDTH}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {height}" role="img">'
    body = [
        opening,
        f"<title>{escape(summary.title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" {size}/>',
        f'<text class="title" x="{_LEFT}" y="28">{escape(summary.title)}</text>',
        *_rows(timeline),
        *_axis(timeline, bottom),
        *_legend(timeline, bottom + 42),
    ]
    for index, line in enumerate(summary.lines):
        body.append(f'<text x="{_LEFT}" y="{bottom + 66 + 18 * index}">{escape(line)}</text>')
    return "\n".join([*body, "</svg>"]) + "\n"


def _scale(timeline: Timeline) -> float:
    """Pixels per unit of cost."""
    return (_WIDTH - _LEFT - 24) / (timeline.makespan or 1)


def _rows(timeline: Timeline) -> Iterator[str]:
    scale = _scale(timeline)
    for rank, slots in enumerate(timeline.slots):
        top = _TOP + _ROW * rank
        yield f'<text class="rank" x="{_LEFT - 10}" y="{top + _BAR / 2:g}">rank {rank}</text>'
        width = timeline.makespan * scale
        yield f'<rect class="idle" x="{_LEFT}" y="{top}" width="{width:.2f}" height="{_BAR}" rx="2"/>'
        for timed in slots:
            yield from _slot(timed, top, scale)


def _slot(timed: Timed, top: float, scale: float) -> Iterator[str]:
    """One bar; an overlapped pair shares its height."""
    left, width = _LEFT + timed.start * scale, (timed.end - timed.start) * scale
    height = _BAR / len(timed.slot.actions)
    title = f"{timed.slot} from {number(timed.start)} to {number(timed.end)}"
    yield f"<g><title>{escape(title)}</title>"
    for index, action in enumerate(timed.slot.actions):
        yield from _bar(action, left, top + index * height, width, height)
    yield "</g>"


def _bar(action: Action, left: float, top: float, width: float, height: float) -> Iterator[str]:
    size = f'x="{left:.2f}" y="{top:g}" width="{max(width - 0.6, 0):.2f}" height="{height:g}"'
    yield f'<rect {size} rx="2" fill="{colour(action)}"/>'
    label = str(action.microbatch)
    if len(label) * _CHARACTER <= width and height >= 12:
        yield f'<text class="in" x="{left + width / 2:.2f}" y="{top + height / 2:g}">{label}</text>'


def _axis(timeline: Timeline, bottom: float) -> Iterator[str]:
    scale = _scale(timeline)
    for tick in range(5):
        time = timeline.makespan * tick / 4
        x = _LEFT + time * scale
        yield f'<text class="tick" x="{x:.2f}" y="{bottom + 14}">{number(time)}</text>'


def _legend(timeline: Timeline, y: float) -> Iterator[str]:
    x = float(_LEFT)
    present = kinds_in({action.kind for _, action in timeline.table.actions()})
    entries = [(PAINTS[kind].name, f'fill="{PAINTS[kind].even}"') for kind in present]
    for name, fill in (*entries, ("idle", 'class="idle"')):
        yield f'<rect x="{x:g}" y="{y - 11:g}" width="14" height="14" rx="2" {fill}/>'
        yield f'<text x="{x + 20:g}" y="{y:g}">{name}</text>'
        x += 44 + _CHARACTER * len(name)
