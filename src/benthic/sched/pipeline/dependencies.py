"""What an action needs before it can start: the data flow of a pipeline, the same for every schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.sched.pipeline.table import Action

if TYPE_CHECKING:
    from collections.abc import Collection


def needs(action: Action, stages: int, present: Collection[Action]) -> tuple[Action, ...]:
    """The actions that must end before `action` starts.

    A forward needs the stage before it. A backward needs its own forward and the backward (B or I,
    whichever is in `present`) of the stage after it. A weight part needs its input part.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return (Action("F", stage - 1, microbatch),) if stage else ()
    if kind == "W":
        return (Action("I", stage, microbatch),)
    own = Action("F", stage, microbatch)
    if stage == stages - 1:
        return (own,)
    split = Action("I", stage + 1, microbatch)
    return (own, split if split in present else Action("B", stage + 1, microbatch))


def feeds(action: Action, stages: int) -> int | None:
    """The stage to which the result of `action` travels: activations go up, input gradients go down."""
    if action.kind == "F":
        return action.stage + 1 if action.stage + 1 < stages else None
    if action.kind == "W" or action.stage == 0:
        return None
    return action.stage - 1
