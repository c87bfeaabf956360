"""What a search needs to know of a pipeline table without running it."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.plan.training.working import moments
from benthic.sched.pipeline import schedules
from benthic.sched.pipeline.simulate import Order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.plan.training.stage import Prices, Work
    from benthic.plan.training.working import Moment
    from benthic.sched.pipeline.table import Slot, Table


@dataclass(frozen=True)
class Digest:
    """One table.

    rows: of each rank, how often each slot comes, its microbatch left out. before: the stages whose forwards
    end before the rank can start. after: those whose backwards follow its last action. held: of each rank the
    largest sets of microbatches in flight, as counts by stage.
    """

    table: Table
    rows: tuple[tuple[tuple[Slot, int], ...], ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    held: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]

    @functools.cached_property
    def order(self) -> Order:
        """The table, ready to be simulated."""
        return Order.of(self.table)

    @functools.cached_property
    def moments(self) -> tuple[tuple[Moment, ...], ...]:
        """When the memory of each rank may peak."""
        return tuple(moments(slots) for slots in self.table.slots)

    @functools.cached_property
    def forwards(self) -> int:
        """Of the first rank."""
        return forwards_of(self.table)

    def least(self, prices: Prices, work: Sequence[Work]) -> float:
        """A makespan that no simulation undercuts: a rank's own slots, and the way to and from them."""
        return max(
            sum(prices.of_slot(slot) * count for slot, count in row)
            + sum(work[stage].forward.seconds for stage in before)
            + sum(work[stage].input.seconds for stage in after)
            for row, before, after in zip(self.rows, self.before, self.after, strict=True)
        )

    def activations(self, pp: int, size: Sequence[float]) -> float:
        """The most bytes in flight on a rank, `size` being a microbatch's on each stage."""
        return max(sum(size[stage] * count for stage, count in held) for held in self.held[pp])


def forwards_of(table: Table) -> int:
    """How many forwards the first rank runs."""
    return sum(action.kind == "F" for slot in table.slots[0] for action in slot.actions)


@functools.lru_cache(maxsize=1 << 10)
def digest(schedule: str, ranks: int, microbatches: int, virtual_stages: int | None) -> Digest:
    """Of the table that `schedules.build` makes.

    Raises:
        ConfigError: there is none for these numbers.
    """
    table = schedules.build(schedule, ranks, microbatches, virtual_stages=virtual_stages)
    return Digest(
        table,
        rows=tuple(_counted(slots) for slots in table.slots),
        before=tuple(_before(slots) for slots in table.slots),
        after=tuple(_after(slots) for slots in table.slots),
        held=tuple(_held(slots) for slots in table.slots),
    )


def _counted(slots: tuple[Slot, ...]) -> tuple[tuple[Slot, int], ...]:
    """Slots alike but for their microbatches, of which the first stands for all."""
    counts: dict[tuple[object, ...], int] = {}
    first: dict[tuple[object, ...], Slot] = {}
    for slot in slots:
        one, other = slot.first, slot.second
        pair = () if other is None else (other.kind, other.stage)
        key = (one.kind, one.stage, *pair)
        if key in counts:
            counts[key] += 1
        else:
            counts[key], first[key] = 1, slot
    return tuple((first[key], count) for key, count in counts.items())


def _before(slots: tuple[Slot, ...]) -> tuple[int, ...]:
    return tuple(range(slots[0].first.stage)) if slots and slots[0].first.kind == "F" else ()


def _after(slots: tuple[Slot, ...]) -> tuple[int, ...]:
    last = slots[-1].actions[-1] if slots else None
    return tuple(range(last.stage)) if last is not None and last.kind in {"B", "I"} else ()


def _held(slots: tuple[Slot, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every set of microbatches in flight that no other contains."""
    held: Counter[int] = Counter()
    seen: set[tuple[tuple[int, int], ...]] = set()
    for slot in slots:
        for action in slot.actions:
            held[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            if action.kind == "F":
                seen.add(tuple(sorted(held.items())))
    return tuple(one for one in seen if not any(_within(one, other) for other in seen if other != one))


def _within(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    more = dict(other)
    return all(count <= more.get(stage, 0) for stage, count in one)
