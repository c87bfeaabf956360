"""Schedules side by side: the same model, ranks and microbatches, cut and ordered in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table as Grid

from benthic import units
from benthic.plan.schedule import number, summarise
from benthic.sched.pipeline.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.sched.pipeline.simulate import Costs, Timeline
    from benthic.sched.pipeline.table import Table

_COLUMNS = ("makespan", "bubble", "idle", "peak activations", "parameters")


def simulate_share(table: Table, costs: Costs) -> Timeline:
    """Simulate `table` with the costs of a rank's share of the model, 1/ranks, in however many stages."""
    return simulate(table, costs.scaled(table.ranks / table.stages))


def side_by_side(timelines: Iterable[Timeline]) -> Grid:
    """One line a schedule; activations in microbatches on, and parameters in multiples of, a rank's share."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("schedule")
    for name in _COLUMNS:
        grid.add_column(name, justify="right")
    for timeline in timelines:
        summary = summarise(timeline)
        grid.add_row(
            timeline.table.name,
            number(summary.makespan),
            units.percent(summary.bubble),
            number(summary.idle),
            number(float(summary.peak)),
            f"{number(float(summary.copies))}x",
        )
    return grid
