"""What some options of `benthic serve` may be."""

from __future__ import annotations

from enum import StrEnum


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
