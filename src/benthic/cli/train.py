"""`benthic train`: a recipe, a run folder, a dataset; everything else is `--set`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benthic.cli.draw import predicted_and_measured
from benthic.cli.plan_words import config_of, machine_of
from benthic.cli.settings import apply, typed
from benthic.errors import CheckpointError, ConfigError, DataError
from benthic.plan.draw_svg import draw_svg
from benthic.sched.pipeline.spans import read_spans
from benthic.spec import hardware as gpus
from benthic.train import recipes
from benthic.train.config import RunConfig
from benthic.train.fields import flatten, from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from benthic.parallel.start import Launch
    from benthic.sched.pipeline.table import Table
    from benthic.train.speed import Speed
    from benthic.train.trainer import StepResult


_WANTS_RUN: Final = (
    "no folder was named. Pass --run DIR for checkpoints and metrics, or --dry-run to see first."
)
_WANTS_DRY_RUN: Final = (
    "--ranks and --hardware are of --dry-run; how many ranks train is the launcher's: "
    "torchrun --nproc-per-node N."
)
_GPUS_OF_A_HOST: Final = 8
_FIRST_S: Final = 10.0
"""Longer than the ranks of a host differ in coming to the same error."""


class Screen:
    """A progress line at the bottom of a terminal and notes above it; notes only where there is none."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("", total=steps, line="")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, result: StepResult, speed: Speed) -> None:
        """Move the progress line."""
        mfu = "" if speed.mfu is None else f" mfu {100 * speed.mfu:.1f}%"
        line = f"loss {result.loss:.4f} {speed.tokens_per_second:,.0f} tok/s{mfu}"
        self.progress.update(self._task, completed=result.step, line=line)


@contextmanager
def _one_a_host() -> Iterator[None]:
    """Let one rank a host say what is wrong with settings or data: the others would say the same.

    The end of a rank makes its launcher end the others, who wait for that. One that is still there afterwards
    says it too: its error is its own.
    """
    try:
        yield
    except (ConfigError, DataError):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_FIRST_S)
        raise


@_one_a_host()
def train(  # noqa: PLR0913 (one argument per option)
    recipe: Annotated[
        str | None,
        typer.Argument(help=f"One of: {', '.join(recipes.RECIPES)}. May be left out with --resume."),
    ] = None,
    *,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run: checkpoints, metrics, pictures, export.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset folder from `benthic data build` (default: data.path).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any config field, e.g. --set train.lr=3e-4; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A preset or config.json to train from random weights, not the recipe's model."),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Hugging Face checkpoint to start from; its model replaces the recipe's."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of --run.")
    ] = False,
    resume_step: Annotated[
        int | None, typer.Option(help="Go back to this step of --run; later checkpoints are deleted.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Trace these steps of every rank, e.g. 3:5, into RUN/profile.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print layout, memory and schedule; train nothing.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(help="With --dry-run: ranks to start (default: the layout's).", min=1)
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help=f"With --dry-run: say how fast on one of {', '.join(gpus.names())}."),
    ] = None,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print everything that --set can change, and its value.")
    ] = False,
) -> None:
    """Train a model; every option of a recipe can be set with --set section.field=value."""
    resuming = resume or resume_step is not None
    base = _started(_config(recipe, run, resume=resuming), init_from, model)
    config = apply(base, settings or ())
    if list_settings:
        for name, value in flatten(config).items():
            typer.echo(f"{name}={typed(value)}")
        return
    if dry_run:
        from benthic.cli.dry_run import show  # noqa: PLC0415 (torch takes seconds, others need none)

        machine = None if hardware is None else machine_of(hardware, _GPUS_OF_A_HOST, None)
        show(config, ranks, machine, Console())
        return
    if ranks is not None or hardware is not None or run is None:
        asked = ranks is not None or hardware is not None
        raise ConfigError(_WANTS_DRY_RUN if asked else _WANTS_RUN)
    config = _with_data(config, data)
    _refuse_stand_in(recipe, config, run)
    from benthic.parallel.start import joined  # noqa: PLC0415 (torch takes seconds, others need none)
    from benthic.train import run as runs  # noqa: PLC0415
    from benthic.train.hardware import detect  # noqa: PLC0415
    from benthic.train.profile import Steps  # noqa: PLC0415

    traced = None if profile is None else Steps.parse(profile, config.train.steps)
    launch = launched(os.environ)
    threads = None if config.train.threads == "auto" else config.train.threads
    facts = detect(config.device, threads=threads)
    screen = Screen(_console(run, launch), config.train.steps)
    timeout_s = config.train.timeout_s
    with joined(launch, facts.device, timeout_s=timeout_s), _stopping() as should_stop, screen.progress:
        prepared = runs.prepare(
            run,
            config,
            Path(config.data.path),
            facts,
            screen,
            resume=runs.Resume(wanted=resuming, step=resume_step),
            should_stop=should_stop,
            launch=launch,
        )
        prepared.go(profile=traced)
        if launch.leads and prepared.measures.recorded is not None:
            screen.note(f"timeline: {_draw(run, prepared.measures.recorded)}")


def launched(environment: Mapping[str, str]) -> Launch:
    """What torchrun says in the environment of each process.

    Raises:
        ConfigError: some of its variables are there and others are not.
    """
    from benthic.parallel.start import Launch  # noqa: PLC0415 (torch takes seconds, others need none)

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [environment[name] for name in names if name in environment]
    if not found:
        return Launch()
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in environment)
        message = f"{len(found)} of 3 launcher variables are set; {missing} are not. Start with torchrun."
        raise ConfigError(message)
    rank, ranks, local_rank = map(int, found)
    return Launch(rank=rank, ranks=ranks, local_rank=local_rank)


def _draw(run: Path, table: Table) -> Path:
    """Draw the pipeline step that was measured last below what its median times predict."""
    from benthic.train.records import SPANS  # noqa: PLC0415 (torch takes seconds, others need none)

    spans = read_spans((run / SPANS).read_text(encoding="utf-8"))
    picture = run / "pictures" / "timeline.svg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(draw_svg(*predicted_and_measured(table, spans)), encoding="utf-8")
    return picture


def _console(run: Path, launch: Launch) -> Console:
    """The screen for rank 0, a log file for every other rank."""
    if launch.leads:
        return Console()
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return Console(file=(folder / f"rank-{launch.rank}.log").open("a", encoding="utf-8"))


def _config(recipe: str | None, run: Path | None, *, resume: bool) -> RunConfig:
    """The recipe's config, or on resuming without one the config that the run folder was started with."""
    if recipe is not None:
        return recipes.get(recipe)
    if not resume or run is None:
        message = (
            f"no recipe was named. Known: {', '.join(recipes.RECIPES)}. Or pass --resume to go on with a run."
        )
        raise ConfigError(message)
    file = run / "resolved.json"
    if not file.is_file():
        message = f"{run} has no resolved.json, so there is nothing to resume. Name a recipe to start."
        raise CheckpointError(message)
    try:
        config: RunConfig = from_json(RunConfig, json.loads(file.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:  # ValueError: JSON, UTF-8 and ConfigError too
        message = f"{file} cannot be read: {error}. Name the recipe and its --set settings beside --resume."
        raise CheckpointError(message) from error
    return config


def _started(config: RunConfig, init_from: Path | None, model: str | None = None) -> RunConfig:
    """The config with the model that was named, or that of the checkpoint to start from; `--set` comes after.

    Raises:
        ConfigError: both are named.
    """
    if model is not None and init_from is not None:
        message = f"--model {model} and --init-from {init_from} each name a model. Leave one of the two out."
        raise ConfigError(message)
    if model is not None:
        return dataclasses.replace(config, model=config_of(model))
    if init_from is None:
        return config
    from benthic.train.initial import model_of  # noqa: PLC0415 (torch takes seconds)

    return dataclasses.replace(config, model=model_of(init_from), init_from=str(init_from))


def _refuse_stand_in(recipe: str | None, config: RunConfig, run: Path) -> None:
    """Refuse to begin a recipe for trained weights with random ones.

    Raises:
        ConfigError: no checkpoint is named, and the run folder holds no run that began with one.
    """
    begun = (run / "resolved.json").is_file()
    if recipe is not None and recipes.continues(recipe) and not config.init_from and not begun:
        message = f"recipe {recipe} goes on with a trained model, and none was named. Pass --init-from DIR."
        raise ConfigError(message)


def _with_data(config: RunConfig, data: Path | None) -> RunConfig:
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)))
    if not config.data.path:
        message = "no data was named. Pass --data DIR, a folder made by `benthic data build`."
        raise ConfigError(message)
    return config


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and the first Ctrl-C into "stop after this step"; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
