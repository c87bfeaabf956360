"""`benthic calibrate`: measure this machine for the planner."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich.console import Console

from benthic import units
from benthic.cli.train import launched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.parallel.start import Launch
    from benthic.plan.cost.machine import Profile

_TIMEOUT_S: Final = 600.0
"""For what a rank waits while another one measures."""
_POINTS_S: Final = 70.0
"""After so long every other point must do: links, host and starting take the rest of two minutes."""


def calibrate(
    out: Annotated[Path, typer.Option(help="Where the profile is written.")] = Path("profile.json"),
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")
    ] = "auto",
) -> None:
    """Time this machine's operations, in under two minutes, and say how well they foretell others.

    Products, experts, streams of memory; on a GPU attention, decoding and what the host takes for a call;
    under torchrun the links between all ranks, and the host while all of them call.

    Example: benthic calibrate --out profile.json; benthic plan train MODEL --profile profile.json ...
    Example: torchrun --nproc-per-node 2 -m benthic calibrate --out profile.json
    """
    import torch  # noqa: PLC0415 (the other commands start without it)

    from benthic.cli.calibration import errors, refuse_without_gpu  # noqa: PLC0415

    found = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = found if device == "auto" else device
    refuse_without_gpu(chosen)
    profile = _measured(chosen, launched(os.environ))
    if profile is None:
        return
    out.write_text(profile.as_json(), encoding="utf-8")
    for kind, error in errors(profile).items():
        count = len(profile.kinds[kind])
        typer.echo(f"{kind:<28} {count:3} points, left out one by one: median error {units.percent(error)}")
    for name, seconds in profile.overheads.items():
        typer.echo(f"{name:<28} {units.seconds(seconds)} a call")
    typer.echo(f"wrote {out}: {profile.hardware}, {profile.source}")


def _measured(device: str, launch: Launch) -> Profile | None:
    """What all ranks measure; the first one has the profile. GPUs share the points, a CPU has them alone."""
    from benthic.cli import calibration_host, calibration_ranks  # noqa: PLC0415 (see calibrate)
    from benthic.cli.calibration import Share, Stopwatch  # noqa: PLC0415
    from benthic.cli.calibration import calibrate as measure  # noqa: PLC0415
    from benthic.parallel.start import joined  # noqa: PLC0415

    own = None
    with joined(launch, device, timeout_s=_TIMEOUT_S):
        if device == "cuda" or launch.leads:
            ranks = launch.ranks if device == "cuda" else 1
            share = Share(launch.rank if ranks > 1 else 0, ranks, _POINTS_S)
            with _progress(shown=launch.leads, ranks=ranks) as tell:
                own = measure(device, share=share, tell=tell)
        if launch.ranks == 1:
            host = calibration_host.overheads(device) if device == "cuda" else {}
            return None if own is None else replace(own, overheads=host)
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", launch.ranks))
        group = calibration_ranks.Ranks(Stopwatch(device), per_node)
        group.meet()
        host = calibration_host.overheads(device) if device == "cuda" else {}
        return calibration_ranks.together(group, own, host)


@contextlib.contextmanager
def _progress(*, shown: bool, ranks: int) -> Iterator[Callable[[str, int, int], None]]:
    """A line that says what this rank measures, where somebody looks; and one at the end."""
    began, last = perf_counter(), (0, 0)
    with Console(stderr=True, quiet=not shown).status("measuring") as status:

        def tell(kind: str, measured: int, known: int) -> None:
            nonlocal last
            last = measured, known
            status.update(f"measuring {kind}: {measured} points, {units.seconds(perf_counter() - began)}")

        yield tell
    if shown:
        measured, known = last
        left = f", {known - measured} left out for time" if measured < known else ""
        whose = f"the first of {ranks} GPUs: " if ranks > 1 else ""
        typer.echo(f"{whose}{measured} points in {units.seconds(perf_counter() - began)}{left}")
