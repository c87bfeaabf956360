"""The `benthic` command: every sub-command is a module beside this one, imported only when it is called."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from benthic.cli import bench, calibrate, chat, convert, data, doctor, draw, evaluate, plan, serve, train
from benthic.cli.folders import user_cache
from benthic.cli.serve_vllm import ServeCommand
from benthic.errors import BenthicError
from benthic.kernels import native_build

app = typer.Typer(
    name="benthic",
    help="Plan, train and serve language models of the DeepSeek-V3 architecture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plan.app, name="plan")
app.add_typer(draw.app, name="draw")
app.command("doctor")(doctor.doctor)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("serve", cls=ServeCommand)(serve.serve)
app.command("warmup", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.warmup
)
app.add_typer(bench.app, name="bench")
app.command("chat")(chat.chat)


def main() -> None:
    """Run the command line.

    Errors that benthic raises on purpose, files that cannot be read or written and full disks are printed,
    not traced; Ctrl-C ends with status 130, as shells have it.
    """
    native_build.configure(user_cache())
    try:
        app()
    except BenthicError as error:
        _end(str(error))
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            _end(f"{error.filename or 'writing'}: {error.strerror}. Free some space or name another folder.")
        if error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}. Name another file or folder.")
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    sys.exit(2)
