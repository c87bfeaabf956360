"""What ranks measured, brought to rank 0: when each pipeline slot ran, and how fast each rank computes."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeVar

import torch
import torch.distributed as dist

from benthic.parallel.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.parallel.mesh import Group, Mesh
    from benthic.parallel.pipeline import TableExecutor
    from benthic.sched.pipeline.spans import Span

    Mark = float | torch.cuda.Event

StateT = TypeVar("StateT")
_MEETINGS: Final = 7


@dataclass
class Recorder:
    """Measures the slots of a step on the pipeline ranks whose other indices are 0, one rank of each.

    Times are seconds of rank 0's clock: ranks of its host share that clock, those of other hosts are set
    right by `offset`, which is found once.
    """

    mesh: Mesh
    device: torch.device
    clock: Callable[[], float] = perf_counter
    _offset: float | None = field(default=None)

    @property
    def takes_part(self) -> bool:
        """Whether this rank's slots are measured."""
        place = self.mesh.place
        return place.dp == place.cp == place.tp == 0

    def start(self, pipeline: TableExecutor) -> None:
        """Measure the next run of `pipeline`."""
        if self.takes_part:
            pipeline.stopwatch = Stopwatch(self.device, self.clock)

    def stop(self, pipeline: TableExecutor, step: int) -> list[Span]:
        """Measure no more; on rank 0 the spans of all pipeline ranks, elsewhere none. Every rank calls it."""
        if not self.takes_part:
            return []
        mine, group = pipeline.spans(step), self.mesh.pipeline
        pipeline.stopwatch = None
        if group.handle is None:
            return mine
        if self._offset is None:
            self._offset = offset(group, self.clock, self.device)
        shifted = [replace_times(span, self._offset) for span in mine]
        everyone: list[list[Span]] = [[] for _ in group.ranks]
        dist.all_gather_object(everyone, shifted, group=group.handle)
        return [span for spans in everyone for span in spans] if group.index == 0 else []


def replace_times(span: Span, shift: float) -> Span:
    """`span` on a clock that is `shift` seconds ahead."""
    return span._replace(start=span.start + shift, end=span.end + shift)


def offset(group: Group, clock: Callable[[], float], device: torch.device) -> float:
    """What to add to this rank's clock to get that of the group's first rank; 0 on the same host.

    Ranks read their clocks as they leave a barrier, several times; the median difference is wrong by about
    as much as ranks leave it apart, tens of microseconds. Clocks drift apart by less than that a minute.
    """
    readings = []
    for _ in range(_MEETINGS):
        dist.all_reduce(torch.zeros(1, device=device), group=group.handle)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        readings.append(clock())
    found: list[tuple[str, list[float]]] = [("", [])] * group.size
    dist.all_gather_object(found, (socket.gethostname(), readings), group=group.handle)
    (host, first), (mine, _) = found[0], found[group.index]
    return 0.0 if host == mine else median(a - b for a, b in zip(first, readings, strict=True))


@dataclass
class Pace:
    """How long this rank takes for work that every rank has alike: the attention of one block, forward.

    Attention waits for nobody (with tensor or context parallelism: only for the ranks that share its tokens),
    so that it tells a slow rank from those that wait for it, which a step's time does not.
    """

    stopwatch: Stopwatch
    _marks: list[tuple[Mark, Mark]] = field(default_factory=list)

    @classmethod
    def started(cls, device: torch.device) -> Pace:
        """One whose clock runs."""
        watch = Stopwatch(device)
        watch.start()
        return cls(watch)

    def timed(self, run: Callable[[StateT], StateT]) -> Callable[[StateT], StateT]:
        """`run`, measured each time."""

        def marked(state: StateT) -> StateT:
            start = self.stopwatch.mark()
            after = run(state)
            self._marks.append((start, self.stopwatch.mark()))
            return after

        return marked

    def seconds(self) -> float:
        """The median; 0 where nothing ran."""
        took = [self.stopwatch.seconds(end) - self.stopwatch.seconds(start) for start, end in self._marks]
        return median(took) if took else 0.0


def everyones(value: float, group: Group, device: torch.device) -> list[float]:
    """The value of every rank of a group, in its order; every rank must call it."""
    if group.handle is None:
        return [value]
    values = torch.zeros(group.size, dtype=torch.float64, device=device)
    values[group.index] = value
    dist.all_reduce(values, group=group.handle)
    return list(map(float, values.tolist()))
