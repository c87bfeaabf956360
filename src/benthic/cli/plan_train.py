"""`benthic plan train`: the fastest way to train a model on given GPUs, without any."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from benthic.errors import ConfigError, UnknownFieldError
from benthic.plan.cost import machine as machines
from benthic.plan.training.candidate import PRECISIONS, precision
from benthic.plan.training.plan import as_dict, plan
from benthic.plan.training.report import report
from benthic.plan.training.run import Failures
from benthic.plan.training.space import Question, Space
from benthic.plan.training.text import lines
from benthic.sched.pipeline.schedules import BUILDERS
from benthic.spec import hardware, hf, presets

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

PUBLISHED: Final = {
    "deepseek-v3": (14.8e12, 15360),
    "deepseek-v2": (8.1e12, 9216),
    "deepseek-v2-lite": (5.7e12, 4608),
}
"""Tokens of the published run, and rows of its largest batch."""
_FALLBACK: Final = (1e12, 2048)

Degree = Annotated[list[int] | None, typer.Option(min=1, help="Only these; may be repeated.")]


def train(  # noqa: PLR0913, PLR0917 (one argument per option)
    model: Annotated[str, typer.Argument(help="A preset, a config.json or the folder of one.")],
    gpus: Annotated[int, typer.Option(help="How many.")],
    gpu: Annotated[str, typer.Option("--hardware", help=f"One of: {', '.join(hardware.names())}.")],
    tokens: Annotated[
        str | None, typer.Option(help="Of the run, e.g. 14.8T.", show_default="as published")
    ] = None,
    rows: Annotated[int | None, typer.Option("--global-batch-size", min=1, help="Rows a step.")] = None,
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
    skew: Annotated[float, typer.Option(min=1.0, help="Busiest expert rank's rows over the mean.")] = 1.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share NVLink.")] = 8,
    profile: Annotated[Path | None, typer.Option(help="What `benthic calibrate` measured.")] = None,
    usd: Annotated[float, typer.Option("--usd-per-gpu-hour", min=0.0, help="Price of a GPU.")] = 2.0,
    mtbf: Annotated[float, typer.Option("--gpu-mtbf-hours", help="Of one GPU.")] = 50_000.0,
    checkpoint: Annotated[float, typer.Option("--checkpoint-seconds", help="Of standing still.")] = 10.0,
    restart: Annotated[float, typer.Option("--restart-seconds", help="From a failure to going on.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,  # noqa: FBT002
    page: Annotated[Path | None, typer.Option("--report", help="Write a page that needs no network.")] = None,
) -> None:
    """Find the fastest layout that fits, its time, memory and cost, and say why.

    Example: benthic plan train deepseek-v3 --gpus 2048 --hardware h800
    """
    config = _config(model)
    machine = machines.get(
        gpu, gpus_per_node=gpus_per_node, profile=None if profile is None else machines.read(profile)
    )
    usual_tokens, usual_rows = PUBLISHED.get(config.name, _FALLBACK)
    question = Question(
        model=config,
        machine=machine,
        gpus=gpus,
        rows=rows or usual_rows,
        seq_len=seq_len,
        tokens=usual_tokens if tokens is None else count(tokens),
        skew=skew,
    )
    for name in schedules or ():
        _known_schedule(name)
    space = Space(
        pp=tuple(pp or ()),
        ep=tuple(ep or ()),
        tp=tuple(tp or ()),
        cp=tuple(cp or ()),
        zero=tuple(zero or (1, 2, 3)),
        schedules=tuple(schedules or Space().schedules),
        precisions=_precisions(precisions, machine.hardware.fp8_flops is not None),
    )
    failures = Failures(gpu_mtbf_hours=mtbf, checkpoint_seconds=checkpoint, restart_seconds=restart)
    found = plan(question, space, usd_per_gpu_hour=usd, failures=failures)
    if page is not None:
        page.write_text(report(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=2))
        return
    console = Console(highlight=False)
    for line in lines(found):
        console.print(line, markup=False) if isinstance(line, str) else console.print(line)
    if page is not None:
        console.print(f"wrote {page}", style="dim", markup=False, soft_wrap=True)


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


def _precisions(named: list[str] | None, fp8: bool) -> tuple[str, ...]:  # noqa: FBT001
    for name in named or ():
        precision(name)
    return tuple(named or (PRECISIONS if fp8 else ("bf16",)))


def _known_schedule(name: str) -> None:
    if name not in BUILDERS:
        raise UnknownFieldError(kind="schedule", name=name, known=BUILDERS)


def _config(name: str) -> ModelConfig:
    """A path if it looks like one or exists, else a preset."""
    path = Path(name)
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        return hf.read(path).config
    return presets.get(name)
