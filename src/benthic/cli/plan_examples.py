"""`benthic plan examples`: numbers of lectures and papers, worked out anew."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from benthic.plan.serving.examples import examples as serving_examples
from benthic.plan.training import examples as training


def examples() -> None:
    """Print worked examples: formula, number, what the source prints, and where they disagree."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for name in ("what", "formula", "value", "printed", "source", "note"):
        grid.add_column(name)
    for one in (*training.examples(), *serving_examples()):
        grid.add_row(one.topic, one.formula, one.value, one.printed, one.source, one.note)
    Console(highlight=False).print(grid)
