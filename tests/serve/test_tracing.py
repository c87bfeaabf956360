"""Spans are the journal's phases, at the times when they were."""

from __future__ import annotations

import pytest

from benthic.errors import ConfigError
from benthic.serve import tracing
from benthic.serve.journal import Journal


def finished(reason: str = "stop"):
    now = [10.0]
    journal = Journal(lambda: now[0])
    ended = []
    journal.on_end(ended.append)
    journal.begin("r", arrival_s=9.0, prompt_tokens=7)
    journal.enter("r", "prefill", "prefill-0")
    now[0] = 12.0
    journal.first_token("r", submitted_s=9.5, queued_s=0.5, cached_tokens=4)
    journal.enter("r", "transfer", "decode-1")
    now[0] = 15.0
    journal.end("r", reason, tokens=4, met=True)
    return ended[0]


@pytest.mark.parametrize(("reason", "status"), [("stop", "UNSET"), ("error", "ERROR")])
def test_a_request_is_a_span_with_one_below_it_a_phase(reason: str, status: str) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the otel extra")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = tracing.Traces(provider, model_name="m", since_1970_s=1000.0)
    traces.write(finished(reason))
    traces.close()
    *phases, whole = exporter.get_finished_spans()
    assert whole.name == "llm_request"
    assert whole.status.status_code.name == status
    assert whole.parent is None
    assert {span.parent.span_id for span in phases} == {whole.context.span_id}
    times = [(span.name, span.start_time / 1e9, span.end_time / 1e9) for span in (whole, *phases)]
    assert times == [
        ("llm_request", 1009.0, 1015.0),
        ("queue", 1009.0, 1010.5),
        ("prefill", 1010.5, 1012.0),
        ("transfer", 1012.0, 1015.0),
    ]
    assert phases[-1].attributes == {"benthic.instance": "decode-1"}


def test_attributes_are_what_became_of_the_request() -> None:
    found = dict(tracing.attributes_of(finished(), "m"))
    assert found["gen_ai.usage.prompt_tokens"] == 7
    assert found["gen_ai.usage.completion_tokens"] == 4
    assert found["gen_ai.latency.time_in_queue"] == 1.5
    assert found["gen_ai.latency.time_to_first_token"] == 3.0
    assert found["gen_ai.latency.e2e"] == 6.0
    assert found["benthic.targets_met"] is True


def test_traces_without_the_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'benthic\[otel\]'"):
        tracing.open_traces("http://localhost:4318/v1/traces", model_name="m", since_1970_s=0.0)
