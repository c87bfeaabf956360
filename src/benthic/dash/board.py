"""What the page shows: a sample of the server every second, and the phases of its latest requests.

Samples are taken whether anybody looks or not (a few hundred numbers, so that a page that opens has a past);
requests are written down for the page only while somebody looks.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from benthic import __version__
from benthic.serve.metrics import kv_usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from benthic.serve.journal import Entry
    from benthic.serve.messages import Stats
    from benthic.serve.service import Service
    from benthic.spec.objectives import Objectives

PERIOD_S: Final = 1.0
KEPT: Final = 600
"""Samples that are kept: ten minutes."""

WINDOW_S: Final = 10.0
"""Latencies and goodput are those of so many seconds before a sample."""

MOST_CARDS: Final = 120
"""Requests in flight that the page is told of; the others are only counted."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The server at one moment. Times in seconds, `at` since 1970; rates a second since the sample before.

    `ttft` and `tpot` are median and 99th percentile of the last `WINDOW_S`; None where there was none.
    `goodput` counts requests a second that met every target, `attained` is their share: None without targets.
    """

    at: float
    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    prompt_rate: float = 0.0
    generation_rate: float = 0.0
    busy: float = 0.0
    ended: float = 0.0
    ttft: tuple[float, float] | None = None
    tpot: tuple[float, float] | None = None
    goodput: float | None = None
    attained: float | None = None
    acceptance: float | None = None


class RequestCard(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the timeline draws it: phases are name, start, end, instance; times since 1970."""

    number: int
    id: str
    prompt: int
    cached: int
    tokens: int
    phases: list[tuple[str, float, float, str]]
    reason: str | None
    ttft: float | None
    tpot: float | None
    met: bool | None


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a fleet."""

    name: str
    role: str
    status: str
    requests: int
    queued_tokens: int
    kv: float


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag="opening", tag_field="kind"):
    """The first event: what is served, and the past."""

    version: str
    model: str
    chat: bool
    targets: dict[str, float]
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    window_s: float
    samples: list[Sample]
    requests: list[RequestCard]
    instances: list[InstanceRow]


class Tick(msgspec.Struct, frozen=True, kw_only=True, tag="tick", tag_field="kind"):
    """Every later event: one more sample, and requests that are in flight or have just ended."""

    sample: Sample
    requests: list[RequestCard]
    unlisted: int
    instances: list[InstanceRow]


class Board:
    """Samples one server; belongs to its event loop.

    Args:
        service: the server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._before: tuple[float, Stats] | None = None
        self._viewers = 0
        self._num_ended = 0
        self._ticked = asyncio.Event()
        self._latest = b""
        self._since_1970_s = service.wall() - service.clock()
        self._encode = msgspec.json.Encoder().encode

    async def run(self) -> None:
        """Take a sample every second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.tick()

    async def events(self) -> AsyncGenerator[bytes]:
        """JSON of `Opening`, then of a `Tick` a second, until the server drains."""
        self._viewers += 1
        try:
            yield self._encode(self.opening())
            while not self._service.draining:
                await self._ticked.wait()
                yield self._latest
        finally:
            self._viewers -= 1

    def tick(self) -> None:
        """Take a sample, and tell whoever looks."""
        now = self._service.clock()
        sample = self.sample(now)
        self._samples.append(sample)
        journal, since = self._service.journal, self._num_ended
        self._num_ended = journal.num_ended
        if not self._viewers:
            return
        active, ended = journal.active, journal.latest(since)
        shown = active[:MOST_CARDS]
        tick = Tick(
            sample=sample,
            requests=[self._card(entry, now) for entry in (*shown, *ended[-MOST_CARDS:])],
            unlisted=len(active) - len(shown),
            instances=self._instances(),
        )
        self._latest = self._encode(tick)
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()

    def opening(self) -> Opening:
        """What a page that opens is told."""
        service, now = self._service, self._service.clock()
        entries = [*service.journal.ended, *service.journal.active[:MOST_CARDS]]
        return Opening(
            version=__version__,
            model=service.model_name,
            chat=service.template is not None,
            targets=targets_of(service.metrics.objectives),
            max_model_len=service.ready.max_model_len,
            num_blocks=service.ready.num_blocks,
            block_size=service.ready.block_size,
            max_num_seqs=service.settings.max_num_seqs,
            window_s=WINDOW_S,
            samples=list(self._samples),
            requests=[self._card(entry, now) for entry in entries],
            instances=self._instances(),
        )

    def sample(self, now: float) -> Sample:
        """The server `now`, and its rates since the sample before."""
        stats = self._service.client.stats
        if stats is None:
            return Sample(at=now + self._since_1970_s)
        before_s, before = self._before or (now, stats)
        self._before = (now, stats)
        took_s = max(now - before_s, 1e-9)
        drafted = stats.draft_tokens - before.draft_tokens
        latest = self._latest_entries(now - WINDOW_S)
        ended = [entry for entry in latest if entry.end_s is not None and entry.end_s > now - WINDOW_S]
        judged = [entry.met for entry in ended if entry.met is not None]
        targets = self._service.metrics.objectives is not None
        return Sample(
            at=now + self._since_1970_s,
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv=kv_usage(stats),
            prompt_rate=(stats.prompt_tokens - before.prompt_tokens) / took_s,
            generation_rate=(stats.generation_tokens - before.generation_tokens) / took_s,
            busy=(stats.step_seconds - before.step_seconds) / took_s,
            ended=len(ended) / WINDOW_S,
            ttft=median_and_p99(entry.ttft_s for entry in latest if (entry.first_s or 0.0) > now - WINDOW_S),
            tpot=median_and_p99(entry.tpot_s for entry in ended),
            goodput=sum(judged) / WINDOW_S if targets else None,
            attained=sum(judged) / len(judged) if judged else None,
            acceptance=(stats.accepted_tokens - before.accepted_tokens) / drafted if drafted > 0 else None,
        )

    def _latest_entries(self, since: float) -> list[Entry]:
        """Requests in flight, and those that ended later than `since`; they come in no strict order."""
        journal = self._service.journal
        return [*journal.active, *(entry for entry in journal.ended if (entry.end_s or 0.0) > since)]

    def _instances(self) -> list[InstanceRow]:
        instances = self._service.whole.instances
        if instances is None:
            return []
        return [
            InstanceRow(
                name=row.name,
                role=row.role,
                status=row.status,
                requests=row.requests,
                queued_tokens=row.queued_tokens,
                kv=row.used_blocks / row.num_blocks if row.num_blocks else 0.0,
            )
            for row in instances.seen
        ]

    def _card(self, entry: Entry, now: float) -> RequestCard:
        shift = self._since_1970_s
        return RequestCard(
            number=entry.number,
            id=entry.request_id,
            prompt=entry.prompt_tokens,
            cached=entry.cached_tokens,
            tokens=entry.tokens,
            phases=[
                (phase.name, phase.start_s + shift, until + shift, phase.where)
                for phase, until in entry.spans(now)
            ],
            reason=entry.reason,
            ttft=entry.ttft_s,
            tpot=entry.tpot_s,
            met=entry.met,
        )


def targets_of(objectives: Objectives | None) -> dict[str, float]:
    """The latency targets that there are, in seconds."""
    if objectives is None:
        return {}
    bounds = {"ttft": objectives.ttft_s, "tpot": objectives.tpot_s, "e2el": objectives.e2e_s}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def median_and_p99(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The nearest ranks; None of nothing."""
    ordered = sorted([value for value in values if value is not None])
    return (_rank(ordered, 0.5), _rank(ordered, 0.99)) if ordered else None


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[math.ceil(share * len(ordered)) - 1]
