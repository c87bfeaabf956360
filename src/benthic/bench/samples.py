"""One request as a client saw it, and how a run's requests add up. Pure: times and counts in, numbers out.

Definitions (seconds of one clock; `origin_s` is when the request was due, so that a client or a server that
falls behind cannot hide it):

    TTFT  first token - origin
    TPOT  (last token - first token) / (output tokens - 1)
    ITL   time between two deliveries / tokens of the later one, once a token
    E2E   last token - origin
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.spec.objectives import Latencies, Objectives

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """`tokens` new tokens that arrived together at `at_s`."""

    at_s: float
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one request got.

    Attributes:
        sent_s: when its bytes were handed to the connection.
        ended_s: when the answer, or the error, was complete.
        deliveries: its tokens in order of arrival; empty deliveries (roles, usage) are left out.
        prompt_tokens: as the server counted, or None.
        output_tokens: as the server counted, else the number of chunks with text.
        counted: whether the server said how many tokens each delivery held.
        error: what went wrong, or None.
    """

    sent_s: float
    ended_s: float
    deliveries: tuple[Delivery, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request of a run: when it was due, when a slot was free for it, and its answer.

    `ready_s` differs from `origin_s` only where `--max-concurrency` made it wait.
    """

    origin_s: float
    ready_s: float
    input_tokens: int | None
    answer: Answer

    @property
    def failed(self) -> bool:
        """Whether there is no complete answer."""
        return self.answer.error is not None

    @property
    def prompt_tokens(self) -> int:
        """As the server counted, else as sent; 0 for text of unknown length."""
        return self.answer.prompt_tokens or self.input_tokens or 0

    @property
    def send_lag_s(self) -> float:
        """How late this client was."""
        return self.answer.sent_s - self.ready_s

    @property
    def latencies(self) -> Latencies:
        """Times of a complete answer."""
        first, last = self.answer.deliveries[0].at_s, self.answer.deliveries[-1].at_s
        tokens = self.answer.output_tokens
        return Latencies(
            ttft_s=first - self.origin_s,
            tpot_s=(last - first) / (tokens - 1) if tokens > 1 else None,
            e2e_s=last - self.origin_s,
        )

    @property
    def token_gaps(self) -> list[float]:
        """ITL of every token after the first delivery."""
        gaps: list[float] = []
        before = self.answer.deliveries[0]
        for delivery in self.answer.deliveries[1:]:
            gaps += [(delivery.at_s - before.at_s) / delivery.tokens] * delivery.tokens
            before = delivery
        return gaps


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of a set of times: mean, deviation and percentiles, in seconds; all NaN for an empty set."""

    mean: float
    std: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, values: Sequence[float], percentiles: Sequence[float]) -> Spread:
        """Summarise; percentiles interpolate linearly between order statistics, as numpy's default does."""
        if not values:
            return cls(mean=math.nan, std=math.nan, percentiles=dict.fromkeys(percentiles, math.nan))
        ordered = sorted(values)
        mean = math.fsum(ordered) / len(ordered)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
        return cls(mean=mean, std=std, percentiles={q: percentile(ordered, q) for q in percentiles})


def percentile(ordered: Sequence[float], q: float) -> float:
    """The `q`-th percentile of sorted values."""
    place = (len(ordered) - 1) * q / 100.0
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lag:
    """How far this client itself fell behind, in seconds; several processes' lags are put together.

    Attributes:
        send_p50, send_p99, send_max: request handed over - moment it was due (or its slot was free).
        loop_p99, loop_max: how late the client's event loop woke up; what it read was stamped as late.
        cpu: share of one core that the client used; of several processes, the busiest one's.
    """

    send_p50: float
    send_p99: float
    send_max: float
    loop_p99: float
    loop_max: float
    cpu: float

    @classmethod
    def of(cls, samples: Sequence[Sample], loop_lags: Sequence[float], cpu: float) -> Lag:
        """Summarise a run."""
        sends = sorted(sample.send_lag_s for sample in samples) or [0.0]
        loops = sorted(loop_lags) or [0.0]
        return cls(
            send_p50=percentile(sends, 50.0),
            send_p99=percentile(sends, 99.0),
            send_max=sends[-1],
            loop_p99=percentile(loops, 99.0),
            loop_max=loops[-1],
            cpu=cpu,
        )

    def limited(self, bound_s: float) -> str | None:
        """Why the client, not the server, may have set the numbers; None when its lag is within `bound_s`."""
        worst = {"send": self.send_p99, "event loop": self.loop_p99}
        name = max(worst, key=lambda each: worst[each])
        if worst[name] <= bound_s:
            return None
        return (
            f"the client was late: p99 {name} lag {worst[name] * 1e3:.1f} ms is above "
            f"{bound_s * 1e3:g} ms (one core {self.cpu:.0%} busy): raise --num-clients"
        )


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What one run says.

    `spreads` has ttft, tpot, itl and e2el. Requests that failed have no times but count in `attainment`, as
    missed. Rates are over `duration_s`, from the first request due to the last answer complete.
    """

    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]
    input_tokens: int
    output_tokens: int
    spreads: dict[str, Spread]
    attained: int | None
    counted: bool
    lag: Lag

    @property
    def requests(self) -> int:
        """Requests of the run."""
        return self.completed + self.failed

    @property
    def request_rate(self) -> float:
        """Requests completed a second."""
        return self.completed / self.duration_s

    @property
    def output_rate(self) -> float:
        """Tokens generated a second."""
        return self.output_tokens / self.duration_s

    @property
    def attainment(self) -> float | None:
        """Share of all requests that met every target; None without targets."""
        return None if self.attained is None else self.attained / self.requests

    @property
    def goodput(self) -> float | None:
        """Requests a second that met every target; None without targets."""
        return None if self.attained is None else self.attained / self.duration_s


def measure(
    samples: Sequence[Sample], objectives: Objectives | None, *, percentiles: Sequence[float], lag: Lag
) -> Measures:
    """Add up a run of at least one request."""
    done = [sample for sample in samples if not sample.failed]
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.answer.error is not None:
            errors[sample.answer.error] = errors.get(sample.answer.error, 0) + 1
    times = [sample.latencies for sample in done]
    values = {
        "ttft": [each.ttft_s for each in times],
        "tpot": [each.tpot_s for each in times if each.tpot_s is not None],
        "itl": [gap for sample in done for gap in sample.token_gaps],
        "e2el": [each.e2e_s for each in times],
    }
    began = min(sample.origin_s for sample in samples)
    return Measures(
        duration_s=max(sample.answer.ended_s for sample in samples) - began,
        completed=len(done),
        failed=len(samples) - len(done),
        errors=errors,
        input_tokens=sum(sample.prompt_tokens for sample in done),
        output_tokens=sum(sample.answer.output_tokens for sample in done),
        spreads={name: Spread.of(each, percentiles) for name, each in values.items()},
        attained=None if objectives is None else sum(objectives.met(each) for each in times),
        counted=all(sample.answer.counted for sample in done),
        lag=lag,
    )
