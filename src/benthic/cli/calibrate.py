"""`benthic calibrate`: measure this machine for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from benthic import units


def calibrate(
    out: Annotated[Path, typer.Option(help="Where the profile is written.")] = Path("profile.json"),
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")
    ] = "auto",
) -> None:
    """Time products and streams of this machine, in under two minutes, and say how well they foretell others.

    Example: benthic calibrate --out profile.json; benthic plan train tiny ... --profile profile.json
    """
    import torch  # noqa: PLC0415 (the other commands start without it)

    from benthic.cli.calibration import calibrate as measure  # noqa: PLC0415
    from benthic.cli.calibration import errors  # noqa: PLC0415

    found = "cuda" if torch.cuda.is_available() else "cpu"
    profile = measure(found if device == "auto" else device)
    out.write_text(profile.as_json(), encoding="utf-8")
    for kind, error in errors(profile).items():
        count = len(profile.kinds[kind])
        typer.echo(f"{kind:<28} {count:3} points, left out one by one: median error {units.percent(error)}")
    typer.echo(f"wrote {out}: {profile.hardware}, {profile.source}")
