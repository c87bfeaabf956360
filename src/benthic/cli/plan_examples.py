"""`benthic plan examples`: numbers of lectures and papers, worked out anew."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Grid


def examples() -> None:
    """Print worked examples: formula, number, what the source prints, and where they disagree."""
    from benthic.plan.serving.examples import examples as serving_examples  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.training import examples as training  # noqa: PLC0415

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for name in ("what", "formula", "value", "printed", "source", "note"):
        grid.add_column(name, overflow="fold")
    for one in (*training.examples(), *serving_examples()):
        grid.add_row(one.topic, one.formula, one.value, one.printed, one.source, one.note)
    Console(highlight=False).print(grid)
