"""What became of each request, phase by phase: the page draws it, metrics count it, traces export it.

A phase begins where the one before it ends:

    queue      arrival (tokenising included) until an engine starts with the prompt
    prefill    until the first token
    transfer   until the first token of the instance that pulled the blocks (prefill and decode instances)
    decode     until the last token

A request that moves to other instances goes through phases again. Nothing is written per token, and only the
latest requests are kept, so it costs the same whether anybody looks or not. Prompts and answers are not here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from benthic.serve.messages import FinishReason  # noqa: TC001 (msgspec reads the annotations of entries)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PhaseName = Literal["queue", "prefill", "transfer", "decode"]
PHASES: Final[tuple[PhaseName, ...]] = ("queue", "prefill", "transfer", "decode")

KEPT: Final = 512
"""Requests that are remembered after their end."""


class Phase(NamedTuple):
    """One stretch of a request's life; `where` is the instance's name, "" for a server's only engine."""

    name: PhaseName
    start_s: float
    where: str = ""


@dataclass(eq=False, kw_only=True)
class Entry:
    """One request (one sequence); seconds on the server's clock.

    Attributes:
        number: counts requests, from 1; several processes that answer count in turns.
        first_s: when the first token came.
        end_s: when it ended; None while it goes on.
        met: whether it met every latency target; None without targets or when its client left.
    """

    number: int
    request_id: str
    prompt_tokens: int
    arrival_s: float
    phases: list[Phase] = field(default_factory=list)
    cached_tokens: int = 0
    tokens: int = 0
    first_s: float | None = None
    end_s: float | None = None
    reason: FinishReason | None = None
    met: bool | None = None

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first, of a request that ended."""
        if self.first_s is None or self.end_s is None or self.tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.tokens - 1)

    def spans(self, now: float) -> Iterator[tuple[Phase, float]]:
        """Each phase with its end; the last one of a request that goes on ends `now`."""
        until = now if self.end_s is None else self.end_s
        ends = [phase.start_s for phase in self.phases[1:]]
        yield from zip(self.phases, [*ends, until], strict=False)

    def seconds(self, name: PhaseName) -> float | None:
        """Time spent in phases of that name, of a request that ended; None where there was none."""
        took = [until - phase.start_s for phase, until in self.spans(self.arrival_s) if phase.name == name]
        return sum(took) if took else None


class Journal:
    """Requests in flight and the latest that ended; belongs to one event loop.

    A mark for a request that is not in flight is ignored: it may just have ended.

    Args:
        clock: seconds, monotonic.
        kept: requests that are remembered after their end.
        slot: which of the `slots` processes that number requests this is, from 0.
    """

    def __init__(
        self, clock: Callable[[], float], *, kept: int = KEPT, slot: int = 0, slots: int = 1
    ) -> None:
        self.ended: deque[Entry] = deque(maxlen=kept)
        self.num_ended = 0
        self.clock = clock
        self._slot = slot
        self._slots = slots
        self._active: dict[str, Entry] = {}
        self._listeners: list[Callable[[Entry], None]] = []
        self._number = 0

    @property
    def active(self) -> tuple[Entry, ...]:
        """Requests in flight, in order of submission."""
        return tuple(self._active.values())

    def latest(self, since: int) -> list[Entry]:
        """What ended after `num_ended` was `since`, as far as it is kept."""
        new = self.num_ended - since
        return list(self.ended)[-new:] if new > 0 else []

    def on_end(self, listener: Callable[[Entry], None]) -> None:
        """Call `listener` with every request that ends."""
        self._listeners.append(listener)

    def begin(self, request_id: str, *, arrival_s: float, prompt_tokens: int) -> None:
        """A request was taken; it queues since its arrival."""
        self._number += 1 + (self._slot - self._number) % self._slots
        entry = Entry(
            number=self._number, request_id=request_id, prompt_tokens=prompt_tokens, arrival_s=arrival_s
        )
        entry.phases.append(Phase("queue", arrival_s))
        self._active[request_id] = entry

    def enter(self, request_id: str, name: PhaseName, where: str = "", *, at_s: float | None = None) -> None:
        """A phase begins, now or `at_s`.

        A transfer began with the first token, which may have been seen before it.
        """
        entry = self._active.get(request_id)
        if entry is None:
            return
        start_s = self.clock() if at_s is None else at_s
        if name == "transfer" and entry.phases[-1].name == "decode":
            start_s = entry.phases.pop().start_s
        entry.phases.append(Phase(name, start_s, where))

    def first_token(
        self, request_id: str, *, submitted_s: float, queued_s: float, cached_tokens: int
    ) -> None:
        """The first token came, from an engine that let the request wait for `queued_s`.

        A router has noted where the prompt went; without one, the engine had it since `submitted_s`.
        """
        entry = self._active.get(request_id)
        if entry is None:
            return
        now = entry.first_s = self.clock()
        entry.cached_tokens = cached_tokens
        places = [index for index, phase in enumerate(entry.phases) if phase.name == "prefill"]
        if not places:
            entry.phases.append(Phase("prefill", submitted_s))
        place = places[-1] if places else len(entry.phases) - 1
        phase = entry.phases[place]
        if place == len(entry.phases) - 1:
            entry.phases.append(Phase("decode", now, phase.where))
        until = entry.phases[place + 1].start_s
        entry.phases[place] = phase._replace(start_s=min(phase.start_s + queued_s, until))

    def end(self, request_id: str, reason: FinishReason, *, tokens: int, met: bool | None) -> None:
        """The request ended."""
        entry = self._active.pop(request_id, None)
        if entry is None:
            return
        entry.end_s, entry.reason, entry.tokens, entry.met = self.clock(), reason, tokens, met
        self.conclude(entry)

    def conclude(self, entry: Entry) -> None:
        """Remember a request that ended, and tell who listens."""
        self.show(entry)
        for listener in self._listeners:
            listener(entry)

    def show(self, entry: Entry) -> None:
        """Remember a request that ended elsewhere."""
        self.ended.append(entry)
        self.num_ended += 1
        self._number = max(self._number, entry.number)
