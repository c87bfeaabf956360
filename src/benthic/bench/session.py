"""One command: connect, warm up, run every rate or search, print, write."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benthic.bench import inputs, pictures, report
from benthic.bench.client import connect
from benthic.bench.crew import shared
from benthic.bench.load import Load
from benthic.bench.provenance import provenance
from benthic.bench.scenario import Point, Scenario, Sweep
from benthic.bench.search import Found, Search, find_goodput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from benthic.bench.client import Client, Target
    from benthic.spec.objectives import Objectives

NOTHING_COMPLETED = 1
CLIENT_LIMITED = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. `target.model` is empty until the server has named its models.

    `rates` are those of the runs (None: a trace as recorded, inf: closed loop); `search`, where given,
    chooses the rates instead. `clients` processes share the requests of a run.
    """

    target: Target
    inputs: inputs.Inputs
    rates: tuple[float | None, ...]
    burstiness: float
    max_concurrency: int | None
    clients: int
    min_duration_s: float
    warmups: int
    objectives: Objectives | None
    search: Search | None
    percentiles: tuple[float, ...]
    max_lag_s: float


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go: `result` a JSON file, `plot` the beginning of the pictures' names."""

    result: Path | None
    detailed: bool
    plot: Path | None
    attainment: float
    command: tuple[str, ...]


async def run(
    settings: Settings,
    output: Output,
    console: Console,
    *,
    clock: Callable[[], float],
    wall: Callable[[], float],
) -> list[Point]:
    """Measure, print and write; what was measured before an error or Ctrl-C is still written.

    Raises:
        ServeError: the server is not there, refuses the warm-up, or a search outran this client.
    """
    async with connect(settings.target, clock) as client:
        served = await inputs.served_model(client, settings.target.model or None)
        server = {"model": served.name, "version": await inputs.server_version(client)}
    settings = replace(settings, target=replace(settings.target, model=served.name))
    workload = settings.inputs.workload(served, as_text=settings.target.api == "openai-chat")
    console.print(f"[bold]{served.name}[/] at {settings.target.url}, {settings.inputs.dataset} prompts")
    if workload.dropped:
        console.print(
            f"[yellow]{workload.dropped} requests of the trace are longer than the server's "
            f"{served.max_model_len} tokens and are left out[/]"
        )
    points: list[Point] = []
    found: Found | None = None
    try:
        async with connect(settings.target, clock) as client:
            found = await _measure(settings, workload, client, console, points, clock)
    finally:
        _write(settings, output, points, found, server, wall(), console)
    return points


def status(points: Sequence[Point]) -> int:
    """The exit status: 3 when this client spoiled a run, 1 when a run completed nothing, else 0."""
    if any(point.spoiled for point in points):
        return CLIENT_LIMITED
    return NOTHING_COMPLETED if any(not point.measures.completed for point in points) else 0


async def _measure(
    settings: Settings,
    workload: inputs.Workload,
    client: Client,
    console: Console,
    points: list[Point],
    clock: Callable[[], float],
) -> Found | None:
    """Every rate, or a search; each point is printed and kept as it comes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar,
        ExitStack() as held,
    ):
        task = bar.add_task("warming up", total=settings.warmups)

        def started(rate: float | None, count: int) -> None:
            bar.reset(task, total=count, description=_rate_text(rate))

        def ended(point: Point) -> None:
            points.append(point)
            _print(point, settings, console)

        def answered(count: int) -> None:
            bar.advance(task, count)

        alone = Load(
            send=client.send, clock=clock, max_concurrency=settings.max_concurrency, on_done=answered
        )
        load = held.enter_context(shared(alone, settings.target, settings.clients))
        sweep = Sweep(
            scenario=Scenario(
                source=workload.source,
                count=workload.count,
                trace=workload.trace,
                min_duration_s=settings.min_duration_s,
                burstiness=settings.burstiness,
                seed=settings.inputs.seed,
            ),
            load=load,
            objectives=settings.objectives,
            percentiles=settings.percentiles,
            max_lag_s=settings.max_lag_s,
            on_start=started,
            on_point=ended,
        )
        await sweep.warm_up(settings.warmups)
        if settings.search is None:
            for rate in settings.rates:
                await sweep.at(rate)
            return None
        found = await _search(sweep, settings.search)
    console.print(_found_text(found, settings))
    return found


async def _search(sweep: Sweep, search: Search) -> Found:
    async def trial(rate: float) -> Any:
        return (await sweep.at(rate)).trial

    return await find_goodput(trial, search)


def _print(point: Point, settings: Settings, console: Console) -> None:
    console.print(f"\n[bold]{_rate_text(point.rate)}[/]")
    for line in report.summary_lines(point, settings.objectives):
        console.print(line)
    if point.measures.completed:
        console.print(report.latency_table(point.measures, settings.percentiles))


def _rate_text(rate: float | None) -> str:
    if rate is None:
        return "trace as recorded"
    return "closed loop" if rate == float("inf") else f"{rate:g} requests/s"


def _found_text(found: Found, settings: Settings) -> str:
    wanted = (
        f"{settings.search.attainment:.0%} of requests meet {settings.objectives}" if settings.search else ""
    )
    if not found.rate:
        return f"\n[bold red]No rate down to {found.failed:g} requests/s lets {wanted}.[/]"
    above = f"{found.failed:g} does not" if found.failed != float("inf") else "no higher one was tried"
    return f"\n[bold]Goodput {found.rate:g} requests/s[/]: the highest rate at which {wanted}; {above}."


def _write(
    settings: Settings,
    output: Output,
    points: Sequence[Point],
    found: Found | None,
    server: dict[str, Any],
    now: float,
    console: Console,
) -> None:
    """The JSON file and the pictures, where asked for and where there is something to write."""
    if not points:
        return
    console.print(f"\n[dim]{report.DEFINITIONS}[/]")
    if output.result is not None:
        origin = provenance(output.command) | {
            "date": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            "server": server,
        }
        record = report.whole_record(
            points, provenance=origin, settings=_settings(settings), detailed=output.detailed
        )
        if found is not None:
            record["goodput"] = {"rate": found.rate, "lowest_failed_rate": report.finite(found.failed)}
        inputs.write_result(output.result, record)
        console.print(f"written to {output.result}")
    if output.plot is not None:
        for path in pictures.draw(points, settings.objectives, output.plot, attainment=output.attainment):
            console.print(f"drawn to {path}")


def _settings(settings: Settings) -> dict[str, Any]:
    """What was asked, for the record."""
    given, target = settings.inputs, settings.target
    return {
        "backend": target.api,
        "url": target.url,
        "model_id": target.model,
        "extra_body": dict(target.extra),
        "dataset_name": given.dataset,
        "dataset_path": None if given.path is None else given.path.name,
        "random_input_len": given.lengths.input_len,
        "output_len": given.lengths.output_len,
        "random_range_ratio": given.lengths.range_ratio,
        "random_prefix_len": given.lengths.prefix_len,
        "length_scale": given.length_scale,
        "trace_speed": given.trace_speed,
        "seed": given.seed,
        "burstiness": settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        "num_clients": settings.clients,
        "min_duration": settings.min_duration_s,
        "num_warmups": settings.warmups,
        "goodput": None if settings.objectives is None else str(settings.objectives),
    }
