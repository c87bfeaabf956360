"""How many drafts a step should verify: what was measured decides, and 0 is an answer.

Verifying d drafts makes a step longer and gives, per sequence, one token more for every draft that holds up
to the first that does not. Whether that pays depends on the batch: one sequence leaves a device idle enough
to verify for next to nothing, a large batch does not, and a mixture of experts reads more experts the more
rows there are. So the rate of tokens, `(1 + a_1 + a_1 a_2 + ...) / seconds`, is compared over d; `a_i` is
the share of sequences whose draft at place i held among those where all before it did (Leviathan et al.
2023, section 3.1, with one rate a place instead of one for all). A sequence that was to have drafts and got
fewer, because its drafter knew none, counts like one whose drafts did not hold: it waited for the others'.

Short runs must not pay for learning. A batch size is tried step by step and given up as soon as what its
drafts may give at most cannot repay the step; sizes within a factor of two of a known one start from its
times; and another number is tried again only after so many steps that trying costs a small share of them.

Nothing here reads a clock: times come from the `now` of plans and commits, so a recorded run replays.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benthic.sched.flights import Flight
    from benthic.sched.plans import BatchingConfig, Totals

LATEST: Final = 8
"""Step times kept for a batch and a number of drafts; their mean counts, without the longest."""

ENOUGH: Final = 3
"""Step times after which a measurement is believed."""

EARLY: Final = 2
"""Step times after which drafts are given up that could not repay the shortest of them."""

TRIAL_STEPS: Final = 8
"""Steps in which a size without times tries, of every `TRIAL_EVERY`: prompts may be in all of them."""

TRIAL_EVERY: Final = 256

PROBE_STEPS: Final = 2
"""Steps with another number of drafts than the best, so that better times and better texts are noticed."""

PROBE_SHARE: Final = 1 / 64
"""What probes may cost, as a share of the steps between them."""

PAUSES: Final = (16, 1024)
"""The fewest and the most steps between two probes."""

MEMORY: Final = 1024
"""Tries after which older ones count half."""


class Landed(NamedTuple):
    """The newest committed step: the next one's time is counted from here."""

    number: int
    now: float


@dataclass(eq=False)
class Size:
    """What is known of one batch size, by drafts asked for, and where its trials and probes are.

    Attributes:
        latest: seconds of steps.
        mean: of those without the longest, which may have compiled something; from `ENOUGH` steps on.
        shortest: of those, from `EARLY` steps on.
    """

    latest: dict[int, deque[float]] = field(default_factory=dict)
    mean: dict[int, float] = field(default_factory=dict)
    shortest: dict[int, float] = field(default_factory=dict)
    tried: int = 0
    rested: int = 0
    probing: int = 0
    num_probes: int = 0

    def add(self, drafts: int, seconds: float) -> None:
        """One more step."""
        found = self.latest.setdefault(drafts, deque(maxlen=LATEST))
        found.append(seconds)
        if len(found) >= EARLY:
            self.shortest[drafts] = min(found)
        if len(found) >= ENOUGH:
            self.mean[drafts] = (sum(found) - max(found)) / (len(found) - 1)


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
        self._sizes: dict[int, Size] = {}
        self._newest: Landed | None = None

    def choose(self, batch: int) -> int:
        """Drafts for each sequence of the next step, whose decodes are `batch`; the fewest among equals."""
        if not (self._adaptive and self._most and batch):
            return self._most
        number = bucket(batch)
        size = self._sizes.setdefault(number, Size())
        times = self._times(number)
        if times is None:
            return self._tried(size)
        rates = [self.tokens(drafts) / max(seconds, 1e-9) for drafts, seconds in enumerate(times)]
        best = max(range(self._most + 1), key=lambda drafts: (rates[drafts], -drafts))
        return self._probed(size, best, times, rates)

    def tokens(self, drafts: int) -> float:
        """Tokens that a sequence is expected to get from a step with so many drafts."""
        tokens, chance = 1.0, 1.0
        for place in range(drafts):
            chance *= (self._held[place] + 1) / (self._tries[place] + 2)
            tokens += chance
        return tokens

    def note(self, flight: Flight, counts: Iterable[int], given: Sequence[int], now: float) -> None:
        """Learn from a step that was committed at `now`.

        `counts` are the tokens of each decode row, `given` the drafts that it had, of `flight.drafts` asked.
        """
        if not self._most:
            return
        for count, drafts, asked in zip(counts, given, flight.drafts, strict=False):
            self._count(drafts, count - 1)
            self._learn(asked, count - 1)
        if self._adaptive:
            self._time(flight, max(flight.drafts, default=0), now)

    def _count(self, given: int, held: int) -> None:
        self._totals.drafts += given > 0
        self._totals.drafted += given
        self._totals.accepted_drafts += held
        for place in range(held):
            self._totals.accepted_at[place] += 1

    def _learn(self, asked: int, held: int) -> None:
        for place in range(min(asked, held + 1)):
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
            self._sizes.setdefault(bucket(len(flight.decodes)), Size()).add(drafts, now - before.now)

    # --- step times

    def _times(self, number: int) -> list[float] | None:
        """Seconds of a step by drafts: measured, or in the proportions of the nearest size that was."""
        size = self._sizes[number]
        ends = self._ends(size)
        if ends is None:
            near = self._near(number)
            if near is None:
                return None
            ends = _scaled(near, size.mean.get(0), size.mean.get(self._most))
        least, most = ends
        line = [least + (most - least) * drafts / self._most for drafts in range(self._most + 1)]
        return [size.mean.get(drafts, line[drafts]) for drafts in range(self._most + 1)]

    def _ends(self, size: Size) -> tuple[float, float] | None:
        """Seconds of steps with no drafts and with the most, where both were measured.

        The latter counts early where it could not pay though a little more drafts held than have so far.
        """
        least, most = size.mean.get(0), size.mean.get(self._most)
        if least is not None and most is None:
            early = size.shortest.get(self._most)
            hopeless = early is not None and self._hoped() * max(least, 1e-9) < early
            most = early if hopeless else None
        return None if least is None or most is None else (least, most)

    def _hoped(self) -> float:
        """Tokens of a step with the most drafts if each place held a standard deviation more often."""
        tokens, chance = 1.0, 1.0
        for tries, held in zip(self._tries, self._held, strict=True):
            chance *= min(1.0, (held + 1) / (tries + 2) + 1 / sqrt(tries + 1))
            tokens += chance
        return tokens

    def _near(self, number: int) -> tuple[float, float] | None:
        """The measured ends of the nearest batch size within a factor of two."""
        known = [
            (abs(log2(other / number)), other, ends)
            for other, size in self._sizes.items()
            if number <= 2 * other and other <= 2 * number and (ends := self._ends(size)) is not None
        ]
        return min(known)[2] if known else None

    # --- trials and probes

    def _tried(self, size: Size) -> int:
        """None, then the most, until both have times; mostly none while prompts are in all steps."""
        if 0 not in size.mean:
            return 0
        turn = size.tried
        size.tried = (turn + 1) % TRIAL_EVERY
        return self._most if turn < TRIAL_STEPS else 0

    def _probed(self, size: Size, best: int, times: Sequence[float], rates: Sequence[float]) -> int:
        """The best number, or now and then another: none or the most, in turn where both are others."""
        others = [drafts for drafts in (self._most, 0) if drafts != best]
        other = others[size.num_probes % len(others)]
        if size.probing:
            size.probing -= 1
            size.num_probes += not size.probing
            return other
        size.rested += 1
        lost = times[other] / max(times[best], 1e-9) * (1 - rates[other] / rates[best])
        fewest, longest = PAUSES
        if size.rested > min(longest, max(fewest, ceil(PROBE_STEPS * lost / PROBE_SHARE))):
            size.rested, size.probing = 0, PROBE_STEPS
        return best


def _scaled(ends: tuple[float, float], least: float | None, most: float | None) -> tuple[float, float]:
    """Another size's ends, times what one of this size's own is to it."""
    if least is not None:
        factor = least / max(ends[0], 1e-9)
    elif most is not None:
        factor = most / max(ends[1], 1e-9)
    else:
        factor = 1.0
    return ends[0] * factor, ends[1] * factor


def bucket(batch: int) -> int:
    """Batch sizes that are timed together: 1, 2, 4, then multiples of 8, as CUDA graphs are padded."""
    for size in (1, 2, 4):
        if batch <= size:
            return size
    return -(-batch // 8) * 8
