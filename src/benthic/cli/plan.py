"""`benthic plan`: questions about models answered without running them.

Planners are imported by the command that runs, so that `--help` and the other commands start without them.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from benthic.cli import plan_engine, plan_examples, plan_serve, plan_train
from benthic.cli.plan_words import Model, config_of

app = typer.Typer(
    help="Answer questions about models and layouts without running them.", no_args_is_help=True
)


app.command()(plan_train.train)
app.command()(plan_serve.serve)
app.command()(plan_serve.replay)
app.command()(plan_engine.engine)
app.command()(plan_examples.examples)


@app.callback()
def plan() -> None:
    """Answer questions about models and layouts without running them."""


@app.command()
def model(
    name: Model,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of context for FLOPs.", show_default="4096, or the model's", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Parameters, training memory, FLOPs and KV cache of a model, every number with its rule.

    Example: benthic plan model deepseek-v3
    """
    from benthic.plan.model import as_dict, model_report  # noqa: PLC0415 (see above)
    from benthic.plan.model_tables import tables  # noqa: PLC0415

    report = model_report(config_of(name), seq_len=seq_len)
    if as_json:
        typer.echo(json.dumps(as_dict(report), indent=2))
        return
    console = Console(highlight=False)
    for table in tables(report):
        console.print(table)
