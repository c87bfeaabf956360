from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
from made import sample
from rich.console import Console

from benthic.bench import pictures, report
from benthic.bench.load import Run
from benthic.bench.provenance import provenance, without_secrets
from benthic.bench.samples import Lag, Sample, measure
from benthic.bench.scenario import Point
from benthic.bench.session import status
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from pathlib import Path

QS = (50.0, 90.0, 99.0)
TARGETS = Objectives(ttft_s=0.5, tpot_s=0.2)
LAG = Lag(send_p50=0.001, send_p99=0.002, send_max=0.003, loop_p99=0.002, loop_max=0.004, cpu=0.25)


def point(rate: float, samples: list[Sample], spoiled: str | None = None) -> Point:
    measures = measure(samples, TARGETS, percentiles=QS, lag=LAG)
    run = Run(samples=tuple(samples), late_s=(), busy=0.0)
    return Point(rate=rate, offered=rate, measures=measures, run=run, spoiled=spoiled)


def ok(due: float = 0.0) -> Sample:
    return sample((due + 0.1, 1), (due + 0.3, 2), due=due)


def printed(what: object) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_the_table_has_a_row_a_metric_and_a_column_a_percentile() -> None:
    text = printed(report.latency_table(point(1.0, [ok(), ok(1.0)]).measures, QS))
    assert text.split()[:5] == ["ms", "mean", "p50", "p90", "p99"]
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        assert name in text
    assert "100.00" in text


def test_errors_are_counted_and_shown_however_many_kinds_there_are() -> None:
    samples = [ok(), *(sample(error=f"HTTP 400: prompt {i} [x]") for i in range(9)), sample(error="HTTP 503")]
    samples.append(sample(error="HTTP 503"))
    text = "\n".join(printed(line) for line in report.summary_lines(point(1.0, samples), TARGETS))
    assert "1 of 12 requests completed, 11 failed" in text
    assert "2 x HTTP 503" in text
    assert "5 x 5 other errors" in text
    assert "(8.3% of them met ttft:500 tpot:200)" in text


def test_a_spoiled_run_says_so_and_sets_the_exit_status() -> None:
    spoiled = point(1.0, [ok()], spoiled="the client was late: p99 send lag 50.0 ms is above 20 ms")
    assert any("not a measurement of the server" in line for line in report.summary_lines(spoiled, None))
    assert status([point(1.0, [ok()])]) == 0
    assert status([point(1.0, [sample(error="x", due=0.0), sample(error="x", due=1.0)])]) == 1
    assert status([point(1.0, [ok()]), spoiled]) == 3


def test_the_record_has_the_keys_of_vllms_benchmark_and_is_json() -> None:
    row = report.record(point(2.0, [ok(), ok(0.5), sample(error="x", due=0.2)]), detailed=True)
    keys = {
        "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "output_throughput", "total_token_throughput", "request_rate", "num_prompts",
        "input_lens", "output_lens", "ttfts", "itls",
    }  # fmt: skip
    stats = {f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "median", "std", "p99")}
    assert keys | stats <= set(row)
    assert row["mean_ttft_ms"] == pytest.approx(100.0)
    assert row["ttfts"] == pytest.approx([0.1, 0.1, None])
    assert row["attainment"] == pytest.approx(2 / 3)
    json.dumps(row, allow_nan=False)


def test_a_run_without_an_answer_is_json_too() -> None:
    row = report.record(point(2.0, [sample(error="x"), sample(error="x", due=1.0)]), detailed=True)
    assert row["mean_ttft_ms"] is None
    json.dumps(row, allow_nan=False)


def test_provenance_names_the_machine_and_hides_keys() -> None:
    found = provenance(
        ("benthic", "bench", "serve", "--api-key", "secret", "--api-key=secret", "--port", "1")
    )
    assert found["command"] == "benthic bench serve --api-key *** --api-key=*** --port 1"
    assert found["client"]["cores"] >= 1
    assert {"benthic", "python", "aiohttp"} == set(found["versions"])
    assert without_secrets(["--api-key"]) == ["--api-key"]


def test_pictures_are_drawn_as_svg_and_png(tmp_path: Path) -> None:
    points = [point(rate, [ok(), ok(0.5)]) for rate in (4.0, 1.0, 2.0)]
    written = pictures.draw(points, TARGETS, tmp_path / "sweep", attainment=0.9)
    assert {path.name for path in written} == {
        f"sweep_{what}.{kind}" for what in ("latency", "goodput") for kind in ("svg", "png")
    }
    assert all(path.stat().st_size > 1000 for path in written)
    assert (
        "offered rate" in (tmp_path / "sweep_latency.svg").read_text() or b"<svg" in written[0].read_bytes()
    )
    closed = Point(rate=1.0, offered=None, measures=points[0].measures, run=points[0].run, spoiled=None)
    assert pictures.draw([closed], TARGETS, tmp_path / "none", attainment=0.9) == []
