"""Draws fleets: attainment over the rate, and goodput over the target of a token, measured and foretold.

    python benchmarks/fleet_curves.py   # of disaggregate.json and plan_fleets.json

Writes docs/pictures/fleets.svg and .png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parent))

from provenance import RESULTS

from benthic.train.pictures import new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEM: Final = Path(__file__).parents[1] / "docs" / "pictures" / "fleets"
COLOURS: Final = {"1P1D": "#1f6fb2", "2 colocated": "#d9822b"}
GPUS: Final = 2
LENGTHS: Final = {
    "prefill-heavy": "prefill-heavy: 4,096 in, 64 out",
    "balanced": "balanced: 2,048 in, 256 out",
    "decode-heavy": "decode-heavy: 512 in, 512 out",
}


def main() -> None:
    """Both rows of every workload."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "plan_fleets.json").read_text())["rows"]
    figure = new_figure(12.0, 6.4)
    axes = figure.subplots(2, len(LENGTHS))
    for column, (workload, title) in enumerate(LENGTHS.items()):
        own = [row for row in rows if row.get("workload") == workload]
        attainments(axes[0][column], own)
        goodputs(axes[1][column], next(row for row in own if "measured_by_tpot_ms" in row))
        axes[0][column].set_title(title, fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=8)
    print(*save(figure, STEM))


def attainments(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Share of requests that met both targets at each rate."""
    for fleet, colour in COLOURS.items():
        points = sorted((r["rate"] / GPUS, *r["attainment"]) for r in rows if r.get("fleet") == fleet)
        rates, foretold, measured = zip(*points, strict=True)
        axes.plot(rates, measured, "o-", color=colour, label=f"{fleet}, measured", markersize=4)
        axes.plot(rates, foretold, "--", color=colour, label=f"{fleet}, foretold", linewidth=1)
    axes.axhline(0.9, color="#8a8f98", linewidth=0.8)
    axes.set_ylim(0, 1.05)
    tidy(axes, "requests/s a GPU", "meet both targets")


def goodputs(axes: Axes, row: dict[str, Any]) -> None:
    """What a GPU bears at 90 % attainment, by the target of a token."""
    for fleet, colour in COLOURS.items():
        for side, line in (("measured", "o-"), ("foretold", "--")):
            found = {float(tpot): each[fleet] for tpot, each in row[f"{side}_by_tpot_ms"].items()}
            axes.plot(
                *zip(*sorted(found.items()), strict=True), line, color=colour, markersize=4, linewidth=1
            )
    axes.set_ylim(bottom=0)
    tidy(axes, "ms a token at most", "goodput, requests/s a GPU")


if __name__ == "__main__":
    main()
