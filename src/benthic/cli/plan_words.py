"""Options that `benthic plan` commands share, and what their words stand for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benthic.errors import ConfigError
from benthic.spec import hardware as gpus
from benthic.spec import hf, presets

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine
    from benthic.plan.serving.layout import WeightDtype
    from benthic.spec.model import ModelConfig

Model = Annotated[
    str, typer.Argument(help=f"A config.json, the folder of one, or one of: {', '.join(presets.names())}.")
]
Hardware = Annotated[str, typer.Option(help=f"One of: {', '.join(gpus.names())}.")]
PerNode = Annotated[int, typer.Option(help="GPUs that NVLink joins.", min=1)]
ProfileFile = Annotated[Path | None, typer.Option("--profile", help="What `benthic calibrate` measured.")]
EngineWord = Annotated[
    str, typer.Option("--engine", help="tuned, benthic, or what `benthic plan engine` wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def config_of(name: str) -> ModelConfig:
    """A path if it looks like one or exists, else a preset."""
    path = Path(name)
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        return hf.read(path).config
    return presets.get(name)


def machine_of(name: str, gpus_per_node: int, profile: Path | None) -> Machine:
    """GPUs by name, priced by a profile of one's own where there is one.

    Raises:
        ConfigError: there is no such profile, or it is of a machine without known peaks, such as a CPU.
    """
    from benthic.plan.cost import machine as machines  # noqa: PLC0415 (see cli.plan)

    own = None if profile is None else machines.read(profile)
    machine = machines.get(name, gpus_per_node=gpus_per_node, profile=own)
    if own is not None and own.hardware not in gpus.names():
        msg = (
            f"{profile} was measured on {own.hardware}, which is none of {', '.join(gpus.names())}: "
            f"its times say nothing about {name}. Run `benthic calibrate` on one of these, or leave "
            "--profile out."
        )
        raise ConfigError(msg)
    return machine


def refuse_no_folder(*files: Path | None) -> None:
    """Refuse to plan what could not be written.

    Raises:
        ConfigError: a file's folder is not there.
    """
    for file in files:
        if file is not None and not file.parent.is_dir():
            msg = f"{file} cannot be written: there is no folder {file.parent}. Make it first."
            raise ConfigError(msg)


def bound_of(name: str, value: float | None) -> float | None:
    """Seconds of a target.

    Raises:
        ConfigError: they are not above 0, or infinite.
    """
    if value is not None and not 0.0 < value < math.inf:
        how = "is always kept; leave it out for any time, or" if value == math.inf else "can never be kept;"
        msg = f"--{name} {value} s {how} give seconds above 0, such as --{name} 0.5"
        raise ConfigError(msg)
    return value


def refuse_rows_beyond(config: ModelConfig, tokens: int, words: str) -> None:
    """Refuse rows of more tokens than the model has positions, as trainer and server do.

    Raises:
        ConfigError: with both numbers; `words` say which options gave them.
    """
    if tokens > config.max_position_embeddings:
        msg = (
            f"{words} is {tokens} tokens, but {config.name} has {config.max_position_embeddings} positions. "
            "Shorten them, or give a config.json with a longer context."
        )
        raise ConfigError(msg)


def dtype_of(option: str, word: str, *, auto: bool = False) -> WeightDtype | None:
    """A dtype by its word; None for "auto".

    Raises:
        ConfigError: it is none.
    """
    if word == "fp8":
        return "fp8"
    if word == "bf16":
        return "bf16"
    if word == "auto" and auto:
        return None
    known = "auto, fp8 or bf16" if auto else "fp8 or bf16"
    msg = f"--{option} {word!r} is not {known}"
    raise ConfigError(msg)
