"""`benthic plan train`: the fastest way to train a model on given GPUs, without any."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from benthic.cli.plan_words import config_of, machine_of, refuse_no_folder, refuse_rows_beyond
from benthic.cli.settings import typed
from benthic.errors import ConfigError, UnknownFieldError
from benthic.spec import hardware

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine
    from benthic.plan.training.plan import Plan
    from benthic.plan.training.space import Space
    from benthic.spec.model import ModelConfig

PUBLISHED: Final = {
    "deepseek-v3": (14.8e12, 15360),
    "deepseek-v2": (8.1e12, 9216),
    "deepseek-v2-lite": (5.7e12, 4608),
    "moonlight-16b-a3b": (5.2e12, 8192),
    "kimi-k2": (15.5e12, 16384),
}
"""Tokens of the published run, and rows of its largest batch if a row has 4,096 tokens."""
_FALLBACK: Final = (1e12, 2048)
_UNPUBLISHED: Final = "as published, else {}"

Degree = Annotated[list[int] | None, typer.Option(min=1, help="Only these; may be repeated.")]


def train(  # noqa: PLR0913, PLR0917 (one argument per option)
    model: Annotated[str, typer.Argument(help="A preset, a config.json or the folder of one.")],
    gpus: Annotated[int, typer.Option(help="GPUs to plan for.")],
    gpu: Annotated[str, typer.Option("--hardware", help=f"One of: {', '.join(hardware.names())}.")],
    tokens: Annotated[
        str | None,
        typer.Option(help="Of the run, e.g. 14.8T.", show_default=_UNPUBLISHED.format("1T")),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--global-batch-size", min=1, help="Rows a step.", show_default=_UNPUBLISHED.format("2048")
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    precisions: Annotated[
        list[str] | None, typer.Option("--precision", help="bf16 or fp8; else both.")
    ] = None,
    schedules: Annotated[list[str] | None, typer.Option("--schedule", help="Only these.")] = None,
    pp: Degree = None,
    ep: Degree = None,
    tp: Degree = None,
    cp: Degree = None,
    zero: Degree = None,
    local_rows: Annotated[
        list[int] | None,
        typer.Option("--local-batch-size", min=1, help="Rows a microbatch, only these; may be repeated."),
    ] = None,
    remainders: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--store-param-remainders", help="Keep 16 bits of a bf16 weight's master beside it."),
    ] = False,
    skew: Annotated[float, typer.Option(min=1.0, help="Busiest expert rank's rows over the mean.")] = 1.0,
    kept_pairs: Annotated[
        float | None,
        typer.Option(help="Share of causal pairs that document masks leave.", show_default="no masks"),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share NVLink.")] = 8,
    profile: Annotated[Path | None, typer.Option(help="What `benthic calibrate` measured.")] = None,
    usd: Annotated[float, typer.Option("--usd-per-gpu-hour", min=0.0, help="Price of a GPU.")] = 2.0,
    mtbf: Annotated[float, typer.Option("--gpu-mtbf-hours", help="Of one GPU.")] = 50_000.0,
    checkpoint: Annotated[float, typer.Option("--checkpoint-seconds", help="Of standing still.")] = 10.0,
    restart: Annotated[float, typer.Option("--restart-seconds", help="From a failure to going on.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,  # noqa: FBT002
    page: Annotated[Path | None, typer.Option("--report", help="Write a page that needs no network.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="Write the predicted step as a trace for ui.perfetto.dev.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Spans of a run of that layout, laid beside it in the trace.")
    ] = None,
) -> None:
    """Find the fastest layout that fits, its time, memory and cost, and say why.

    Example: benthic plan train deepseek-v3 --gpus 2048 --hardware h800
    """
    from benthic.plan.training.candidate import Updates  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.training.plan import plan  # noqa: PLC0415
    from benthic.plan.training.run import Failures  # noqa: PLC0415
    from benthic.plan.training.space import Question, refuse_degrees  # noqa: PLC0415

    if measured and perfetto is None:
        message = f"{len(measured)} files of --measured, but 0 of --perfetto. Say where to write the trace."
        raise ConfigError(message)
    refuse_no_folder(page, perfetto)
    config, machine = config_of(model), machine_of(gpu, gpus_per_node, profile)
    refuse_rows_beyond(config, seq_len, f"--seq-len {seq_len}")
    question = Question(
        model=config,
        machine=machine,
        gpus=gpus,
        rows=rows or usual(config)[1],
        seq_len=seq_len,
        tokens=usual(config)[0] if tokens is None else count(tokens),
        optimizer=Updates(store_param_remainders=remainders),
        skew=skew,
        kept_pairs=kept_pairs,
    )
    space = space_of(
        machine, schedules, precisions, pp=pp, ep=ep, tp=tp, cp=cp, zero=zero, local_batch_sizes=local_rows
    )
    refuse_degrees(question, space)
    failures = Failures(gpu_mtbf_hours=mtbf, checkpoint_seconds=checkpoint, restart_seconds=restart)
    with Console(stderr=True).status(f"looking at layouts of {config.name} on {gpus} {gpu}"):
        found = plan(question, space, usd_per_gpu_hour=usd, failures=failures)
    show(found, model, as_json=as_json)
    for path in written_files(found, page, perfetto, measured):
        if not as_json:
            typer.echo(f"wrote {path}")


def usual(config: ModelConfig) -> tuple[float, int]:
    """Tokens of the published run and rows of its step, or some."""
    return PUBLISHED.get(config.name, _FALLBACK)


def space_of(
    machine: Machine,
    schedules: list[str] | None,
    precisions: list[str] | None,
    **numbers: list[int] | None,
) -> Space:
    """What may be chosen: what was named, else everything that the GPU can do. `numbers`: fields of `Space`.

    Raises:
        UnknownFieldError: a schedule or a precision that does not exist.
        ConfigError: a ZeRO stage above 3.
    """
    from benthic.plan.training.candidate import PRECISIONS, precision  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.training.space import Space  # noqa: PLC0415
    from benthic.sched.pipeline.schedules import BUILDERS  # noqa: PLC0415

    for name in schedules or ():
        if name not in BUILDERS:
            raise UnknownFieldError(kind="schedule", name=name, known=BUILDERS)
    for name in precisions or ():
        precision(name)
    named: dict[str, Any] = {field: tuple(values) for field, values in numbers.items() if values}
    zero = max(named.get("zero", (1,)))
    if zero > 3:
        message = f"--zero {zero}, but ZeRO has stages 1 to 3. Leave it out to try all three."
        raise ConfigError(message)
    native = PRECISIONS if machine.hardware.fp8_flops is not None else ("bf16",)
    return Space(
        schedules=tuple(schedules or Space().schedules), precisions=tuple(precisions or native), **named
    )


def written_files(
    found: Plan, page: Path | None, perfetto: Path | None, measured: list[Path] | None
) -> tuple[Path, ...]:
    """Write what was asked for: the page, and the predicted step as a trace beside the measured one.

    Raises:
        ScheduleError: the measured run is of another table than the plan's best.
    """
    written = []
    if page is not None:
        from benthic.plan.training.report import report  # noqa: PLC0415

        page.write_text(report(found), encoding="utf-8")
        written.append(page)
    if perfetto is not None:
        from benthic.plan.training.overlay import overlay  # noqa: PLC0415

        spans = "\n".join(path.read_text(encoding="utf-8") for path in measured or ())
        perfetto.write_text(overlay(found.best.step, spans), encoding="utf-8")
        written.append(perfetto)
    return tuple(written)


def show(found: Plan, model: str, *, as_json: bool) -> None:
    """Print the plan; `model` is how the question named the model."""
    from benthic.plan.training.plan import as_dict  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.training.text import lines  # noqa: PLC0415

    words = [f"--set {name}={typed(value)}" for name, value in found.best.candidate.settings().items()]
    command = f"benthic train RECIPE --model {shlex.quote(model)} {' '.join(words)}"
    if as_json:
        typer.echo(json.dumps(as_dict(found) | {"command": command}, indent=2))
        return
    console = Console(highlight=False)
    for line in lines(found):
        console.print(line, markup=False) if isinstance(line, str) else console.print(line)
    console.print(
        f"to train so, with the learning rate of a recipe:\n{command}", soft_wrap=True, markup=False
    )


def count(words: str) -> float:
    """A number of tokens: 14.8T, 500B, 20M or plain.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMBT]?)", words.strip())
    value = float(match[1]) * {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else 0.0
    if value <= 0:
        message = f"--tokens {words} is no number of tokens. Write it as 14.8T, 500B or 20M."
        raise ConfigError(message)
    return value
