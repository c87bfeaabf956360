"""One rank's slots as they are written, for schedules with two stages a rank or weight gradients put off."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from benthic.sched.pipeline.table import Action, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Row:
    """The slots of a rank that holds one or two stages, its *phases*, numbered from 0.

    Each phase works through its own microbatches in order, forwards and backwards each once; a backward is
    either whole or leaves its weight part in a queue, from which `weight` takes the oldest.

    Args:
        stages: the stage of each phase.
        microbatches: the microbatches of each phase, in order.
    """

    def __init__(self, stages: Sequence[int], microbatches: Sequence[Iterable[int]]) -> None:
        self.slots: list[Slot] = []
        self._stages = tuple(stages)
        self._forward = tuple(map(iter, microbatches))
        self._backward = tuple(map(iter, microbatches))
        self._put_off: deque[Action] = deque()

    def forward(self, phase: int) -> None:
        """Write the next F of `phase`."""
        self.slots.append(Slot(self._next_forward(phase)))

    def backward(self, phase: int, *, split: bool = False) -> None:
        """Write the next B of `phase`, or an I whose W is put off."""
        stage, microbatch = self._stages[phase], next(self._backward[phase])
        self.slots.append(Slot(Action("I" if split else "B", stage, microbatch)))
        if split:
            self._put_off.append(Action("W", stage, microbatch))

    def weight(self) -> None:
        """Write the oldest W that was put off."""
        self.slots.append(Slot(self._put_off.popleft()))

    def weights(self) -> None:
        """Write every W that was put off."""
        self.slots.extend(map(Slot, self._put_off))
        self._put_off.clear()

    def overlap(self, forward: int, backward: int) -> None:
        """Write the next F of one phase overlapped with the next B of another."""
        first = self._next_forward(forward)
        second = Action("B", self._stages[backward], next(self._backward[backward]))
        self.slots.append(Slot(first, second))

    def _next_forward(self, phase: int) -> Action:
        return Action("F", self._stages[phase], next(self._forward[phase]))
