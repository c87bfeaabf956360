"""`benthic plan`: questions about models answered without running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benthic.cli import plan_examples, plan_serve, plan_train
from benthic.plan.model import as_dict, model_report
from benthic.plan.model_tables import tables
from benthic.spec import hf, presets

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

app = typer.Typer(
    help="Answer questions about models and layouts without running them.", no_args_is_help=True
)


app.command()(plan_train.train)
app.command()(plan_serve.serve)
app.command()(plan_serve.replay)
app.command()(plan_examples.examples)


@app.callback()
def plan() -> None:
    """Answer questions about models and layouts without running them."""


@app.command()
def model(
    name: Annotated[
        str,
        typer.Argument(help=f"A config.json, the folder of one, or one of: {', '.join(presets.names())}."),
    ],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of context for FLOPs [default: 4096 or the model's].", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Parameters, training memory, FLOPs and KV cache of a model, every number with its rule.

    Example: benthic plan model deepseek-v3
    """
    report = model_report(_config(name), seq_len=seq_len)
    if as_json:
        typer.echo(json.dumps(as_dict(report), indent=2))
        return
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)


def _config(name: str) -> ModelConfig:
    """A path if it looks like one or exists, else a preset."""
    path = Path(name)
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        return hf.read(path).config
    return presets.get(name)
