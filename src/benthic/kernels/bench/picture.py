"""How near every op comes to what the machine can do, as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benthic.kernels.bench.table import Row

OURS: Final = "#1f6fb2"
OTHERS: Final = "#d9822b"
LINE_INCHES: Final = 0.28


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Write the bars of all rows that have a roof; the format is that of the file's ending."""
    shown = [row for row in rows if row.of_roof]
    figure = Figure(figsize=(10.0, 1.2 + LINE_INCHES * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, row in enumerate(shown):
        for line, color, offset in ((row.ours, OURS, -0.2), (row.peer, OTHERS, 0.2)):
            if line is not None:
                axes.barh(place + offset, 100 * line.rate / row.roof, height=0.38, color=color)
    axes.set_yticks(range(len(shown)), [f"{row.op}, {row.shape}" for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100.0, color="#8a8f98", linewidth=1.0)
    axes.set_xlabel("% of a copy (TB/s) or of a product (TFLOP/s) in the same run; ours blue, others orange")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    return path
