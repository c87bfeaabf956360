"""The eight steps in which a rank of DualPipe or DualPipeV works (the DualPipe repository, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benthic.sched.pipeline.row import Row
    from benthic.sched.pipeline.table import Slot


@dataclass(frozen=True)
class EightSteps:
    """One rank's slots: phase 0 is nearer to its input, phase 1 to its loss.

    Args:
        row: where the slots are written.
        depth: how far the rank is from where phase 0 enters.
        turn: the depth at which phase 0 of one rank feeds phase 1 of the next, or of the same.
    """

    row: Row
    depth: int
    turn: int

    @property
    def outer(self) -> int:
        """How far the rank is from the turn."""
        return self.turn - 1 - self.depth

    def write(self, *, main: int) -> list[Slot]:
        """All slots; `main` is how often both phases overlap in the steady state."""
        self._warm_up()
        self._steady(main)
        self._cool_down()
        return self.row.slots

    def _warm_up(self) -> None:
        """Steps 1 to 3: F0; F0 F1; then I1 W1 F1."""
        row = self.row
        for _ in range(2 * self.outer):
            row.forward(0)
        for _ in range(self.depth + 1):
            row.forward(0)
            row.forward(1)
        for _ in range(self.outer):
            row.backward(1, split=True)
            row.weight()
            row.forward(1)

    def _steady(self, main: int) -> None:
        """Steps 4 and 5: F0 with B1, F1 with B0; then B1, F1 with B0."""
        row = self.row
        for turn in range(main):
            if turn == 0 and self.outer == 0:
                # at the turn an overlapped first pair would only delay its neighbours
                row.forward(0)
                row.backward(1)
            else:
                row.overlap(0, 1)
            row.overlap(1, 0)
        for _ in range(self.outer):
            row.backward(1)
            row.overlap(1, 0)

    def _cool_down(self) -> None:
        """Steps 6 to 8: B1 B0, whose second half puts the weights off; W and I0; the last Ws."""
        row, pairs = self.row, self.depth + 1
        for index in range(2 * pairs):
            row.backward(1 - index % 2, split=index >= pairs)
        for _ in range(self.outer):
            row.weight()
            row.backward(0, split=True)
        row.weights()
