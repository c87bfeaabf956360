"""Measured steps of an engine, from a result of `benchmarks/serve_gpu.py` or a file of that form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import DataError
from benthic.plan.serving.engine_fit import MeasuredStep
from benthic.plan.serving.steps import StepLoad

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benthic.plan.serving.layout import WeightDtype

DRAWN: Final = 24
"""Tokens that a decode row has drawn half way through its measurement."""
BUDGET: Final = 16384
"""Tokens of a step: more prompts than fit are several steps, which say nothing of one."""


def read_measured(path: Path, weights: WeightDtype) -> list[MeasuredStep]:
    """Decode steps, and prompts that fit one step, of the rows whose weights are in `weights`.

    `{"what": "decode", "weights", "batch", "context", "step_ms"}` and
    `{"what": "prefill", "weights", "prompts": "4 x 4096", "tokens_per_second"}`; others are passed over.

    Raises:
        DataError: no such file, no JSON with rows, or a row of these that lacks a number.
    """
    if not path.is_file():
        msg = f"there is no file {path} of measured steps. Write one with benchmarks/serve_gpu.py."
        raise DataError(msg)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        msg = f"{path} holds no rows of measured steps ({error!r}). Write it with benchmarks/serve_gpu.py."
        raise DataError(msg) from error
    return list(_steps(rows, weights, path))


def _steps(rows: list[dict[str, Any]], weights: WeightDtype, path: Path) -> Iterator[MeasuredStep]:
    for number, row in enumerate(rows, 1):
        if row.get("weights") != weights or row.get("what") not in {"decode", "prefill"}:
            continue
        try:
            found = _decode(row) if row["what"] == "decode" else _prefill(row)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            msg = f"row {number} of {path} is no measured step ({error!r}). Measure it again."
            raise DataError(msg) from error
        if found is not None:
            yield found


def _decode(row: dict[str, Any]) -> MeasuredStep:
    batch, context = int(row["batch"]), int(row["context"])
    load = StepLoad(batch, batch, batch * (context + DRAWN), 0, 0, 0, batch)
    return MeasuredStep(load, row["step_ms"] / 1e3)


def _prefill(row: dict[str, Any]) -> MeasuredStep | None:
    count, length = (int(word) for word in row["prompts"].split(" x "))
    tokens, pairs = count * length, count * length * (length + 1) // 2
    if tokens > BUDGET:
        return None
    load = StepLoad(0, 0, 0, tokens, pairs, tokens, count)
    return MeasuredStep(load, tokens / row["tokens_per_second"])
