"""Lower a table to one program per rank, with sends and receives written out.

A result that another rank needs is sent right after its slot, and its receive is posted at the point which
the other program has reached by then. Every send with its receive is thus one event of a single global
order, so no two ranks can wait for each other, whatever the transport buffers. An executor that posts
receives and waits only before the slot that needs the result loses no time either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.sched.pipeline.dependencies import feeds
from benthic.sched.pipeline.order import rounds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benthic.sched.pipeline.table import Action, Slot, Table


@dataclass(frozen=True)
class Compute:
    """Work through one slot."""

    slot: Slot

    def __str__(self) -> str:
        return str(self.slot)


@dataclass(frozen=True)
class Send:
    """Send the result of `payload` (activations of an F, input gradients of a B or I) to rank `to`."""

    payload: Action
    to: int

    def __str__(self) -> str:
        return f"send {self.payload} to rank {self.to}"


@dataclass(frozen=True)
class Recv:
    """Receive the result of `payload` from rank `source`."""

    payload: Action
    source: int

    def __str__(self) -> str:
        return f"receive {self.payload} from rank {self.source}"


Program = tuple[Compute | Send | Recv, ...]


def lower(table: Table) -> tuple[Program, ...]:
    """One program per rank. A table that deadlocks gives programs that end where it gets stuck."""
    return lower_rounds(table, rounds(table))


def lower_rounds(table: Table, ran: Iterable[list[tuple[int, Slot]]]) -> tuple[Program, ...]:
    """One program per rank, from what `rounds(table)` gave."""
    programs: list[list[Compute | Send | Recv]] = [[] for _ in range(table.ranks)]
    for together in ran:
        for rank, slot in together:
            programs[rank].append(Compute(slot))
        for rank, slot in together:
            for action in slot.actions:
                target = _target(table, action)
                if target is not None and target != rank:
                    programs[rank].append(Send(action, target))
                    programs[target].append(Recv(action, rank))
    return tuple(map(tuple, programs))


def _target(table: Table, action: Action) -> int | None:
    """The rank that works on with the result of `action`, if any."""
    stage = feeds(action, table.stages)
    return None if stage is None else table.rank_of(stage, action.microbatch)
