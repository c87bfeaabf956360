"""`benthic bench`: load an OpenAI-compatible server and say what its users would see, or time kernels."""

from __future__ import annotations

import math
import os
import sys
import time
from enum import StrEnum
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benthic.cli import bench_kernels
from benthic.cli.bench_vllm import BenchServeCommand
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.bench.search import Search
    from benthic.spec.objectives import Objectives

app = typer.Typer(help="Measure a running server, or the kernels of this machine.", no_args_is_help=True)
app.command("kernels")(bench_kernels.kernels)

SERVER = "Server"
WORKLOAD = "Workload"
SCHEDULE = "Schedule"
TARGETS = "Targets and results"
SEARCH_DOWN = 64
"""A search gives up this far below its first rate: slower runs would take minutes each."""


class Backend(StrEnum):
    """Which API is spoken; `vllm` is another word for `openai`."""

    openai = "openai"
    openai_chat = "openai-chat"
    vllm = "vllm"


class Dataset(StrEnum):
    """Where prompts come from."""

    random = "random"
    sharegpt = "sharegpt"
    custom = "custom"
    azure = "azure"
    mooncake = "mooncake"


@app.callback()
def bench() -> None:
    """Measure a running server, or the kernels of this machine."""


@app.command(cls=BenchServeCommand)
def serve(  # noqa: PLR0913 (one parameter a flag)
    more_goodput: Annotated[
        list[str] | None, typer.Argument(hidden=True, help="Further words of --goodput.")
    ] = None,
    *,
    backend: Annotated[
        Backend, typer.Option(help="Completions or chat.", rich_help_panel=SERVER)
    ] = Backend.openai,
    base_url: Annotated[
        str | None, typer.Option(help="Instead of --host and --port.", rich_help_panel=SERVER)
    ] = None,
    host: Annotated[str, typer.Option(help="Of the server.", rich_help_panel=SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the server.", rich_help_panel=SERVER)] = 8000,
    endpoint: Annotated[str, typer.Option(help="Path, if not the API's own.", rich_help_panel=SERVER)] = "",
    model: Annotated[
        str | None, typer.Option(help="Served name (default: the server's first).", rich_help_panel=SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Also BENTHIC_API_KEY or OPENAI_API_KEY.", rich_help_panel=SERVER),
    ] = None,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object added to every request.", rich_help_panel=SERVER)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate all the tokens asked.", rich_help_panel=SERVER)
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest silence in an answer, seconds.", rich_help_panel=SERVER)
    ] = 600.0,
    continuous_usage: Annotated[
        bool,
        typer.Option(help="Ask for token counts in every chunk.", rich_help_panel=SERVER),
    ] = True,
    dataset_name: Annotated[
        Dataset, typer.Option(help="Where prompts come from.", rich_help_panel=WORKLOAD)
    ] = Dataset.random,
    dataset_path: Annotated[
        Path | None, typer.Option(help="File of every dataset but random.", rich_help_panel=WORKLOAD)
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests of a run (default: 200; a trace's all).", rich_help_panel=WORKLOAD
        ),
    ] = None,
    random_input_len: Annotated[
        int, typer.Option(min=1, help="Mean tokens of random prompts.", rich_help_panel=WORKLOAD)
    ] = 512,
    random_output_len: Annotated[
        int, typer.Option(min=1, help="Mean tokens asked for random prompts.", rich_help_panel=WORKLOAD)
    ] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths are uniform in mean x (1 +- this).", rich_help_panel=WORKLOAD)
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens that all prompts share.", rich_help_panel=WORKLOAD)
    ] = 0,
    output_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens asked for prompts of a file.", rich_help_panel=WORKLOAD),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with tokenizer.json.", rich_help_panel=WORKLOAD)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=8, help="Instead of a tokenizer.", rich_help_panel=WORKLOAD)
    ] = None,
    length_scale: Annotated[
        float, typer.Option(help="Times a trace's lengths.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.", rich_help_panel=WORKLOAD)] = 0,
    request_rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Requests a second; repeat for a sweep (default: inf, a trace's own).",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Gamma shape of the gaps; 1 is Poisson.", rich_help_panel=SCHEDULE)
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests in flight.", rich_help_panel=SCHEDULE)
    ] = None,
    num_clients: Annotated[
        int, typer.Option(min=1, help="Processes that share the requests.", rich_help_panel=SCHEDULE)
    ] = 1,
    trace_speed: Annotated[
        float, typer.Option(help="2 plays a trace twice as fast.", rich_help_panel=SCHEDULE)
    ] = 1.0,
    min_duration: Annotated[
        float, typer.Option(min=0, help="Seconds a run at a rate lasts at least.", rich_help_panel=SCHEDULE)
    ] = 0.0,
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Requests sent before the first run.", rich_help_panel=SCHEDULE)
    ] = 1,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Targets in ms, as ttft:200 tpot:50 e2el:3000.", rich_help_panel=TARGETS),
    ] = None,
    find_goodput: Annotated[
        bool,
        typer.Option(
            "--find-goodput", help="Search the highest rate that meets them.", rich_help_panel=TARGETS
        ),
    ] = False,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must meet them.", rich_help_panel=TARGETS)
    ] = 0.9,
    precision: Annotated[
        float, typer.Option(help="Of the rate found, relative.", rich_help_panel=TARGETS)
    ] = 0.05,
    metric_percentiles: Annotated[
        str, typer.Option(help="Comma-separated.", rich_help_panel=TARGETS)
    ] = "50,90,99",
    max_client_lag: Annotated[
        float,
        typer.Option(help="p99 ms beyond which this client spoils a run.", rich_help_panel=TARGETS),
    ] = 20.0,
    result: Annotated[Path | None, typer.Option(help="JSON file to write.", rich_help_panel=TARGETS)] = None,
    detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Times of every request too.", rich_help_panel=TARGETS)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write PLOT_latency and PLOT_goodput, .svg and .png.", rich_help_panel=TARGETS),
    ] = None,
) -> None:
    """Load an OpenAI-compatible server and report latencies, throughput and goodput.

    Exit status: 0; 1 when a run completed no request; 3 when this client could not keep up.
    """
    # imported here so that `benthic --help` needs no HTTP client
    import uvloop  # noqa: PLC0415

    from benthic.bench import session  # noqa: PLC0415
    from benthic.bench.client import Target  # noqa: PLC0415
    from benthic.bench.inputs import Inputs, Lengths, read_extra  # noqa: PLC0415
    from benthic.spec.objectives import Objectives  # noqa: PLC0415

    objectives = Objectives.parse([*(goodput or ()), *(more_goodput or ())])
    settings = session.Settings(
        target=Target(
            base_url=base_url or f"http://{host}:{port}",
            api="openai-chat" if backend is Backend.openai_chat else "openai",
            model=model or "",
            path=endpoint,
            api_key=_api_key(api_key),
            extra={**({"ignore_eos": True} if ignore_eos else {}), **read_extra(extra_body)},
            timeout_s=timeout,
            continuous_usage=continuous_usage,
        ),
        inputs=Inputs(
            dataset=dataset_name.value,
            path=dataset_path,
            count=num_prompts,
            lengths=Lengths(
                input_len=random_input_len,
                output_len=output_len or (random_output_len if dataset_name is Dataset.random else None),
                range_ratio=random_range_ratio,
                prefix_len=random_prefix_len,
            ),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            length_scale=length_scale,
            trace_speed=trace_speed,
            seed=seed,
        ),
        rates=_rates(request_rate, dataset_name),
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        clients=num_clients,
        min_duration_s=min_duration,
        warmups=num_warmups,
        objectives=objectives,
        search=_search(request_rate, objectives, attainment, precision) if find_goodput else None,
        percentiles=_percentiles(metric_percentiles),
        max_lag_s=max_client_lag / 1e3,
    )
    output = session.Output(
        result=result, detailed=detailed, plot=plot, attainment=attainment, command=("benthic", *sys.argv[1:])
    )
    console = Console(highlight=False, soft_wrap=True)
    points = uvloop.run(session.run(settings, output, console, clock=time.perf_counter, wall=time.time))
    raise typer.Exit(session.status(points))


def _api_key(given: str | None) -> str | None:
    return given or os.environ.get("BENTHIC_API_KEY") or os.environ.get("OPENAI_API_KEY")


def _rates(given: list[float] | None, dataset: Dataset) -> tuple[float | None, ...]:
    """Rates of the runs; None replays a trace as it was recorded."""
    if given:
        return tuple(given)
    return (None,) if dataset in (Dataset.azure, Dataset.mooncake) else (math.inf,)


def _search(
    rates: list[float] | None, objectives: Objectives | None, attainment: float, precision: float
) -> Search:
    """How to look for the highest rate, beginning at the one given.

    Raises:
        ConfigError: there are no targets, or more than one first rate.
    """
    from benthic.bench.search import Search  # noqa: PLC0415

    if objectives is None:
        msg = "--find-goodput needs targets. Give --goodput, e.g. --goodput ttft:500 tpot:50."
        raise ConfigError(msg)
    if rates is not None and (len(rates) > 1 or math.isinf(rates[0])):
        msg = f"--find-goodput begins at one finite rate, but --request-rate is {rates}"
        raise ConfigError(msg)
    start = rates[0] if rates else 1.0
    return Search(start=start, least=start / SEARCH_DOWN, attainment=attainment, precision=precision)


def _percentiles(words: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or not all(0.0 <= q <= 100.0 for q in found):
        msg = f"--metric-percentiles is {words!r}, but it must be numbers from 0 to 100, as 50,90,99"
        raise ConfigError(msg)
    return found
