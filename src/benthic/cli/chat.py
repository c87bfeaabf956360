"""`benthic chat`: talk to a model in the terminal."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.serve.chat_client import ChatSession

HELP = "Ctrl-C stops an answer, Ctrl-D or /exit leaves, /clear forgets the conversation."
SERVER = "http://127.0.0.1:8000"


def chat(  # noqa: PLR0913 (one parameter a flag)
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder: start a server for it, and stop it at the end.")
    ] = None,
    *,
    url: Annotated[
        str | None, typer.Option(help=f"A running server instead of MODEL (default: {SERVER}).")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the server (default: BENTHIC_API_KEY).")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Which of the server's models (default: its first).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Default: the server's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="For answers that repeat.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Let the model continue the text as typed, without a chat template.")
    ] = False,
) -> None:
    """Talk to a model in the terminal, streaming."""
    from rich.console import Console  # noqa: PLC0415 (`benthic --help` needs none of these)

    from benthic.serve.chat_client import ChatSession, local_server  # noqa: PLC0415

    if model is not None and url is not None:
        msg = f"MODEL = {model} and --url = {url}. Give one of them."
        raise ConfigError(msg)
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    console = Console(highlight=False, soft_wrap=True)
    with local_server(model, console) if model is not None else nullcontext(url or SERVER) as address:
        session = ChatSession(
            address,
            console,
            api_key=api_key or os.environ.get("BENTHIC_API_KEY"),
            model=served_model_name,
            system=system,
            sampling={name: value for name, value in sampling.items() if value is not None},
            raw=raw,
        )
        console.print(f"[bold]{session.model}[/] at {address}. {HELP}")
        _converse(session)


def _converse(session: ChatSession) -> None:
    """Read lines until the end of input."""
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            session.clear()
        elif line.strip():
            session.say(line)
