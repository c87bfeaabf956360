"""Schedules as one HTML page that needs no network: hover, zoom, and follow one microbatch."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Final

from benthic.plan.lanes import ROW, STYLE, Frame, axis, lanes
from benthic.plan.palette import legend
from benthic.plan.schedule import summarise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.simulate import Timeline

_WIDTH: Final = 1400
_LEFT: Final = 76


def draw_html(*timelines: Timeline) -> str:
    """Draw `timelines` below each other on one time axis, as a whole page.

    A slot under the pointer says its actions, rank, start and end; its microbatch is followed through all
    ranks, for good after a click. The wheel zooms, dragging moves, Escape shows everything again.
    """
    frame = Frame(_LEFT, _WIDTH - _LEFT - 24, max(timeline.makespan for timeline in timelines), live=True)
    title = escape("; ".join(summarise(timeline).title for timeline in timelines))
    static = resources.files("benthic.plan")
    style, script = ((static / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title}</title><style>{STYLE}{style}</style></head>",
            f'<body data-left="{_LEFT}" data-width="{frame.width:g}" data-until="{frame.until:.9g}">',
            *_controls(timelines),
            *(line for timeline in timelines for line in _panel(timeline, frame)),
            f'<div id="tip" role="status" hidden></div><script>{script}</script></body></html>',
        ]
    )


def _controls(timelines: tuple[Timeline, ...]) -> Iterator[str]:
    most = max(timeline.table.microbatches for timeline in timelines) - 1
    yield '<p class="bar"><label>follow microbatch '
    yield f'<input id="follow" type="number" min="0" max="{most}" placeholder="none"></label>'
    yield '<button id="closer">zoom in</button><button id="wider">zoom out</button>'
    yield '<button id="all">show all</button>'
    for paint, name in legend(timeline.table for timeline in timelines):
        yield f'<span class="key"><i style="background:{paint.even}"></i>{escape(name)}</span>'
    yield "</p>"


def _panel(timeline: Timeline, frame: Frame) -> Iterator[str]:
    summary = summarise(timeline)
    bottom = ROW * timeline.table.ranks
    yield f"<section><h2>{escape(summary.title)}</h2>"
    box = f'viewBox="0 0 {_WIDTH} {bottom + 20}" role="img" aria-label="{escape(summary.title)}"'
    yield f'<svg class="lanes" xmlns="http://www.w3.org/2000/svg" {box}>'
    yield from lanes(timeline, frame, 0)
    yield '<polyline class="path"/>'
    yield from axis(frame, bottom + 14)
    yield "</svg>"
    yield from (f"<p>{escape(line)}</p>" for line in summary.lines)
    yield "</section>"
