"""How many drafts a step should verify: what was measured decides, and 0 is an answer.

Verifying d drafts makes a step longer and gives, per sequence, one token more for every draft that holds up
to the first that does not. Whether that pays depends on the batch: one sequence leaves a device idle enough
to verify for next to nothing, a large batch does not, and a mixture of experts reads more experts the more
rows there are. So the rate of tokens, `(1 + a_1 + a_1 a_2 + ...) / seconds`, is compared over d; `a_i` is
the share of drafts at place i that held where all before them did (Leviathan et al. 2023, section 3.1, with
one rate a place instead of one for all).

Nothing here reads a clock: times come from the `now` of plans and commits, so a recorded run replays.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benthic.sched.flights import Flight
    from benthic.sched.plans import BatchingConfig, Totals

LATEST: Final = 5
"""Step times kept for a batch and a number of drafts; their median counts."""

ENOUGH: Final = 3
"""Step times after which a measurement is believed."""

PROBE_EVERY: Final = 256
"""Steps with fewer drafts than the most after which the most are tried anew: texts change."""

PROBE_STEPS: Final = 4

TRIAL_STEPS: Final = 32
"""Steps in which a batch without times tries; if prompts are in all of them, the next ones draft nothing."""

MEMORY: Final = 1024
"""Tries after which older ones count half."""


class Landed(NamedTuple):
    """The newest committed step: the next one's time is counted from here."""

    number: int
    now: float


class DraftLength:
    """Chooses the number of drafts for every batch size, from 0 to `num_speculative_tokens`.

    Args:
        config: `adaptive_drafts=False` always chooses the most.
        totals: where drafts are counted.
    """

    def __init__(self, config: BatchingConfig, totals: Totals) -> None:
        most = config.num_speculative_tokens
        self._totals = totals
        totals.accepted_at = [0] * most
        self._most = most
        self._adaptive = config.adaptive_drafts
        self._tries = [0] * most
        self._held = [0] * most
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._trying: dict[int, int] = {}
        self._resting: dict[int, int] = {}
        self._newest: Landed | None = None

    def choose(self, batch: int) -> int:
        """Drafts for each sequence of the next step, whose decodes are `batch`; the fewest among equals."""
        if not (self._adaptive and self._most and batch):
            return self._most
        size = bucket(batch)
        for drafts in (self._most, 0):
            if self._measured(size, drafts) is None:
                return drafts if self._tries_on(size) else 0
        best = max(range(self._most + 1), key=lambda drafts: (self.rate(size, drafts), -drafts))
        return self._most if best < self._most and self._probes(size) else best

    def rate(self, size: int, drafts: int) -> float:
        """Tokens a second of each sequence that `drafts` are expected to give at a batch of `size`."""
        tokens, chance = 1.0, 1.0
        for place in range(drafts):
            chance *= (self._held[place] + 1) / (self._tries[place] + 2)
            tokens += chance
        return tokens / max(self._expected(size, drafts), 1e-9)

    def note(self, flight: Flight, counts: Iterable[int], given: Sequence[int], now: float) -> None:
        """Learn from a step that was committed at `now`.

        `counts` are the tokens of each decode row, `given` the drafts that it had.
        """
        if not self._most:
            return
        for count, drafts in zip(counts, given, strict=False):
            self._count(drafts, count - 1)
            self._learn(drafts, count - 1)
        if self._adaptive:
            self._time(flight, max(given, default=0), now)

    def _count(self, given: int, held: int) -> None:
        self._totals.drafts += given > 0
        self._totals.drafted += given
        self._totals.accepted_drafts += held
        for place in range(held):
            self._totals.accepted_at[place] += 1

    def _learn(self, given: int, held: int) -> None:
        for place in range(min(given, held + 1)):
            self._tries[place] += 1
            self._held[place] += place < held
            if self._tries[place] > MEMORY:
                self._tries[place] //= 2
                self._held[place] //= 2

    def _time(self, flight: Flight, drafts: int, now: float) -> None:
        """Time a step without prefills from the commit before to its own: host time, drafting and all.

        A step with decodes follows the one before without a pause, because those sequences were in work.
        """
        before, self._newest = self._newest, Landed(flight.number, now)
        if flight.decodes and not flight.chunks and before is not None and before.number == flight.number - 1:
            key = (bucket(len(flight.decodes)), drafts)
            self._seconds.setdefault(key, deque(maxlen=LATEST)).append(now - before.now)

    def _measured(self, size: int, drafts: int) -> float | None:
        found = self._seconds.get((size, drafts), ())
        return median(found) if len(found) >= ENOUGH else None

    def _expected(self, size: int, drafts: int) -> float:
        """Seconds of a step: measured, or on the line between no drafts and the most."""
        found = self._measured(size, drafts)
        if found is not None:
            return found
        least, most = self._measured(size, 0) or 0.0, self._measured(size, self._most) or 0.0
        return least + (most - least) * drafts / self._most

    def _tries_on(self, size: int) -> bool:
        """Whether a batch that lacks times goes on trying, or waits because prompts fill its steps."""
        tried = self._trying.get(size, 0)
        self._trying[size] = (tried + 1) % PROBE_EVERY
        return tried < TRIAL_STEPS

    def _probes(self, size: int) -> bool:
        """Whether to try the most again, so that better times and better texts are noticed."""
        rested = self._resting.get(size, 0) + 1
        self._resting[size] = rested % (PROBE_EVERY + PROBE_STEPS)
        return rested > PROBE_EVERY


def bucket(batch: int) -> int:
    """Batch sizes that are timed together: 1, 2, 4, then multiples of 8, as CUDA graphs are padded."""
    for size in (1, 2, 4):
        if batch <= size:
            return size
    return -(-batch // 8) * 8
