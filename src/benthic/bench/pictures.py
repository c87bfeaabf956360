"""Pictures of a sweep: latency against offered rate, attainment and goodput against offered rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benthic.bench.scenario import Point
    from benthic.spec.objectives import Objectives

_BLUE: Final = "#1f6fb2"
_ORANGE: Final = "#d9822b"
_GREY: Final = "#8a8f98"
_FORMATS: Final = ("svg", "png")
_LINES: Final = {50.0: "-", 90.0: "--", 99.0: ":"}


def draw(
    points: Sequence[Point], objectives: Objectives | None, stem: Path, *, attainment: float
) -> list[Path]:
    """Write STEM_latency and, with targets, STEM_goodput, each as SVG and PNG.

    Runs without an offered rate (closed loops) and without a completed request have no place on the axis.
    """
    placed = sorted(
        (point for point in points if point.offered is not None and point.measures.completed),
        key=lambda point: point.offered or 0.0,
    )
    if not placed:
        return []
    written = _save(latency_figure(placed, objectives), stem.with_name(stem.name + "_latency"))
    if objectives is not None:
        figure = goodput_figure(placed, objectives, attainment=attainment)
        written += _save(figure, stem.with_name(stem.name + "_goodput"))
    return written


def latency_figure(points: Sequence[Point], objectives: Objectives | None) -> Figure:
    """TTFT (left) and TPOT (right) percentiles of every rate, with the targets as grey lines."""
    figure = _figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    bounds = (None, None) if objectives is None else (objectives.ttft_s, objectives.tpot_s)
    for axes, name, bound in zip((left, right), ("ttft", "tpot"), bounds, strict=True):
        for q, style in _LINES.items():
            if q in points[0].measures.spreads[name].percentiles:
                values = [point.measures.spreads[name].percentiles[q] * 1e3 for point in points]
                axes.plot(_rates(points), values, style, color=_BLUE, marker="o", ms=3, label=f"p{q:g}")
        if bound is not None:
            axes.axhline(bound * 1e3, color=_GREY, linewidth=1.0, label="target")
        axes.set_yscale("log")
        _tidy(axes, "offered rate (requests/s)", f"{name.upper()} (ms)")
        axes.legend(frameon=False)
    return figure


def goodput_figure(points: Sequence[Point], objectives: Objectives, *, attainment: float) -> Figure:
    """Share of requests that met every target (left axis), and how many a second did (right axis)."""
    figure = _figure(6.5, 4.0)
    axes = figure.add_subplot()
    shares = [100.0 * (point.measures.attainment or 0.0) for point in points]
    axes.plot(_rates(points), shares, color=_BLUE, marker="o", ms=3)
    axes.axhline(100.0 * attainment, color=_GREY, linewidth=1.0)
    axes.set_ylim(0.0, 103.0)
    _tidy(axes, "offered rate (requests/s)", f"requests that met {objectives} (%)")
    other = axes.twinx()
    other.plot(
        _rates(points),
        [point.measures.goodput or 0.0 for point in points],
        "--",
        color=_ORANGE,
        marker="s",
        ms=3,
    )
    other.set_ylabel("goodput (requests/s)", color=_ORANGE)
    other.set_ylim(bottom=0.0)
    other.spines[["top"]].set_visible(False)
    return figure


def _rates(points: Sequence[Point]) -> list[float]:
    return [point.offered or 0.0 for point in points]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.2, linewidth=0.6)


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in _FORMATS]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
