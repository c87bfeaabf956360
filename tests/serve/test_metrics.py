from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benthic.serve.messages import Ready, Stats
from benthic.serve.metrics import Metrics
from benthic.serve.server import report_line
from benthic.spec.objectives import Objectives

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "serving.md"
READY = Ready(
    model_name="m", max_model_len=64, vocab_size=10, eos_token_ids=(1,), num_blocks=8, block_size=16
)


def stats(**changes: float) -> Stats:
    named = {"num_blocks": 8, "num_free_blocks": 8, "accepted_at": ()}
    values = dict.fromkeys(Stats.__struct_fields__, 0) | named | changes
    return Stats(**values)


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        sample.name
        + "".join(f"{{{v}}}" for k, v in sorted(sample.labels.items()) if k != "model_name"): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_guide_lists_exactly_the_metrics_there_are() -> None:
    metrics = Metrics("m", READY, stats)
    metrics.finished("stop", prompt=1, generated=2, whole_s=1.0, decode_s=0.5, ttft_s=0.5)
    metrics.refused(400)
    text = metrics.render().decode()
    kinds = dict(re.findall(r"^# TYPE (benthic:\w+) (\w+)", text, re.MULTILINE))
    exposed = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `benthic:")]
    listed = {name: row[2].strip() for row in rows for name in re.findall(r"benthic:\w+", row[1])}
    assert listed == exposed


def test_the_dashboard_asks_for_metrics_there_are() -> None:
    dashboard = json.loads((PAGE.parent / "grafana.json").read_text())
    metrics = Metrics("m", READY, stats)
    text = metrics.render().decode()
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name.removesuffix("_bucket") for expr in exprs for name in re.findall(r"benthic:\w+", expr)}
    there = set(re.findall(r"^# TYPE (benthic:\w+)", text, re.MULTILINE))
    assert asked <= there
    assert len(exprs) > 20


def test_goodput_counts_what_met_every_target() -> None:
    metrics = Metrics("m", READY, stats, Objectives(ttft_s=0.5, tpot_s=0.1))
    ended = {"prompt": 1, "generated": 11, "whole_s": 2.0}
    metrics.finished("stop", **ended, decode_s=0.9, ttft_s=0.4)
    metrics.finished("stop", **ended, decode_s=1.1, ttft_s=0.4)
    metrics.finished("length", **ended, decode_s=0.9, ttft_s=0.6)
    metrics.finished("error", **ended, decode_s=0.9, ttft_s=0.4)
    metrics.finished("abort", **ended, decode_s=9.0, ttft_s=9.0)
    found = samples(metrics)
    assert found["benthic:request_attained_total{yes}"] == 1
    assert found["benthic:request_attained_total{no}"] == 3


def test_engine_gauges_and_counters_are_those_of_its_latest_report() -> None:
    latest = [None, stats(num_running=3, num_waiting=2, num_free_blocks=6, prompt_tokens=40, preemptions=1)]
    metrics = Metrics("m", READY, lambda: latest[-1])
    found = samples(metrics)
    assert found["benthic:num_requests_running"] == 3
    assert found["benthic:num_requests_waiting"] == 2
    assert found["benthic:kv_cache_usage_perc"] == 0.25
    assert found["benthic:kv_blocks_free"] == 6
    assert found["benthic:prompt_tokens_total"] == 40
    assert found["benthic:num_preemptions_total"] == 1
    latest[-1] = stats(prompt_tokens=50)
    assert samples(metrics)["benthic:prompt_tokens_total"] == 50
    latest[-1] = None
    assert "benthic:num_requests_running" not in samples(metrics)


def test_latencies_follow_their_definitions() -> None:
    metrics = Metrics("m", READY, lambda: None)
    metrics.first_token(0.25)
    metrics.next_tokens(0.6, 3)
    metrics.finished("length", prompt=7, generated=4, whole_s=0.85, decode_s=0.6, ttft_s=0.25)
    metrics.finished("abort", prompt=7, generated=1, whole_s=0.3, decode_s=0.0, ttft_s=0.2)
    found = samples(metrics)
    assert found["benthic:time_to_first_token_seconds_sum"] == 0.25
    assert found["benthic:inter_token_latency_seconds_count"] == 3
    assert found["benthic:inter_token_latency_seconds_sum"] == pytest.approx(0.6)
    assert (
        found["benthic:request_time_per_output_token_seconds_count"] == 1
    )  # one token has no time per token
    assert found["benthic:request_time_per_output_token_seconds_sum"] == pytest.approx(0.2)
    assert found["benthic:e2e_request_latency_seconds_count"] == 2
    assert found["benthic:request_success_total{length}"] == 1
    assert found["benthic:request_success_total{abort}"] == 1
    assert found["benthic:request_prompt_tokens_sum"] == 14


def test_the_log_line_reports_rates_since_the_line_before() -> None:
    before = stats(prompt_tokens=100, generation_tokens=50)
    now = stats(
        prompt_tokens=600, generation_tokens=150, num_running=4, num_waiting=1, num_free_blocks=2,
        prefix_cache_queries=200, prefix_cache_hits=50,
    )  # fmt: skip
    assert report_line(before, now, 10.0) == (
        "prompt 50.0 tokens/s, generation 10.0 tokens/s, running 4, waiting 1, KV cache 75.0%, "
        "prefix cache hits 25.0%"
    )
