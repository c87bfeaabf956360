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
    from benthic.plan.training.phases import Phase
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
    seen: dict[tuple[object, ...], dict[tuple[Counts, Counts], Moment]] = {}
    for slot in slots:
        stages = {action.stage for action in slot.actions if action.kind == "F"}
        one = Moment(slot, _counts(held), _counts(waiting), first=not stages <= begun)
        kinds = tuple((action.kind, action.stage) for action in slot.actions)
        seen.setdefault((kinds, one.first), {})[one.held, one.waiting] = one
        begun |= stages
        for kind, stage, _ in slot.actions:
            held[stage] += {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
            waiting[stage] += {"F": 0, "B": 0, "I": 1, "W": -1}[kind]
    return tuple(one for alike in seen.values() for one in _largest(list(alike.values())))


def _counts(counter: Counter[int]) -> Counts:
    return tuple(sorted((stage, count) for stage, count in counter.items() if count))


def _largest(alike: list[Moment]) -> Iterator[Moment]:
    """Those that no other contains."""
    for one in alike:
        if not any(other is not one and _within(one, other) for other in alike):
            yield one


def _within(one: Moment, other: Moment) -> bool:
    pairs = ((one.held, dict(other.held)), (one.waiting, dict(other.waiting)))
    return all(count <= more.get(stage, 0) for counts, more in pairs for stage, count in counts)


def peak(candidate: Candidate, parts: Mapping[int, Part], found: Sequence[Moment]) -> float:
    """Bytes beside weights to moments at the fullest of some moments of a rank that holds `parts`."""
    core = core_of(candidate)
    phases = {stage: phases_of(core, part, first=stage == 0) for stage, part in parts.items()}
    kept = {stage: sum(phase.keeps for phase in each) for stage, each in phases.items()}
    leaves = {stage: sum(phase.leaves for phase in each) for stage, each in phases.items()}
    moving = _IN_TRANSIT * row_of(core) if candidate.layout.pp_degree > 1 else 0.0

    def at(one: Moment) -> float:
        there = moving + sum(kept[stage] * count for stage, count in one.held)
        there += sum(leaves[stage] * count for stage, count in one.waiting)
        back = {action.stage: action.kind for action in one.slot.actions if action.kind != "F"}
        there += sum(_sums(phases[stage], "early") for stage, _ in one.waiting if stage not in back)
        return there + _needed(one, phases)

    return max(map(at, found), default=0.0)


def _needed(one: Moment, phases: Mapping[int, tuple[Phase, ...]]) -> float:
    """By the slot itself."""
    ahead: tuple[Phase, ...] = ()
    back: tuple[Phase, ...] = ()
    deferred = False
    for kind, stage, _ in one.slot.actions:
        if kind == "W":
            return max(phase.apart for phase in phases[stage]) + _sums(phases[stage], "sums")
        if kind == "F":
            ahead = phases[stage]
        else:
            back, deferred = phases[stage], kind == "I"
    return rise(ahead, back, deferred=deferred, first=one.first)


def _sums(phases: Sequence[Phase], which: str) -> float:
    """Whole gradients of a stage, each unit's once."""
    return sum({phase.unit: getattr(phase, which) for phase in phases}.values())


@functools.lru_cache(maxsize=1 << 14)
def rise(ahead: tuple[Phase, ...], back: tuple[Phase, ...], *, deferred: bool, first: bool) -> float:
    """The most that a slot needs beyond what is there when it begins; what its forward leaves is new.

    `ahead` and `back` are the phases of its forward and its backward. Gradients of parameters in shards are
    whole from a unit's backward to the end of the microbatch's, when they are reduced unit by unit. The
    weights of a phase are gathered before those of the phase before it are let go.
    """
    held = most = 0.0
    sums: dict[str, float] = {}
    weights = {"F": ("", 0.0), "B": ("", 0.0)}
    for phase, forward in _order(ahead, back):
        way = "F" if forward else "B"
        (unit, before), (_, other) = weights[way], weights["B" if forward else "F"]
        gathered = phase.weights + (phase.masters if forward and first else 0.0)
        if unit != phase.unit:
            most = max(most, held + sum(sums.values()) + other + before + gathered)
        if not forward:
            sums[phase.unit] = phase.early if deferred else phase.sums
        own = phase.keeps + phase.forward if forward else phase.deferred if deferred else phase.backward
        most = max(most, held + sum(sums.values()) + other + own + gathered)
        weights[way] = phase.unit, gathered
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


def _order(ahead: tuple[Phase, ...], back: tuple[Phase, ...]) -> Iterator[tuple[Phase, bool]]:
    """The phases of a slot as the executor takes them, and whether forward: one computes, the other sends."""
    i, j = 0, len(back) - 1
    while i < len(ahead) and j >= 0:
        both = ahead[i].network != back[j].network
        if both and ahead[i].network:
            yield ahead[i], True
        yield back[j], False
        if both and not ahead[i].network:
            yield ahead[i], True
        i, j = i + both, j - 1
    yield from ((phase, False) for phase in reversed(back[: j + 1]))
    yield from ((phase, True) for phase in ahead[i:])
