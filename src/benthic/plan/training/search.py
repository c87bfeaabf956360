"""The fastest candidates that fit, found without looking closely at most.

Candidates wait in order of a time that they cannot undercut. The first in line is looked at more closely:
its bound is raised to what its busiest rank computes; next time its memory is counted and its table
simulated. One that comes first with a simulated time is faster than anything behind it (A*, with bounds that
are admissible).
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError
from benthic.parallel.parts import parts_of
from benthic.plan.training.memory import Memory, kept, stage_size, usable
from benthic.plan.training.space import Space, candidate, walk
from benthic.plan.training.stage import prices_of, stages
from benthic.plan.training.step import Step, step
from benthic.plan.training.tables import digest
from benthic.plan.training.update import sync_of, update
from benthic.plan.training.working import peak

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.model.part import Part
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.space import Bounded, Choice, Question
    from benthic.plan.training.tables import Digest
    from benthic.spec.model import ModelConfig

_ROUNDING: Final = 1 - 1e-9


@dataclass(frozen=True)
class Evaluated:
    """A candidate that fits, simulated; `memory` is that of the fullest rank."""

    choice: Choice
    step: Step
    memory: Memory

    @property
    def candidate(self) -> Candidate:
        """The candidate."""
        return self.step.candidate


class Refused(NamedTuple):
    """A candidate that does not fit: bytes that it needs at least, and seconds that it takes at least."""

    choice: Choice
    bytes: float
    seconds: float


@dataclass
class Found:
    """What a search came to.

    best: fastest first. evaluated: all that were simulated. screened: choices that were bounded. too_large:
    how many do not fit. fastest_refused: the least bounded time among them. smallest: the least memory seen.
    """

    best: list[Evaluated] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)
    screened: int = 0
    looked_at: int = 0
    too_large: int = 0
    fastest_refused: Refused | None = None
    smallest: Refused | None = None


class _Waiting(NamedTuple):
    seconds: float
    number: int
    closeness: int
    choice: Choice
    found: Evaluated | None = None


def search(question: Question, space: Space, *, keep: int = 5, capacity: float | None = None) -> Found:
    """The `keep` fastest candidates that need at most `capacity` bytes (by default what the GPU has).

    Raises:
        ConfigError: there are no GPUs, or nothing divides.
    """
    if question.gpus < 1:
        message = f"{question.gpus} GPUs train nothing. Ask for one or more."
        raise ConfigError(message)
    return _Search(question, capacity or usable(question.machine.hardware)).run(space, keep)


class _Search:
    def __init__(self, question: Question, capacity: float) -> None:
        self.question, self.capacity = question, capacity
        self.found = Found()
        self.numbers = itertools.count()

    def run(self, space: Space, keep: int) -> Found:
        waiting = [
            _Waiting(one.seconds, next(self.numbers), 0, one.choice)
            for one in walk(self.question, space)
            if self._may_fit(one)
        ]
        heapq.heapify(waiting)
        while waiting and len(self.found.best) < keep:
            first = heapq.heappop(waiting)
            if first.found is not None:
                self.found.best.append(first.found)
                continue
            closer = self._weigh(first) if first.closeness == 0 else self._simulate(first)
            if closer is not None:
                heapq.heappush(waiting, closer)
        return self.found

    def _may_fit(self, one: Bounded) -> bool:
        self.found.screened += 1
        return self._fits(one.choice, one.bytes, one.seconds)

    def _fits(self, choice: Choice, size: float, seconds: float) -> bool:
        found, refused = self.found, Refused(choice, size, seconds)
        if found.smallest is None or size < found.smallest.bytes:
            found.smallest = refused
        if size <= self.capacity:
            return True
        found.too_large += 1
        if found.fastest_refused is None or seconds < found.fastest_refused.seconds:
            found.fastest_refused = refused
        return False

    def _weigh(self, first: _Waiting) -> _Waiting:
        """Raise the bound to what the busiest rank computes."""
        self.found.looked_at += 1
        one, table = self._of(first.choice)
        machine = self.question.machine
        work = stages(one, machine, table.table.routes[0])
        ending = update(one, machine, table.table.routes)
        sync = sync_of(ending, one, table.forwards)
        prices = prices_of(work, one, machine, sync)
        seconds = table.least(prices, work) + ending.end.seconds
        return first._replace(seconds=max(first.seconds, seconds * _ROUNDING), closeness=1)

    def _simulate(self, first: _Waiting) -> _Waiting | None:
        """Count the memory, and run the table of what fits."""
        one, table = self._of(first.choice)
        memory = fullest(one, table)
        if not self._fits(first.choice, memory.total, first.seconds):
            return None
        taken = step(one, self.question.machine, table.order)
        self.found.evaluated.append(Evaluated(first.choice, taken, memory))
        return first._replace(seconds=taken.seconds, found=self.found.evaluated[-1])

    def _of(self, choice: Choice) -> tuple[Candidate, Digest]:
        one = candidate(self.question, choice)
        return one, digest(choice.schedule, choice.pp, one.microbatches, choice.virtual_stages)


def fullest(one: Candidate, table: Digest) -> Memory:
    """The pipeline rank that needs most memory."""
    parts = parts_of(one.model, one.layout, table.table.stages)
    size = [stage_size(one, part) for part in parts]
    routes = table.table.routes
    alike: dict[object, tuple[float, float, int]] = {}
    for pp in range(table.table.ranks):
        here = {k: part for k, part in enumerate(parts) if any(route[k] == pp for route in routes)}
        key = tuple((_kinds(one.model, part), part.embed, part.head, part.mtp) for part in here.values())
        most = peak(one, here, table.moments[pp])
        alike[key] = max(alike.get(key, (0.0, 0.0, 0)), (most, table.activations(pp, size), pp))
    found = (Memory(pp, kept(one, routes, pp, held, most)) for most, held, pp in alike.values())
    return max(found, key=lambda memory: memory.total)


def _kinds(model: ModelConfig, part: Part) -> tuple[int, int]:
    """Dense and mixed layers of a stage."""
    mixed = sum(model.is_moe(layer) for layer in part.layers)
    return len(part.layers) - mixed, mixed


def front(evaluated: Iterable[Evaluated]) -> list[Evaluated]:
    """Those that nothing beats in both time and memory, fastest first; cost goes with time."""
    found: list[Evaluated] = []
    for one in sorted(evaluated, key=lambda one: (one.step.seconds, one.memory.total)):
        if not found or one.memory.total < found[-1].memory.total:
            found.append(one)
    return found
