"""A run as a table for people and as JSON for programs; the JSON has the keys of vLLM's benchmark."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benthic.bench.samples import Lag, Measures, Spread
    from benthic.bench.scenario import Point
    from benthic.spec.objectives import Objectives

MS = 1e3
SHOWN_ERRORS = 5
LONG_NAMES = {
    "ttft": "TTFT  time to first token",
    "tpot": "TPOT  time per output token",
    "itl": "ITL   inter-token latency",
    "e2el": "E2EL  end to end",
}
DEFINITIONS = (
    "Times run from the moment a request was due. TPOT = (last - first token) / (tokens - 1), one value a "
    "request; ITL = time between deliveries / their tokens, one a token. Failed requests miss all targets."
)


def latency_table(measures: Measures, percentiles: Sequence[float]) -> Table:
    """Milliseconds: one row a metric; mean, then the percentiles."""
    table = Table(box=None, pad_edge=False)
    table.add_column("ms")
    for name in ("mean", *(f"p{q:g}" for q in percentiles)):
        table.add_column(name, justify="right")
    for name, spread in measures.spreads.items():
        values = (spread.mean, *(spread.percentiles[q] for q in percentiles))
        table.add_row(LONG_NAMES[name], *(_ms_text(value) for value in values))
    return table


def summary_lines(point: Point, objectives: Objectives | None) -> list[str]:
    """Everything else, as rich markup: throughput, errors, goodput, the client's own lag and warnings."""
    found = point.measures
    failed = f"[bold red]{found.failed} failed[/]" if found.failed else "0 failed"
    offered = "closed loop" if point.offered is None else f"offered {point.offered:.3f} requests/s"
    lines = [
        (
            f"{found.completed} of {found.requests} requests completed, {failed}, "
            f"in {found.duration_s:.2f} s ({offered})"
        ),
        (
            f"throughput  {found.request_rate:.3f} requests/s, {found.output_rate:.1f} output tokens/s, "
            f"{(found.input_tokens + found.output_tokens) / found.duration_s:.1f} tokens/s in all"
        ),
    ]
    lines += error_lines(found.errors)
    if found.attainment is not None and found.goodput is not None:
        lines.append(
            f"goodput     {found.goodput:.3f} requests/s ({found.attainment:.1%} of them met {objectives})"
        )
    lines.append(lag_line(found.lag))
    if point.spoiled is not None:
        lines.append(f"[bold red]not a measurement of the server:[/] {point.spoiled}")
    if not found.counted and found.completed:
        lines.append(
            "[yellow]The server does not count tokens in every chunk: ITL takes each chunk for one token.[/]"
        )
    return lines


def error_lines(errors: dict[str, int]) -> list[str]:
    """The most frequent errors in words; all of them are counted, and all are in the JSON."""
    ordered = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"  [red]{count} x[/] {escape_markup(why)}" for why, count in ordered[:SHOWN_ERRORS]]
    rest = ordered[SHOWN_ERRORS:]
    if rest:
        lines.append(f"  [red]{sum(count for _, count in rest)} x[/] {len(rest)} other errors")
    return lines


def lag_line(lag: Lag) -> str:
    """How late the client was."""
    return (
        f"client      send lag p50 {lag.send_p50 * MS:.2f}, p99 {lag.send_p99 * MS:.2f}, max "
        f"{lag.send_max * MS:.2f} ms; event loop p99 {lag.loop_p99 * MS:.2f} ms; {lag.cpu:.0%} of a core"
    )


def escape_markup(text: str) -> str:
    """The text with rich's brackets made harmless."""
    return text.replace("[", "\\[")


def record(point: Point, *, detailed: bool) -> dict[str, Any]:
    """One run as JSON. `detailed` adds the times of every request, in order of schedule."""
    found = point.measures
    row: dict[str, Any] = {
        "request_rate": "trace" if point.rate is None else finite(point.rate),
        "offered_rate": point.offered,
        "duration": found.duration_s,
        "num_prompts": found.requests,
        "completed": found.completed,
        "failed": found.failed,
        "errors": found.errors,
        "total_input_tokens": found.input_tokens,
        "total_output_tokens": found.output_tokens,
        "request_throughput": found.request_rate,
        "output_throughput": found.output_rate,
        "total_token_throughput": (found.input_tokens + found.output_tokens) / found.duration_s,
        "request_goodput": found.goodput,
        "attainment": found.attainment,
        "token_counts": "every chunk" if found.counted else "one a chunk",
        "client_lag_ms": _lag(found.lag),
        "client_limited": point.spoiled,
    }
    for name, spread in found.spreads.items():
        row |= _spread(name, spread)
    return row | _details(point) if detailed else row


def whole_record(
    points: Iterable[Point], *, provenance: dict[str, Any], settings: dict[str, Any], detailed: bool
) -> dict[str, Any]:
    """The file of one command: where it came from, what was asked, one row a run."""
    rows = [record(point, detailed=detailed) for point in points]
    return {"benchmark": "serve", **provenance, "settings": settings, "runs": rows}


def finite(rate: float) -> float | str:
    """A rate as JSON can carry it."""
    return "inf" if math.isinf(rate) else rate


def _lag(lag: Lag) -> dict[str, float]:
    return {
        "send_p50": lag.send_p50 * MS,
        "send_p99": lag.send_p99 * MS,
        "send_max": lag.send_max * MS,
        "loop_p99": lag.loop_p99 * MS,
        "loop_max": lag.loop_max * MS,
        "cpu_share_of_a_core": lag.cpu,
    }


def _spread(name: str, spread: Spread) -> dict[str, float | None]:
    row = {f"mean_{name}_ms": _ms(spread.mean), f"std_{name}_ms": _ms(spread.std)}
    if 50.0 in spread.percentiles:
        row[f"median_{name}_ms"] = _ms(spread.percentiles[50.0])
    return row | {f"p{q:g}_{name}_ms": _ms(value) for q, value in spread.percentiles.items()}


def _details(point: Point) -> dict[str, Any]:
    samples = point.run.samples
    began = min(sample.origin_s for sample in samples)
    done = [None if sample.failed else sample for sample in samples]
    return {
        "due": [sample.origin_s - began for sample in samples],
        "input_lens": [sample.prompt_tokens for sample in samples],
        "output_lens": [sample.answer.output_tokens for sample in samples],
        "ttfts": [None if sample is None else sample.latencies.ttft_s for sample in done],
        "itls": [[] if sample is None else sample.token_gaps for sample in done],
        "e2els": [None if sample is None else sample.latencies.e2e_s for sample in done],
        "request_errors": [sample.answer.error for sample in samples],
    }


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds * MS


def _ms_text(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * MS:.2f}"
