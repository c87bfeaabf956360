"""`benthic convert`: a checkpoint in another type, one tensor in memory at a time."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from benthic import units
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.model.export import Format, Report
    from benthic.model.export import Progress as Step

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?")
_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Dtype(StrEnum):
    """Types a checkpoint can be written in."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder: Hugging Face's, transformers', or RUN/checkpoint/step-N."),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not hold a checkpoint yet.")],
    *,
    dtype: Annotated[
        Dtype,
        typer.Option(help="fp8: E4M3 with one scale per 128x128 block where released models have it."),
    ] = Dtype.bf16,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, e.g. 5GB or 500MiB.")] = "5GB",
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Keep or leave out the MTP layers.")] = True,
) -> None:
    """Rewrite a checkpoint in another type, or a step of a run in Hugging Face format.

    Tensors already in the type are copied bit by bit.
    """
    shard_bytes = parse_size(max_shard_size)
    from benthic.model import convert as conversion  # noqa: PLC0415 (torch takes seconds to import)
    from benthic.train.step_export import export_step, is_step  # noqa: PLC0415 (as above)

    started = time.monotonic()
    console = Console()
    with _bar(console) as report:
        form = _format(dtype)
        rewrite = export_step if is_step(source) else conversion.convert
        rewrite(source, target, form, mtp=mtp, max_shard_bytes=shard_bytes, progress=report)
    weights = list(target.glob("*.safetensors"))
    size = units.size(sum(path.stat().st_size for path in weights))
    took = units.seconds(time.monotonic() - started)
    files = units.plural(len(weights), "file")
    console.print(f"{target}: {size} in {files}, {dtype.value}, {took}", highlight=False, soft_wrap=True)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MiB`, `2.5G` or `1000`.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = _SIZE.fullmatch(text.strip())
    factors = _BINARY if match is not None and match[3] else _DECIMAL
    size = 0 if match is None else int(float(match[1]) * factors[match[2]])
    if size <= 0:
        message = (
            f"--max-shard-size {text!r} is not a positive size. Write for example 5GB, 500MiB or 1000000."
        )
        raise ConfigError(message)
    return size


def _format(dtype: Dtype) -> Format:
    import torch  # noqa: PLC0415 (torch takes seconds to import)

    from benthic.model.export import Format  # noqa: PLC0415 (as above)

    return Format(torch.float32 if dtype is Dtype.fp32 else torch.bfloat16, fp8=dtype is Dtype.fp8)


@contextmanager
def _bar(console: Console) -> Iterator[Report]:
    """A progress bar over bytes written, with the tensor's name."""
    columns = (
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading headers", total=None)

        def report(step: Step) -> None:
            bar.update(task, description=step.name, completed=step.done_bytes, total=step.total_bytes)

        yield report
