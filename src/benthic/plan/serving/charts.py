"""Curves and stacked bars as SVG, readable on light and dark pages; everything has a title to hover over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#db2777", "#8b5cf6", "#0891b2", "#65a30d", "#64748b")
STYLE: Final = (
    ".chart text{font:12px ui-sans-serif,system-ui,sans-serif;fill:currentColor}"
    ".chart .axis{stroke:currentColor;stroke-opacity:.45}.chart .rule{stroke:currentColor;stroke-opacity:.14}"
    ".chart .mark{stroke:#dc2626;stroke-dasharray:5 4}.chart .end{text-anchor:end}"
    ".chart .mid{text-anchor:middle}"
)
_WIDTH, _HEIGHT = 620, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44


class Point(NamedTuple):
    """A place on a curve and what is said of it."""

    x: float
    y: float
    title: str


class Curve(NamedTuple):
    """Points in order of x."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class _Frame:
    """Scales from values to pixels; both axes begin at 0."""

    x_most: float
    y_most: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.x_most * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.y_most * (_HEIGHT - _TOP - _BOTTOM)


def curves(lines: Sequence[Curve], *, x_name: str, y_name: str, mark_y: float | None = None) -> str:
    """Curves with a dot for every point; `mark_y` draws a line that is to be reached."""
    places = [point for line in lines for point in line.points]
    frame = _Frame(_nice(max([p.x for p in places])), _nice(max([p.y for p in places] + [mark_y or 0.0])))
    label = escape(f"{y_name} over {x_name}")
    body = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    body += _axes(frame, x_name, y_name)
    if mark_y is not None:
        y = frame.y(mark_y)
        body.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for index, line in enumerate(lines):
        body += _line(line, frame, COLOURS[index % len(COLOURS)])
    return "".join([*body, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Colours of curves or parts, in order."""
    keys = [
        f'<span class="key"><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    ]
    return f'<p class="keys">{"".join(keys)}</p>'


def bar(parts: Sequence[tuple[str, float]], *, unit: str) -> str:
    """One bar, cut in proportion; a part's title says its name and value in `unit`."""
    whole = sum([value for _, value in parts])
    body = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} 34" role="img" aria-label="parts of {whole:.4g} {unit}">'
    ]
    x = 0.0
    for index, (name, value) in enumerate(parts):
        width = value / whole * _WIDTH
        title = escape(f"{name}: {value:.3g} {unit}, {100 * value / whole:.0f}%")
        colour = COLOURS[index % len(COLOURS)]
        body.append(
            f'<rect x="{x:.1f}" y="2" width="{max(width - 1, 0):.1f}" height="30" rx="2" fill="{colour}">'
            f"<title>{title}</title></rect>"
        )
        x += width
    return "".join([*body, "</svg>"])


def _axes(frame: _Frame, x_name: str, y_name: str) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in range(5):
        value = frame.y_most * tick / 4
        y = frame.y(value)
        yield f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{value:.3g}</text>'
        value = frame.x_most * tick / 4
        yield f'<text class="mid" x="{frame.x(value):.1f}" y="{bottom + 17}">{value:.3g}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>'
    yield f'<text class="mid" x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 8}">{escape(x_name)}</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text class="mid" transform="translate(14 {middle:g}) rotate(-90)">{escape(y_name)}</text>'


def _line(line: Curve, frame: _Frame, colour: str) -> Iterator[str]:
    path = " ".join([f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in line.points])
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for point in line.points:
        yield (
            f'<circle cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}" r="4" fill="{colour}">'
            f"<title>{escape(f'{line.name}: {point.title}')}</title></circle>"
        )


def _nice(value: float) -> float:
    """The next round number: 1, 2, 4, 5 or 8 times a power of ten."""
    if not 0.0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
