"""Ranks with requests of their own whose passes meet in collectives: what each would run, and what all run.

Before a pass through the model, or through a prediction module, every rank tells the others in a few numbers
what it intends, and each draws the same conclusion from the same list. A rank that has no rows for what is
run runs padding, and tells the others again what it intends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


MODEL: Final = -1
"""What stands for the model itself where prediction modules are counted from 0."""


class Intent(NamedTuple):
    """What one rank would do next.

    Attributes:
        rows: rows of its pass; 0 when it has none to run now.
        size: padded batch of the recorded pass that would hold them; 0 when none does.
        queries: rows of each sequence in that recorded pass.
        working: it has requests, or steps that have not landed.
        leaving: it will have no more.
        module: the prediction module that they pass through, by depth; or the model.
        first: rows of the first half, if the pass may run in two (`benthic.serve.halves`); 0 otherwise.
        large: it has so many rows that two halves pay.
        waited: turns in which it ran padding since it has had these rows.
    """

    rows: int = 0
    size: int = 0
    queries: int = 0
    working: bool = False
    leaving: bool = False
    module: int = MODEL
    first: int = 0
    large: bool = False
    waited: int = 0

    def joins(self, turn: Turn) -> bool:
        """Whether its rows run in that turn, and not padding."""
        same = self.module == turn.module and (not turn.size or self.queries == turn.queries)
        return bool(self.rows) and same


class Turn(NamedTuple):
    """What every rank does.

    Attributes:
        rows: of each rank, 1 for those that run padding; empty when nobody runs anything.
        module: what they pass through.
        size: the recorded pass that all replay; 0 when they run as written.
        queries: rows of each sequence in it.
        halves: `rows` of each half, where all run in two; empty otherwise. Padding is a row of both.
        working: some rank has requests, so that another turn follows.
        over: all ranks are leaving.
    """

    rows: tuple[int, ...]
    module: int
    size: int
    queries: int
    halves: tuple[tuple[int, ...], ...]
    working: bool
    over: bool


def conclude(intents: Sequence[Intent]) -> Turn:
    """The turn that follows from the intents of all ranks, in order; every rank concludes the same.

    Prediction modules come before the model: ranks that draft catch up with those that do not, and pass
    through the model together. A recorded pass has fixed shapes, so it is replayed only when every rank with
    rows has one; then all take the largest of those with as many queries as the one that has waited longest.
    A pass as written runs in halves where all can, when it pays for one.
    """
    module = max([intent.module for intent in intents if intent.rows], default=MODEL)
    running = [intent for intent in intents if intent.rows and intent.module == module]
    recorded = bool(running) and all(intent.size for intent in running)
    first = max(running, key=lambda intent: (intent.waited, intent.queries), default=Intent())
    alike = [intent.size for intent in running if intent.queries == first.queries]
    turn = Turn(
        rows=(),
        module=module,
        size=max(alike) if recorded else 0,
        queries=first.queries if recorded else 0,
        halves=(),
        working=any(intent.working for intent in intents),
        over=all(intent.leaving for intent in intents),
    )
    if not running:
        return turn
    turn = turn._replace(rows=tuple(intent.rows if intent.joins(turn) else 1 for intent in intents))
    if recorded or not all(intent.first for intent in running) or not any(intent.large for intent in running):
        return turn
    ahead = tuple(intent.first if intent.joins(turn) else 1 for intent in intents)
    behind = tuple(intent.rows - intent.first if intent.joins(turn) else 1 for intent in intents)
    return turn._replace(halves=(ahead, behind))
