"""The most that a pipeline rank needs at once beside weights to moments: a walk through its slots.

What microbatches keep between slots, and on top what the fullest instant within a slot needs, its phases
taken in the order of `parallel.pipeline`.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.plan.training.phases import core_of, phases_of, row_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benthic.model.part import Part
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.phases import Phase, Phases
    from benthic.sched.pipeline.table import Slot

Counts = tuple[tuple[int, int], ...]
_IN_TRANSIT: Final = 3
"""Residual streams, or gradients of one, that have arrived early or wait to leave."""


class Moment(NamedTuple):
    """Microbatches by stage that are in flight when a slot begins, and those whose I waits for its W.

    `first`: the slot's forward is the rank's first of that stage in a step.
    """

    slot: Slot
    held: Counts
    waiting: Counts
    first: bool


def moments(slots: Sequence[Slot]) -> tuple[Moment, ...]:
    """Of slots alike but for their microbatches, those with the most in flight."""
    held: Counter[int] = Counter()
    waiting: Counter[int] = Counter()
    begun: set[int] = set()
    seen: dict[tuple[object, ...], dict[tuple[object, ...], Moment]] = {}
    for slot in slots:
        one, other = slot
        first = one.kind == "F" and one.stage not in begun
        begun.add(one.stage)
        kinds = one.kind, one.stage, first, None if other is None else (other.kind, other.stage)
        counts = *held.items(), None, *waiting.items()
        alike = seen.setdefault(kinds, {})
        if counts not in alike:
            alike[counts] = Moment(slot, _counts(held), _counts(waiting), first)
        for kind, stage, _ in slot.actions:
            if kind == "F":
                held[stage] += 1
            elif kind == "W":
                waiting[stage] -= 1
            else:
                held[stage] -= 1
                waiting[stage] += kind == "I"
    return tuple(one for alike in seen.values() for one in _largest(list(alike.values())))


def _counts(counter: Counter[int]) -> Counts:
    return tuple(sorted((stage, count) for stage, count in counter.items() if count))


def _largest(alike: list[Moment]) -> Iterator[Moment]:
    """Those that no other contains."""
    for one in alike:
        if not any(other is not one and _within(one, other) for other in alike):
            yield one


def _within(one: Moment, other: Moment) -> bool:
    """Whether `other` has as many of each at least, and not the same."""
    pairs = ((one.held, dict(other.held)), (one.waiting, dict(other.waiting)))
    return one[1:3] != other[1:3] and all(
        count <= more.get(stage, 0) for counts, more in pairs for stage, count in counts
    )


def peak(candidate: Candidate, parts: Mapping[int, Part], found: Sequence[Moment]) -> float:
    """Bytes beside weights to moments at the fullest of some moments of a rank that holds `parts`."""
    core = core_of(candidate)
    phases = {stage: phases_of(core, part, first=stage == 0) for stage, part in parts.items()}
    kept = {stage: sum(phase.keeps for _, phase in each) for stage, each in phases.items()}
    leaves = {stage: sum(phase.leaves for _, phase in each) for stage, each in phases.items()}
    early = {stage: _sums(each, "early") for stage, each in phases.items()}
    eager = {stage: _eager(each) for stage, each in phases.items()}
    moving = _IN_TRANSIT * row_of(core) if candidate.layout.pp_degree > 1 else 0.0
    slots: dict[tuple[object, ...], float] = {}

    def needed(one: Moment) -> float:
        kinds = one.first, *[(action.kind, action.stage) for action in one.slot.actions]
        if kinds not in slots:
            slots[kinds] = _needed(one, phases)
        return slots[kinds]

    def at(one: Moment) -> float:
        there = moving + sum(kept[stage] * count for stage, count in one.held)
        there += sum(leaves[stage] * count for stage, count in one.waiting)
        busy = {action.stage for action in one.slot.actions}
        there += sum(early[stage] for stage, _ in one.waiting if stage not in busy)
        there += sum(eager[stage] for stage, _ in one.held if stage not in busy)
        return there + needed(one)

    return max(map(at, found), default=0.0)


def _needed(one: Moment, phases: Mapping[int, Phases]) -> float:
    """By the slot itself."""
    ahead: Phases = ()
    back: Phases = ()
    deferred = False
    for kind, stage, _ in one.slot.actions:
        if kind == "W":
            return max(phase.apart for _, phase in phases[stage]) + _sums(phases[stage], "sums")
        if kind == "F":
            ahead = phases[stage]
        else:
            back, deferred = phases[stage], kind == "I"
    return rise(ahead, back, deferred=deferred, first=one.first)


def _sums(phases: Phases, which: str) -> float:
    """Whole gradients of a stage, each unit's once."""
    return sum({unit: getattr(phase, which) for unit, phase in phases}.values())


def _eager(phases: Phases) -> float:
    """Whole gradients that a forward leaves."""
    return max((phase.sums for _, phase in phases if phase.eager), default=0.0)


@functools.lru_cache(maxsize=1 << 14)
def rise(ahead: Phases, back: Phases, *, deferred: bool, first: bool) -> float:
    """The most that a slot needs beyond what is there when it begins; what its forward leaves is new.

    `ahead` and `back` are the phases of its forward and its backward. Gradients of parameters in shards are
    whole from a unit's backward to the end of the microbatch's, when they are reduced unit by unit. The
    weights of a phase are gathered before those of the phase before it are let go.
    """
    held = most = 0.0
    sums: dict[str, float] = {}
    weights = {"F": ("", 0.0), "B": ("", 0.0)}
    for (unit, phase), forward in _order(ahead, back):
        way = "F" if forward else "B"
        (held_unit, before), (_, other) = weights[way], weights["B" if forward else "F"]
        gathered = phase.weights + (phase.masters if forward and first else 0.0)
        if unit != held_unit:
            most = max(most, held + sum(sums.values()) + other + before + gathered)
        if not forward or phase.eager:
            sums[unit] = phase.early if deferred else phase.sums
        own = phase.keeps + phase.forward if forward else phase.deferred if deferred else phase.backward
        most = max(most, held + sum(sums.values()) + other + own + gathered)
        weights[way] = unit, gathered
        held += phase.keeps if forward else (phase.leaves if deferred else 0.0) - phase.keeps
    return max(most, held + _reduced(sums))


def _reduced(sums: dict[str, float]) -> float:
    """The most while whole gradients become shards, at most half as large, unit by unit from the front."""
    left = sum(sums.values())
    most = left
    for size in reversed(sums.values()):
        most = max(most, left + size / 2)
        left -= size
    return most


def _order(ahead: Phases, back: Phases) -> Iterator[tuple[tuple[str, Phase], bool]]:
    """The phases of a slot as the executor takes them, and whether forward: one computes, the other sends."""
    i, j = 0, len(back) - 1
    while i < len(ahead) and j >= 0:
        sends = ahead[i][1].network
        both = sends != back[j][1].network
        if both and sends:
            yield ahead[i], True
        yield back[j], False
        if both and not sends:
            yield ahead[i], True
        i, j = i + both, j - 1
    yield from ((phase, False) for phase in reversed(back[: j + 1]))
    yield from ((phase, True) for phase in ahead[i:])
