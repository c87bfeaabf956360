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
    rows = [iter(slots) for slots in table.slots]
    waiting: dict[int, tuple[Slot, list[Action]]] = {}

    def advance(rank: int) -> None:
        slot = next(rows[rank], None)
        if slot is None:
            waiting.pop(rank, None)
        else:
            waiting[rank] = (slot, [n for a in slot.actions for n in needs(a, table.stages, present)])

    for rank in range(table.ranks):
        advance(rank)
    while ready := [rank for rank, (_, wanted) in sorted(waiting.items()) if done.issuperset(wanted)]:
        yield [(rank, waiting[rank][0]) for rank in ready]
        for rank in ready:
            done.update(waiting[rank][0].actions)
            advance(rank)
