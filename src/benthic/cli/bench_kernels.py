"""`benthic bench kernels`: every op beside its peers, as a table, a file and a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path  # noqa: TC003 (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.kernels.bench.table import Row
    from benthic.kernels.bench.timing import Line


def kernels(
    *,
    only: Annotated[
        str | None, typer.Option(help="One suite; a wrong name is answered with all of them.")
    ] = None,
    small: Annotated[bool, typer.Option(help="Tiny sizes: a rehearsal whose figures mean nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write all lines as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw shares of the roof, as .svg or .png.")] = None,
) -> None:
    """Check, then time, every op of this machine beside libraries and the definition.

    Each line is compared with the definition, then timed with random data in buffers larger than the cache. A
    copy and a bfloat16 product of the same run say what the machine can do. Without a GPU sizes are tiny.
    """
    # imported here so that `benthic --help` needs no torch
    from benthic.bench.provenance import provenance  # noqa: PLC0415
    from benthic.kernels.bench import run, table  # noqa: PLC0415

    console = Console()
    say = partial(Console(stderr=True, highlight=False, markup=False).print, soft_wrap=True)
    bench = run.measure(only, small=small, say=say)
    rows = table.compared(bench.lines)
    console.print(drawn(rows))
    console.print(roofs_of(bench.lines), highlight=False)
    if out is not None:
        record = provenance(sys.argv) | {"device": run.device_name(), "small": bench.small}
        out.write_text(json.dumps(record | {"rows": [asdict(line) for line in bench.lines]}, indent=1) + "\n")
        console.print(f"lines: {out}", highlight=False)
    if plot is not None:
        from benthic.kernels.bench import picture  # noqa: PLC0415 (matplotlib, only for this)

        console.print(f"picture: {picture.draw(rows, plot)}", highlight=False)


def drawn(rows: Sequence[Row]) -> Table:
    """The table: our best and the best other implementation of every op and shape."""
    shown = Table("op", "shape", "unit", box=None, pad_edge=False)
    for name in ("ours", "other", "ratio", "of the roof"):
        shown.add_column(name, justify="right", overflow="fold")
    for row in rows:
        shown.add_row(
            row.op, row.shape, row.unit, _rate(row.ours), _rate(row.peer),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.of_roof is None else f"{row.of_roof:.0%}",
        )  # fmt: skip
    return shown


def roofs_of(lines: Sequence[Line]) -> str:
    """What the machine can do, in one line."""
    found = [f"{each.op.removeprefix('roof: ')} {each.rate:.3g} {each.unit}" for each in lines[:2]]
    return f"roofs of this run: {', '.join(found)}"


def _rate(line: Line | None) -> str:
    return "" if line is None else f"{line.rate:.3g} {line.implementation}"
