"""Measured steps of an engine, from a result of `benchmarks/serve_gpu.py` or a file of that form."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import DataError
from benthic.plan.serving.engine_fit import MeasuredStep, non_negative_line
from benthic.plan.serving.fronts import FrontCost
from benthic.plan.serving.steps import StepLoad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benthic.plan.serving.layout import WeightDtype

DRAWN: Final = 24
"""Tokens that a decode row has drawn half way through its measurement."""
BUDGET: Final = 16384
"""Tokens of a step: more prompts than fit are several steps, which say nothing of one."""


def read_measured(path: Path, weights: WeightDtype, *, graph_rows: int = 0) -> list[MeasuredStep]:
    """Decode steps, and prompts that fit one step, of the rows whose weights are in `weights`.

    `{"what": "decode", "weights", "batch", "context", "step_ms"}`,
    `{"what": "prefill", "weights", "prompts": "4 x 4096", "tokens_per_second"}` and
    `{"what": "a prompt beside decodes", "weights", "prompt", "batch", "context", "step_ms"}`; others are
    passed over. Where one of the latter two has `as_written_ms`, it is two steps, the first of them a graph
    if it has no more than `graph_rows` rows. A prompt that was also measured step after step, "beside" 0
    decodes, is taken from there: alone it waits for the host as well.

    Raises:
        DataError: no such file, no JSON with rows, or a row of these that lacks a number.
    """
    numbered = enumerate(_rows(path, "measured steps", "serve_gpu.py"), 1)
    rows = {number: row for number, row in numbered if row.get("weights") == weights}
    chained = {f"1 x {row.get('prompt')}" for row in rows.values() if row.get("batch") == 0}
    kept = {number: row for number, row in rows.items() if row.get("prompts") not in chained}
    return list(_steps(kept, path, graph_rows))


def read_host(path: Path, weights: WeightDtype) -> float:
    """Seconds of the host that a step with prompts shows where no step before it hides them; 0 if unknown.

    The shortest prompt that was measured both ways, alone and step after step, says it: of longer ones, a
    device that rested in between is faster alone. Rows as for `read_measured`, and errors.
    """
    rows = [row for row in _rows(path, "measured steps", "serve_gpu.py") if row.get("weights") == weights]
    chained = {row["prompt"]: row["step_ms"] / 1e3 for row in rows if row.get("batch") == 0}
    alone = {
        length: length / row["tokens_per_second"]
        for length in chained
        for row in rows
        if row.get("prompts") == f"1 x {length}"
    }
    shortest = min(alone, default=None)
    return 0.0 if shortest is None else max(0.0, alone[shortest] - chained[shortest])


def read_front(paths: Sequence[Path]) -> FrontCost:
    """What one process that answers HTTP takes, of results of `benchmarks/front.py` put together.

    `{"fronts": 1, "events_a_token", "cpu_us_a_token"}` are tokens written, several at a time where the
    process was behind; `{"fronts": 1, "prompt_tokens", "cpu_us_a_request"}` requests for one token. Rows with
    more fronts are passed over, but for `{"fronts", "prompt_tokens", "ms_a_first_token"}`: how long after a
    request its first token was with the client, the engine's step taken off. What is the front's own of that
    is no way; without such rows ways take no time.

    Raises:
        DataError: no such file, no JSON with rows, or fewer than two rows of either kind.
    """
    rows = [
        row
        for path in paths
        for row in _rows(path, "what a front takes", "front.py")
        if row.get("fronts", 1) == 1
    ]
    writes = [(r["events_a_token"], r["cpu_us_a_token"] / 1e6) for r in rows if "cpu_us_a_token" in r]
    asked = [(r["prompt_tokens"], r["cpu_us_a_request"] / 1e6) for r in rows if "cpu_us_a_request" in r]
    sizes = [len({size for size, _ in pairs}) for pairs in (writes, asked)]
    if min(sizes) < 2:
        msg = (
            f"{', '.join(map(str, paths))}: rows with {sizes[0]} different events_a_token and {sizes[1]} "
            "different prompt_tokens for one front, but 2 of each are needed. Measure more streams with "
            "benchmarks/front.py."
        )
        raise DataError(msg)
    token_s, write_s = non_negative_line(writes)
    request_s, prompt_token_s = non_negative_line(asked)
    answered = max(0.0, request_s - write_s - token_s)
    cost = FrontCost(request_s=answered, prompt_token_s=prompt_token_s, write_s=write_s, token_s=token_s)
    return _with_ways(cost, [row for path in paths for row in _rows(path, "what a front takes", "front.py")])


def _with_ways(cost: FrontCost, rows: Sequence[dict[str, Any]]) -> FrontCost:
    """The same with what first tokens took besides, of one front and of several."""
    ways: dict[bool, list[float]] = {False: [], True: []}
    for row in rows:
        if "ms_a_first_token" in row:
            own_s = cost.seconds(row["prompt_tokens"], 1)
            ways[row["fronts"] > 1].append(row["ms_a_first_token"] / 1e3 - own_s)
    if not ways[False]:
        return cost
    way_s = max(0.0, median(ways[False]))
    hub_s = max(0.0, median(ways[True]) - way_s) if ways[True] else 0.0
    return replace(cost, way_s=way_s, hub_s=hub_s)


def _rows(path: Path, what: str, script: str) -> list[dict[str, Any]]:
    if not path.is_file():
        msg = f"there is no file {path} of {what}. Write one with benchmarks/{script}."
        raise DataError(msg)
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        msg = f"{path} holds no rows of {what} ({error!r}). Write it with benchmarks/{script}."
        raise DataError(msg) from error


def _steps(rows: dict[int, dict[str, Any]], path: Path, graph_rows: int) -> Iterator[MeasuredStep]:
    """Steps of rows by their numbers in the file."""
    for number, row in rows.items():
        read = _READERS.get(row.get("what", ""))
        if read is None:
            continue
        try:
            found, written = read(row), float(row.get("as_written_ms", 0.0)) / 1e3
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            msg = f"row {number} of {path} is no measured step ({error!r}). Measure it again."
            raise DataError(msg) from error
        if found is None:
            continue
        recorded = bool(written) and found.load.tokens <= graph_rows
        yield found._replace(recorded=recorded)
        if recorded:
            yield found._replace(seconds=written)


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


def _beside(row: dict[str, Any]) -> MeasuredStep:
    length, batch, context = int(row["prompt"]), int(row["batch"]), int(row["context"])
    pairs = length * (length + 1) // 2
    load = StepLoad(batch, batch, batch * (context + DRAWN), length, pairs, length, batch + 1)
    return MeasuredStep(load, row["step_ms"] / 1e3)


_READERS: Final[dict[str, Callable[[dict[str, Any]], MeasuredStep | None]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "a prompt beside decodes": _beside,
}
