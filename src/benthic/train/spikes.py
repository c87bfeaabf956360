"""Steps whose loss jumps: they are told from ordinary ones by the median of the losses before."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Spikes:
    """Decides which steps leave the parameters alone, from losses that all ranks know to the same bit.

    factor: of the median, above which a loss is a spike; 0: none is.
    window: losses that the median is of; those of spikes count too, so that a loss which stays high is taken
        for ordinary after half a window.

    Attributes:
        skipped: spikes so far.
    """

    factor: float
    window: int
    skipped: int = 0
    _losses: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        """Know no losses."""
        self._losses = deque(maxlen=self.window)

    def skips(self, loss: float) -> bool:
        """Whether the step of this loss must be skipped; remembers the loss."""
        known = 2 * len(self._losses) >= self.window
        spike = self.factor > 0 and known and loss > self.factor * median(self._losses)
        self._losses.append(loss)
        self.skipped += spike
        return spike

    def state(self) -> dict[str, object]:
        """What an exact continuation needs, for JSON."""
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a `state`; a run saved before there was one begins with no losses."""
        losses = state.get("losses", [])
        assert isinstance(losses, list), "a checkpoint's losses are a list"  # noqa: S101 (its checksum is right)
        self._losses = deque(losses, maxlen=self.window)
        self.skipped = int(str(state.get("skipped", 0)))
