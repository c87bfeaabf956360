"""What `/metrics` reports: the names that vLLM users know, behind our own prefix.

Times are measured in the HTTP process, so they are what a client sees less the network:
TTFT runs from the request's arrival (tokenising and queueing included) to its first token;
ITL is the time between two deliveries of one sequence, divided by the tokens of the later one;
TPOT is (last token - first token) / (tokens - 1), one value a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from benthic.serve.sums import added, counts
from benthic.spec.objectives import Latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from benthic.serve.journal import Entry, PhaseName
    from benthic.serve.messages import FinishReason, Ready, Stats
    from benthic.serve.sums import Counts
    from benthic.spec.objectives import Objectives

# fmt: off
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
          40.0, 80.0, 160.0, 640.0, 2560.0)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
               5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
WHOLE_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
           120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
# fmt: on
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
COUNTS = (1, 2, 5, 10, 20, 50, 100)


def kv_usage(stats: Stats) -> float:
    """Share of blocks in use, 0 to 1."""
    return 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


# name, documentation, how it is read
GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("num_requests_running", "Sequences in the current batch.", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences waiting to be scheduled.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", kv_usage),
    ("kv_blocks", "KV cache blocks in all.", lambda s: s.num_blocks),
    ("kv_blocks_free", "KV cache blocks that no request holds.", lambda s: s.num_free_blocks),
    ("host_cache_blocks", "Blocks of host memory for evicted KV cache blocks.", lambda s: s.host_blocks),
    ("host_cache_blocks_held", "Those that hold something.", lambda s: s.host_blocks_held),
)
COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache_queries,
    ),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    ("host_cache_hits", "Tokens brought back from host memory, not computed.", lambda s: s.host_hits),
    ("host_cache_out_bytes", "Bytes copied to host memory at evictions.", lambda s: s.host_bytes_out),
    ("host_cache_in_bytes", "Bytes brought back from host memory.", lambda s: s.host_bytes_in),
    ("spec_decode_num_drafts", "Rows of sequences that verified drafts.", lambda s: s.drafts),
    ("spec_decode_num_draft_tokens", "Draft tokens verified.", lambda s: s.draft_tokens),
    ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", lambda s: s.accepted_tokens),
    ("num_preemptions", "Times a sequence gave its blocks back to be recomputed.", lambda s: s.preemptions),
    ("engine_steps", "Batches computed.", lambda s: s.steps),
    ("engine_step_seconds", "Seconds spent computing batches.", lambda s: s.step_seconds),
)


class Metrics:
    """Counters and histograms of one server, labelled with the model's name.

    Args:
        model_name: value of the `model_name` label.
        ready: what the engine said of its cache.
        stats: gives the engine's latest report, or None.
        objectives: latency targets that make goodput countable, or None.
    """

    def __init__(
        self,
        model_name: str,
        ready: Ready,
        stats: Callable[[], Stats | None],
        objectives: Objectives | None = None,
    ) -> None:
        self.objectives = objectives
        self._registry = CollectorRegistry(auto_describe=False)
        self._read = CollectorRegistry(auto_describe=False)
        self._model_name = model_name
        self._read.register(_EngineCollector(model_name, ready, stats))
        self._finished = self._counter("request_success", "Sequences ended, by reason.", "finished_reason")
        self._refused = self._counter(
            "request_refused", "Requests answered with an error, by status.", "status"
        )
        self._attained = self._counter(
            "request_attained", "Sequences by whether they met every latency target (--goodput).", "met"
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between tokens.", PER_TOKEN_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", PER_TOKEN_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", WHOLE_S)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token.", WHOLE_S)
        self._phases: dict[PhaseName, Histogram] = {
            "queue": self._histogram("request_queue_time_seconds", "Arrival to the first step.", WHOLE_S),
            "prefill": self._histogram("request_prefill_time_seconds", "First step to first token.", WHOLE_S),
            "transfer": self._histogram(
                "request_transfer_time_seconds", "First token to the next, of another instance.", WHOLE_S
            ),
        }
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a sequence.", TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated.", TOKENS)
        self._max_tokens = self._histogram("request_params_max_tokens", "The `max_tokens` asked.", TOKENS)
        self._n = self._histogram("request_params_n", "The `n` asked.", COUNTS)

    def render(self, others: Sequence[Counts] = ()) -> bytes:
        """The Prometheus text format, version 0.0.4; what other processes counted is added."""
        return generate_latest(self._read) + generate_latest(added(self._registry, others))

    def counts(self) -> Counts:
        """What was counted here, for whoever adds it up."""
        return counts(self._registry)

    def asked(self, *, n: int, max_tokens: int) -> None:
        """A request passed validation."""
        self._n.observe(n)
        self._max_tokens.observe(max_tokens)

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._model_name, str(status)).inc()

    def first_token(self, since_arrival_s: float) -> None:
        """A sequence showed its first token."""
        self._ttft.observe(since_arrival_s)

    def next_tokens(self, interval_s: float, tokens: int) -> None:
        """A sequence showed `tokens` more, `interval_s` after the ones before."""
        for _ in range(tokens):
            self._itl.observe(interval_s / tokens)

    def finished(
        self,
        reason: FinishReason,
        *,
        prompt: int,
        generated: int,
        whole_s: float,
        decode_s: float,
        ttft_s: float | None,
    ) -> bool | None:
        """A sequence ended; seconds from arrival (`whole_s`) and from its first token (`decode_s`).

        A sequence that failed missed its targets; one that its client left says nothing of the server.
        Returns: whether it met every target; None without targets, or when its client left.
        """
        met: bool | None = None
        if self.objectives is not None and reason != "abort":
            met = ttft_s is not None and reason != "error"
            if met:
                tpot_s = decode_s / (generated - 1) if generated > 1 else None
                met = self.objectives.met(Latencies(ttft_s=ttft_s or 0.0, tpot_s=tpot_s, e2e_s=whole_s))
            self._attained.labels(self._model_name, "yes" if met else "no").inc()
        self._finished.labels(self._model_name, reason).inc()
        self._prompt.observe(prompt)
        self._generation.observe(generated)
        self._e2e.observe(whole_s)
        self._decode.observe(decode_s)
        if generated > 1:
            self._tpot.observe(decode_s / (generated - 1))
        return met

    def phases(self, entry: Entry) -> None:
        """A request ended; a phase that it did not reach is not counted."""
        for name, histogram in self._phases.items():
            seconds = entry.seconds(name)
            if seconds is not None:
                histogram.observe(seconds)

    def add(self, collector: Collector) -> None:
        """Report more."""
        self._read.register(collector)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"benthic:{name}", text, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            f"benthic:{name}", text, ["model_name"], registry=self._registry, buckets=tuple(buckets)
        )
        return family.labels(self._model_name)


class _EngineCollector(Collector):
    """The engine's own totals, read at scrape time from its latest report."""

    def __init__(self, model_name: str, ready: Ready, stats: Callable[[], Stats | None]) -> None:
        self._model_name = model_name
        self._ready = ready
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family per gauge and counter, and the cache's shape as labels of a constant 1."""
        shape = GaugeMetricFamily(
            "benthic:cache_config_info",
            "The KV cache's shape, as labels.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        shape.add_metric([self._model_name, str(self._ready.block_size), str(self._ready.num_blocks)], 1.0)
        yield shape
        stats = self._stats()
        if stats is None:
            return
        for name, text, read in GAUGES:
            gauge = GaugeMetricFamily(f"benthic:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], read(stats))
            yield gauge
        for name, text, read in COUNTERS:
            counter = CounterMetricFamily(f"benthic:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], read(stats))
            yield counter
        places = CounterMetricFamily(
            "benthic:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their place in the draft.",
            labels=["model_name", "position"],
        )
        for place, accepted in enumerate(stats.accepted_at):
            places.add_metric([self._model_name, str(place)], accepted)
        yield places
