"""Pictures of a run: loss over steps, load of every expert, and how far the fullest is above the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benthic.train.records import EVALUATIONS, LOADS, METRICS, Records

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_BLUE: Final = "#1f6fb2"
_ORANGE: Final = "#d9822b"
_GREY: Final = "#8a8f98"
_SMOOTHING: Final = 0.12
_FORMATS: Final = ("svg", "png")


def draw(folder: Path) -> list[Path]:
    """Draw what the run folder's records hold: `loss` and, with experts, `experts`, each as SVG and PNG."""
    records = Records(folder)
    metrics, evaluations = records.read(METRICS), records.read(EVALUATIONS)
    if not metrics:
        return []
    written = save(loss_figure(metrics, evaluations), folder / "loss")
    loads = records.read(LOADS)
    if loads and loads[-1]["counts"]:
        written += save(expert_figure(metrics, loads), folder / "experts")
    return written


def loss_figure(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Figure:
    """Main and MTP loss of every step, thin and smoothed, with the held-out loss as dots."""
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    steps = [line["step"] for line in metrics]
    _curve(axes, steps, [line["loss"] for line in metrics], _BLUE, "next token")
    for depth in range(len(metrics[-1]["mtp_loss"])):
        label = f"MTP depth {depth + 1}"
        _curve(axes, steps, [line["mtp_loss"][depth] for line in metrics], _ORANGE, label)
    if evaluations:
        at, losses = [e["step"] for e in evaluations], [e["loss"] for e in evaluations]
        axes.plot(at, losses, "o", color="black", markersize=5, label="held-out documents")
        text, end = f"{evaluations[-1]['bits_per_byte']:.3f} bits/byte", (at[-1], losses[-1])
        axes.annotate(text, end, (-6, -14), textcoords="offset points", ha="right")
    tidy(axes, "step", "loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def expert_figure(metrics: Sequence[Mapping[str, Any]], loads: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: each expert's load over its layer's mean, last quarter of the run. Right: MaxVio of each step."""
    figure = new_figure(10.5, 4.2)
    heat, curve = figure.subplots(1, 2, width_ratios=[1.2, 1])
    layers = list(loads[-1]["counts"])
    share_LE = relative_loads(loads[-max(1, len(loads) // 4) :], layers)
    image = heat.imshow(share_LE, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
    heat.set_yticks(range(len(layers)), layers)
    heat.set(xlabel="expert", ylabel="layer", title="load / mean, last quarter")
    figure.colorbar(image, ax=heat, extend="max")
    steps = [line["step"] for line in metrics]
    for row, layer in enumerate(layers):
        colour = (0.12, 0.44, 0.70, 0.35 + 0.65 * row / max(1, len(layers) - 1))
        curve.plot(
            steps, smooth([m["max_vio"][layer] for m in metrics]), color=colour, label=f"layer {layer}"
        )
    tidy(curve, "step", "MaxVio of one step")
    curve.set_ylim(bottom=0.0)
    if len(layers) <= 8:
        curve.legend(frameon=False, fontsize=8)
    return figure


def relative_loads(loads: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> NDArray[np.float64]:
    """Tokens of each expert over the mean of its layer, summed over the records: [layers, experts]."""
    count_LE = np.array(
        [np.sum([line["counts"][layer] for line in loads], axis=0) for layer in layers], float
    )
    return count_LE / np.maximum(count_LE.mean(1, keepdims=True), 1e-9)


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """An exponential average without the bias of its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total = (1.0 - _SMOOTHING) * total + _SMOOTHING * value
        weight = (1.0 - _SMOOTHING) * weight + _SMOOTHING
        out.append(total / weight)
    return np.array(out)


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, x: str, y: str) -> None:
    """Name the axes, drop the frame, draw a faint grid."""
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GREY, alpha=0.2, linewidth=0.6)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as SVG and PNG."""
    paths = [stem.with_suffix(f".{kind}") for kind in _FORMATS]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths


def _curve(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
