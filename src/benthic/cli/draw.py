"""`benthic draw`: pictures of schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benthic.errors import ConfigError
from benthic.plan.compare import side_by_side, simulate_share
from benthic.plan.draw_html import draw_html
from benthic.plan.draw_svg import draw_svg
from benthic.plan.draw_text import draw_text
from benthic.sched.pipeline.check import check
from benthic.sched.pipeline.export import as_csv, perfetto
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.sched.pipeline.spans import measured, median_costs, read_spans
from benthic.sched.pipeline.table_csv import read_table, torch_csv, write_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.sched.pipeline.simulate import Timeline
    from benthic.sched.pipeline.spans import Span
    from benthic.sched.pipeline.table import Table

app = typer.Typer(help="Draw and compare pipeline schedules.", no_args_is_help=True)

_NAMES = ", ".join(BUILDERS)
Ranks = Annotated[int, typer.Option(help="Pipeline ranks.", min=1)]
Microbatches = Annotated[int, typer.Option(help="Microbatches a step.", min=1)]
VirtualStages = Annotated[
    int | None, typer.Option(help="Stages a rank, for interleaved.", min=1, show_default="2")
]
Forward = Annotated[
    float | None, typer.Option(help="Time of a forward, in any unit.", min=0, show_default="1")
]
Backward = Annotated[float | None, typer.Option(help="Time of a whole backward.", min=0, show_default="2")]
Input = Annotated[
    float | None, typer.Option(help="Time of a backward to the input alone.", min=0, show_default="half")
]
Weight = Annotated[
    float | None, typer.Option(help="Time of the weights' part.", min=0, show_default="the rest")
]
Overlap = Annotated[
    float | None,
    typer.Option(help="Time of a forward overlapped with a backward.", min=0, show_default="sum"),
]
Transfer = Annotated[float | None, typer.Option(help="Time from rank to rank.", min=0, show_default="0")]
Svg = Annotated[Path | None, typer.Option(help="Write the picture as SVG.")]
Html = Annotated[Path | None, typer.Option(help="Write an interactive page that needs no network.")]


@app.callback()
def draw() -> None:
    """Draw and compare pipeline schedules."""


@app.command()
def schedule(  # noqa: PLR0913, PLR0917 (one argument per option)
    name: Annotated[str, typer.Argument(help=f"One of: {_NAMES}; or a table's .csv file.")],
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    virtual_stages: VirtualStages = None,
    forward_cost: Forward = None,
    backward_cost: Backward = None,
    input_cost: Input = None,
    weight_cost: Weight = None,
    overlap_cost: Overlap = None,
    transfer_cost: Transfer = None,
    measured_spans: Annotated[
        list[Path] | None,
        typer.Option(
            "--measured",
            help="Spans of a run, a file or one a rank: draw it below what its median times predict.",
        ),
    ] = None,
    svg: Svg = None,
    html: Html = None,
    perfetto_json: Annotated[
        Path | None,
        typer.Option(
            "--perfetto",
            help="Write a trace for ui.perfetto.dev (1 unit = 1 ms; a measured run is in seconds).",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every action with its times as CSV.")] = None,
    table_csv: Annotated[
        Path | None, typer.Option("--table", help="Write the table as CSV, to edit and draw again.")
    ] = None,
    torch: Annotated[
        Path | None, typer.Option(help="Write CSV that torch's _PipelineScheduleRuntime loads.")
    ] = None,
) -> None:
    """Draw a pipeline schedule with its bubble and its peak activations.

    Example: benthic draw schedule dualpipe --ranks 8 --microbatches 20 --overlap-cost 2.5 --svg a.svg
    """
    table = _table(name, ranks, microbatches, virtual_stages)
    check(table)
    costs = _costs(forward_cost, backward_cost, input_cost, weight_cost, overlap_cost, transfer_cost)
    if measured_spans:
        spans = read_spans("\n".join(path.read_text(encoding="utf-8") for path in measured_spans))
        timelines = predicted_and_measured(table, spans, costs)
    else:
        timelines = [simulate(table, costs or Costs())]
    console = Console(highlight=False)
    _print(console, timelines)
    _write(console, svg, lambda: draw_svg(*timelines))
    _write(console, html, lambda: draw_html(*timelines))
    _write(console, perfetto_json, lambda: perfetto(*timelines, microseconds=1e6 if measured_spans else 1e3))
    _write(console, csv, lambda: as_csv(timelines[-1]))
    _write(console, table_csv, lambda: write_table(table))
    _write(console, torch, lambda: torch_csv(table))


@app.command()
def compare(  # noqa: PLR0913, PLR0917 (one argument per option)
    names: Annotated[list[str], typer.Argument(help=f"Any of: {_NAMES}; or tables' .csv files.")],
    ranks: Ranks = 4,
    microbatches: Microbatches = 8,
    virtual_stages: VirtualStages = None,
    forward_cost: Forward = None,
    backward_cost: Backward = None,
    input_cost: Input = None,
    weight_cost: Weight = None,
    overlap_cost: Overlap = None,
    transfer_cost: Transfer = None,
    svg: Svg = None,
    html: Html = None,
) -> None:
    """Compare schedules of one model on the same ranks and microbatches.

    Costs are those of a rank's share of the model, 1/ranks, in however many stages a rank holds it. Peak
    activations count microbatches on such a share.

    Example: benthic draw compare 1f1b zb-h1 dualpipe --ranks 8 --microbatches 20 --html schedules.html
    """
    costs = _costs(forward_cost, backward_cost, input_cost, weight_cost, overlap_cost, transfer_cost)
    timelines = []
    for name in names:
        takes_any = name not in BUILDERS or BUILDERS[name].virtual_stages is None
        table = _table(name, ranks, microbatches, virtual_stages if takes_any else None)
        check(table)
        timelines.append(simulate_share(table, costs or Costs()))
    console = Console(highlight=False)
    console.print(side_by_side(timelines))
    _write(console, svg, lambda: draw_svg(*timelines))
    _write(console, html, lambda: draw_html(*timelines))


def _table(name: str, ranks: int, microbatches: int, virtual_stages: int | None) -> Table:
    """A table from its file if the name looks like one, else built."""
    if Path(name).suffix == ".csv":
        return read_table(Path(name).read_text(encoding="utf-8"))
    return build(name, ranks, microbatches, virtual_stages=virtual_stages)


def _costs(
    forward: float | None,
    backward: float | None,
    input_: float | None,
    weight: float | None,
    overlap: float | None,
    transfer: float | None,
) -> Costs | None:
    """Costs as asked for; None if none were.

    Raises:
        ConfigError: one is not finite, or a part of the backward costs more than the whole of it.
    """
    named = {
        "forward": forward, "backward": backward, "input": input_,
        "weight": weight, "overlap": overlap, "transfer": transfer,
    }  # fmt: skip
    for name, cost in named.items():
        if cost is not None and not math.isfinite(cost):
            message = f"--{name}-cost {cost} cannot be drawn. Give a finite cost."
            raise ConfigError(message)
    if set(named.values()) == {None}:
        return None
    whole = 2.0 if backward is None else backward
    for name, part, rest in (("input", input_, weight), ("weight", weight, input_)):
        if part is not None and rest is None and part > whole:
            message = (
                f"--{name}-cost {part} is more than the whole backward's {whole}. "
                f"Raise --backward-cost, or lower --{name}-cost."
            )
            raise ConfigError(message)
    return Costs(
        forward=1.0 if forward is None else forward,
        backward=whole,
        input=input_,
        weight=weight,
        overlap=None if overlap is None else lambda _forward, _backward: overlap,
        transfer=0.0 if transfer is None else transfer,
    )


def predicted_and_measured(table: Table, spans: Sequence[Span], costs: Costs | None = None) -> list[Timeline]:
    """The run, below the same table simulated with `costs` in seconds, else with the run's medians."""
    run = measured(table, spans)
    predicted = simulate(table, costs or median_costs(run))
    return [_renamed(predicted, "predicted"), _renamed(run, "measured")]


def _renamed(timeline: Timeline, word: str) -> Timeline:
    return replace(timeline, table=replace(timeline.table, name=f"{timeline.table.name}, {word}"))


def _print(console: Console, timelines: Sequence[Timeline]) -> None:
    until = max(timeline.makespan for timeline in timelines)
    colours = console.color_system is not None
    for timeline in timelines:
        picture = draw_text(timeline, width=console.width, colours=colours, until=until)
        console.print(picture, soft_wrap=True)


def _write(console: Console, path: Path | None, text: Callable[[], str]) -> None:
    if path is not None:
        path.write_text(text(), encoding="utf-8")
        console.print(f"wrote {path}", style="dim", markup=False, soft_wrap=True)
