"""Run a table's slots in an order that respects what every action needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.sched.pipeline.dependencies import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.table import Action, Slot, Table


def run_in_order(table: Table) -> Iterator[tuple[int, Slot]]:
    """Yield `(rank, slot)` for every slot that can run, each after all that it needs; see `rounds`."""
    for together in rounds(table):
        yield from together


def rounds(table: Table) -> Iterator[list[tuple[int, Slot]]]:
    """Run the table in rounds, every rank one slot a round if it can, and yield what each round runs.

    Slots of one round need nothing of each other. A table that deadlocks ends early: compare what came with
    what is in the table.
    """
    present = {action for _, action in table.actions()}
    done: set[Action] = set()
    at = [0] * table.ranks
    while ready := [r for r in range(table.ranks) if _ready(table, r, at[r], present, done)]:
        yield [(rank, table.slots[rank][at[rank]]) for rank in ready]
        for rank in ready:
            done.update(table.slots[rank][at[rank]].actions)
            at[rank] += 1


def _ready(table: Table, rank: int, at: int, present: set[Action], done: set[Action]) -> bool:
    if at >= len(table.slots[rank]):
        return False
    actions = table.slots[rank][at].actions
    return all(need in done for action in actions for need in needs(action, table.stages, present))
