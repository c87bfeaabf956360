"""Traces of requests by OpenTelemetry: a span `llm_request`, and one below it for every phase of the journal.

Names of attributes are those of vLLM. Spans are made when a request ends, from times that were noted before,
so requests in flight pay nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.serve.journal import Entry

SERVICE_NAME: Final = "benthic"
SPAN: Final = "llm_request"


class Traces:
    """Writes every request that ends.

    Args:
        provider: an OpenTelemetry `TracerProvider` of the SDK.
        model_name: what is served.
        since_1970_s: what to add to the server's clock.
    """

    def __init__(self, provider: Any, *, model_name: str, since_1970_s: float) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("benthic.serve")
        self._model_name = model_name
        self._since_1970_s = since_1970_s

    def write(self, entry: Entry) -> None:
        """Make the spans of a request."""
        from opentelemetry import trace  # noqa: PLC0415 (an extra)

        end_s = entry.arrival_s if entry.end_s is None else entry.end_s
        attributes = dict(attributes_of(entry, self._model_name))
        whole = self._tracer.start_span(SPAN, start_time=self._ns(entry.arrival_s), attributes=attributes)
        below = trace.set_span_in_context(whole)
        for phase, until in entry.spans(end_s):
            where = {"benthic.instance": phase.where} if phase.where else {}
            span = self._tracer.start_span(
                phase.name, context=below, start_time=self._ns(phase.start_s), attributes=where
            )
            span.end(self._ns(until))
        if entry.reason == "error":
            whole.set_status(trace.StatusCode.ERROR)
        whole.end(self._ns(end_s))

    def close(self) -> None:
        """Export what is left; may take seconds when the collector does not answer."""
        self._provider.shutdown()

    def _ns(self, at_s: float) -> int:
        return round((at_s + self._since_1970_s) * 1e9)


def open_traces(endpoint: str, *, model_name: str, since_1970_s: float) -> Traces:
    """Traces that go to an OTLP collector over HTTP, such as `http://localhost:4318/v1/traces`.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found]  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # type: ignore[import-not-found]  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # type: ignore[import-not-found]  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import (  # type: ignore[import-not-found]  # noqa: PLC0415
            BatchSpanProcessor,
        )
    except ImportError as error:
        msg = f"--otlp-traces-endpoint {endpoint}, but {error.name} is missing. pip install 'benthic[otel]'."
        raise ConfigError(msg) from error
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Traces(provider, model_name=model_name, since_1970_s=since_1970_s)


def attributes_of(entry: Entry, model_name: str) -> Iterator[tuple[str, str | int | float]]:
    """What the span of a request says of it; times in seconds."""
    yield "gen_ai.request.id", entry.request_id
    yield "gen_ai.response.model", model_name
    yield "gen_ai.usage.prompt_tokens", entry.prompt_tokens
    yield "gen_ai.usage.completion_tokens", entry.tokens
    yield "benthic.cached_tokens", entry.cached_tokens
    yield "benthic.finish_reason", entry.reason or ""
    queued_s = entry.seconds("queue")
    if queued_s is not None:
        yield "gen_ai.latency.time_in_queue", queued_s
    if entry.ttft_s is not None:
        yield "gen_ai.latency.time_to_first_token", entry.ttft_s
    if entry.end_s is not None:
        yield "gen_ai.latency.e2e", entry.end_s - entry.arrival_s
    if entry.met is not None:
        yield "benthic.targets_met", entry.met
