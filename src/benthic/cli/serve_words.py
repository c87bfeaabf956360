"""What some options of `benthic serve` may be, and what others come to."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


class Dtype(StrEnum):
    """Precision of weights and cache."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LoadFormat(StrEnum):
    """Where weights come from."""

    auto = "auto"
    dummy = "dummy"


class Quantization(StrEnum):
    """What becomes of FP8 weights."""

    auto = "auto"
    fp8 = "fp8"
    none = "none"


class CacheDtype(StrEnum):
    """What the latent cache stores."""

    auto = "auto"
    fp8 = "fp8"
    fp8_e4m3 = "fp8_e4m3"


class ToolParser(StrEnum):
    """How the model writes tool calls."""

    auto = "auto"
    none = "none"
    deepseek_v3 = "deepseek_v3"
    deepseek_v31 = "deepseek_v31"


class ReasoningParser(StrEnum):
    """How the model writes reasoning."""

    auto = "auto"
    none = "none"
    deepseek_r1 = "deepseek_r1"


class LogLevel(StrEnum):
    """How much uvicorn says."""

    critical = "critical"
    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"
    trace = "trace"


def one_model(positional: Path | None, flag: Path | None) -> Path:
    """The one folder that is named. Raises: ConfigError when there is none, or two."""
    if positional is not None and flag is not None and positional != flag:
        msg = f"MODEL = {positional} but --model = {flag}. Give one of them."
        raise ConfigError(msg)
    chosen = positional or flag
    if chosen is None:
        msg = "no model given. Usage: benthic serve MODEL"
        raise ConfigError(msg)
    return chosen


def api_keys(given: list[str] | None) -> tuple[str, ...]:
    """Keys of the flags, else of BENTHIC_API_KEY. Raises: ConfigError for an empty one."""
    from_environment = os.environ.get("BENTHIC_API_KEY")
    keys = tuple(given or ([from_environment] if from_environment else []))
    if any(not key.strip() for key in keys):
        msg = "--api-key is empty. Leave it out to serve without keys."
        raise ConfigError(msg)
    return keys


def recording(folder: Path | None) -> str | None:
    """The file that gets an engine's calls; makes the folder."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "engine.jsonl")


def traces_endpoint(given: str | None) -> str | None:
    """The collector that traces go to. Raises: ConfigError for what is no URL of HTTP."""
    if given is not None and not re.match(r"https?://[^/]", given):
        msg = (
            f"--otlp-traces-endpoint {given} is no URL of a collector that takes OTLP over HTTP. "
            "Write it as http://localhost:4318/v1/traces."
        )
        raise ConfigError(msg)
    return given


def given(**options: Any) -> dict[str, Any]:
    """Those that were given; the others have their defaults where they are read."""
    return {name: value for name, value in options.items() if value is not None}
