"""`benthic draw`: pictures of schedules."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads annotations at run time)
from typing import Annotated

import typer
from rich.console import Console

from benthic.plan.draw_svg import draw_svg
from benthic.plan.draw_text import draw_text
from benthic.sched.pipeline.check import check
from benthic.sched.pipeline.export import as_csv, perfetto
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.simulate import Costs, simulate

app = typer.Typer(help="Draw pipeline schedules.", no_args_is_help=True)


@app.callback()
def draw() -> None:
    """Draw pipeline schedules."""


@app.command()
def schedule(  # noqa: PLR0913, PLR0917 (one argument per option)
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BUILDERS)}.")],
    ranks: Annotated[int, typer.Option(help="Pipeline ranks.", min=1)] = 4,
    microbatches: Annotated[int, typer.Option(help="Microbatches a step.", min=1)] = 8,
    forward_cost: Annotated[float, typer.Option(help="Time of a forward, in any unit.", min=0)] = 1,
    backward_cost: Annotated[float, typer.Option(help="Time of a backward.", min=0)] = 2,
    transfer_cost: Annotated[float, typer.Option(help="Time from rank to rank.", min=0)] = 0,
    svg: Annotated[Path | None, typer.Option(help="Write the picture as SVG.")] = None,
    perfetto_json: Annotated[
        Path | None, typer.Option("--perfetto", help="Write a trace for ui.perfetto.dev (1 unit = 1 ms).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every action with its times as CSV.")] = None,
) -> None:
    """Draw a pipeline schedule with its bubble and its peak activations.

    Example: benthic draw schedule 1f1b --ranks 4 --microbatches 8 --svg 1f1b.svg
    """
    table = build(name, ranks, microbatches)
    check(table)
    costs = Costs(forward=forward_cost, backward=backward_cost, transfer=transfer_cost)
    timeline = simulate(table, costs)
    console = Console(highlight=False)
    console.print(
        draw_text(timeline, width=console.width, colours=console.color_system is not None), soft_wrap=True
    )
    for path, write in ((svg, draw_svg), (perfetto_json, perfetto), (csv, as_csv)):
        if path is not None:
            path.write_text(write(timeline), encoding="utf-8")
            console.print(f"wrote {path}", style="dim", markup=False, soft_wrap=True)
