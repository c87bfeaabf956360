"""When each slot of a table starts and ends, given what actions cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from benthic.errors import ConfigError, ScheduleError
from benthic.sched.pipeline.dependencies import needs
from benthic.sched.pipeline.order import run_in_order

if TYPE_CHECKING:
    from benthic.sched.pipeline.table import Action, Slot, Table

Cost = float | Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What actions take, in any one unit of time; a function gives the cost by stage.

    Args:
        forward: an F.
        backward: a whole B.
        input: an I. None: what a W leaves of a B, or half if that is not given either.
        weight: a W. None: what an I leaves of a B.
        overlap: a forward and a backward that overlap, as a function of their two costs. None: their sum.
        transfer: from the end of an action to the arrival of its result on another rank; costs no compute.
    """

    forward: Cost = 1.0
    backward: Cost = 2.0
    input: Cost | None = None
    weight: Cost | None = None
    overlap: Callable[[float, float], float] | None = None
    transfer: float = 0

    def of(self, action: Action) -> float:
        """What one action takes.

        Raises:
            ConfigError: the cost is negative.
        """
        cost = self._of(action)
        if cost < 0:
            message = f"{action} costs {cost}; costs must not be negative"
            raise ConfigError(message)
        return cost

    def of_slot(self, slot: Slot) -> float:
        """What a slot takes."""
        if slot.second is None:
            return self.of(slot.first)
        first, second = self.of(slot.first), self.of(slot.second)
        return first + second if self.overlap is None else self.overlap(first, second)

    def _of(self, action: Action) -> float:
        stage = action.stage
        if action.kind == "F":
            return _at(self.forward, stage)
        backward = _at(self.backward, stage)
        if action.kind == "B":
            return backward
        this, other = (self.input, self.weight) if action.kind == "I" else (self.weight, self.input)
        if this is not None:
            return _at(this, stage)
        return backward / 2 if other is None else backward - _at(other, stage)

    def scaled(self, share: float) -> Costs:
        """The costs of stages `share` times as large; a transfer stays what it is, as activations do."""

        def times(cost: Cost) -> Cost:
            return (lambda stage: cost(stage) * share) if callable(cost) else cost * share

        overlap = self.overlap
        return Costs(
            forward=times(self.forward),
            backward=times(self.backward),
            input=None if self.input is None else times(self.input),
            weight=None if self.weight is None else times(self.weight),
            overlap=None if overlap is None else lambda f, b: overlap(f / share, b / share) * share,
            transfer=self.transfer,
        )


class SlotCosts(Protocol):
    """What a simulation asks of costs; `Costs` are one answer, a planner's prices another."""

    @property
    def transfer(self) -> float:
        """From the end of an action to the arrival of its result on another rank."""
        ...

    def of_slot(self, slot: Slot) -> float:
        """What a slot takes."""
        ...


class Timed(NamedTuple):
    """A slot with its start and end."""

    slot: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated table: `slots[r]` is what rank r does, with times; the first slot starts at 0."""

    table: Table
    slots: tuple[tuple[Timed, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last rank ends."""
        return max((timed[-1].end for timed in self.slots if timed), default=0.0)

    def busy(self, rank: int) -> float:
        """How long `rank` computes."""
        return sum(timed.end - timed.start for timed in self.slots[rank])

    def bubble(self, rank: int) -> float:
        """How long `rank` idles between time 0 and the end of the last rank."""
        return self.makespan - self.busy(rank)

    def stall(self, rank: int) -> float:
        """How long `rank` idles between its own first and last slot; 0 everywhere is "zero bubble"."""
        timed = self.slots[rank]
        return timed[-1].end - timed[0].start - self.busy(rank) if timed else 0.0

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time, in [0, 1); for equal stages under 1F1B (p - 1)/(m + p - 1)."""
        available = self.makespan * self.table.ranks
        idle = sum(self.bubble(rank) for rank in range(self.table.ranks))
        return idle / available if available else 0.0

    @property
    def bubble_ratio(self) -> float:
        """Idle time over computing time; for equal stages under 1F1B (p - 1)/m."""
        busy = sum(self.busy(rank) for rank in range(self.table.ranks))
        idle = sum(self.bubble(rank) for rank in range(self.table.ranks))
        return idle / busy if busy else 0.0


@dataclass(frozen=True)
class Order:
    """A table with the order in which its slots may run and what each waits for: simulated again at no cost.

    `steps` are rank, slot, what to wait for as (number of an action, whether it comes from another rank), and
    the numbers of the slot's own actions.
    """

    table: Table
    steps: tuple[tuple[int, Slot, tuple[tuple[int, bool], ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, table: Table) -> Order:
        """Work out the order.

        Raises:
            ScheduleError: the table deadlocks.
        """
        present = {action: number for number, (_, action) in enumerate(table.actions())}
        steps = []
        for rank, slot in run_in_order(table):
            wanted = [n for action in slot.actions for n in needs(action, table.stages, present)]
            waits = tuple((present[n], table.rank_of(n.stage, n.microbatch) != rank) for n in wanted)
            steps.append((rank, slot, waits, tuple(present[action] for action in slot.actions)))
        if len(steps) < (whole := sum(map(len, table.slots))):
            wrong = f"table {table.name!r} deadlocks after {len(steps)} of {whole} slots"
            message = f"{wrong}; see sched.pipeline.check"
            raise ScheduleError(message)
        return cls(table, tuple(steps))

    def run(self, costs: SlotCosts) -> Timeline:
        """Run every slot as early as its rank's order and the actions it needs allow."""
        transfer, of_slot = costs.transfer, costs.of_slot
        ended: list[float] = [0] * sum(len(own) for *_, own in self.steps)
        slots: list[list[Timed]] = [[] for _ in range(self.table.ranks)]
        for rank, slot, waits, own in self.steps:
            start = slots[rank][-1].end if slots[rank] else 0
            for number, far in waits:
                start = max(start, ended[number] + transfer if far else ended[number])
            end = start + of_slot(slot)
            slots[rank].append(Timed(slot, start, end))
            for number in own:
                ended[number] = end
        return Timeline(self.table, tuple(map(tuple, slots)))


def simulate(table: Table, costs: SlotCosts) -> Timeline:
    """Run every slot as early as its rank's order and the actions it needs allow.

    Raises:
        ScheduleError: the table deadlocks.
        ConfigError: a cost is negative.
    """
    return Order.of(table).run(costs)


def peak_activations(table: Table) -> tuple[int, ...]:
    """The most activations (one per stage and microbatch) that each rank holds at once.

    A forward takes one; the end of the backward, a B or a W, gives it back. In an overlapped pair the forward
    takes its own before the backward gives one back.
    """
    return tuple(_peak(slots) for slots in table.slots)


def stages_held(table: Table) -> tuple[int, ...]:
    """How many stages each rank holds the parameters of."""
    return tuple(len({a.stage for slot in slots for a in slot.actions}) for slots in table.slots)


def _peak(slots: tuple[Slot, ...]) -> int:
    held = peak = 0
    for slot in slots:
        for action in slot.actions:
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            peak = max(peak, held)
    return peak


def _at(cost: Cost, stage: int) -> float:
    return cost(stage) if callable(cost) else cost
