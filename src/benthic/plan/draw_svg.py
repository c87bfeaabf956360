"""Schedules as an SVG picture: a string that needs nothing else, readable on light and dark pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from benthic.plan.lanes import CHARACTER, ROW, STYLE, Frame, axis, lanes
from benthic.plan.palette import legend
from benthic.plan.schedule import summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benthic.sched.pipeline.simulate import Timeline

_WIDTH: Final = 1080
_LEFT, _TOP, _BELOW = 76, 46, 24
_LINE: Final = 18


def draw_svg(*timelines: Timeline) -> str:
    """Draw `timelines` below each other on one time axis, as a whole SVG document.

    Hovering over a slot names it with its times.
    """
    until = max(timeline.makespan for timeline in timelines)
    frame = Frame(_LEFT, _WIDTH - _LEFT - 24, until)
    body: list[str] = []
    y = 0
    for timeline in timelines:
        body += _panel(timeline, frame, y)
        y += _height(timeline)
    body += _legend(timelines, y + 14)
    y += 14 + _LINE * _rows_of_legend(timelines)
    title = escape("; ".join(summarise(timeline).title for timeline in timelines))
    size = f'width="{_WIDTH}" height="{y}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {y}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" {size}/>',
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def _height(timeline: Timeline) -> int:
    lines = len(summarise(timeline).lines)
    return _TOP + ROW * timeline.table.ranks + _BELOW + _LINE * lines + 10


def _panel(timeline: Timeline, frame: Frame, top: int) -> Iterator[str]:
    summary = summarise(timeline)
    bottom = top + _TOP + ROW * timeline.table.ranks
    yield f'<text class="title" x="{_LEFT}" y="{top + 28}">{escape(summary.title)}</text>'
    yield from lanes(timeline, frame, top + _TOP)
    yield from axis(frame, bottom + 14)
    for index, line in enumerate(summary.lines):
        yield f'<text x="{_LEFT}" y="{bottom + _BELOW + 14 + _LINE * index}">{escape(line)}</text>'


def _entries(timelines: Sequence[Timeline]) -> list[tuple[str, str]]:
    painted = legend(timeline.table for timeline in timelines)
    return [(name, f'fill="{paint.even}"') for paint, name in painted] + [("idle", 'class="idle"')]


def _places(timelines: Sequence[Timeline]) -> Iterator[tuple[str, str, float, int]]:
    """Name, fill, x and row of every entry of the legend."""
    x, row = float(_LEFT), 0
    for name, fill in _entries(timelines):
        width = 44 + CHARACTER * len(name)
        if x > _LEFT and x + width > _WIDTH:
            x, row = float(_LEFT), row + 1
        yield name, fill, x, row
        x += width


def _rows_of_legend(timelines: Sequence[Timeline]) -> int:
    return 1 + max(row for *_, row in _places(timelines))


def _legend(timelines: Sequence[Timeline], top: float) -> Iterator[str]:
    for name, fill, x, row in _places(timelines):
        y = top + _LINE * row
        yield f'<rect x="{x:g}" y="{y - 11:g}" width="14" height="14" rx="2" {fill}/>'
        yield f'<text x="{x + 20:g}" y="{y:g}">{escape(name)}</text>'
