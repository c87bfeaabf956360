"""When things happen on a device, without stopping it to ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Stopwatch:
    """Marks instants of a device's stream; `seconds` says later when they were, on the host's clock."""

    device: torch.device
    clock: Callable[[], float] = perf_counter
    _zero: tuple[torch.cuda.Event, float] | None = field(default=None)

    def start(self) -> None:
        """Tie the stream's time to the clock's. Cost: on a GPU the host waits for it once."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.synchronize()
            self._zero = event, self.clock()

    def mark(self) -> float | torch.cuda.Event:
        """This instant: on a GPU, when the stream will have done what it was given so far."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: float | torch.cuda.Event) -> float:
        """When the instant was; waits until the device has come to it."""
        if isinstance(mark, float):
            return mark
        assert self._zero is not None, "start the stopwatch before it is read"  # noqa: S101
        event, began = self._zero
        mark.synchronize()
        return began + event.elapsed_time(mark) / 1e3
