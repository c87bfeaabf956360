"""What a simulated schedule comes to: the figures printed under its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic import units
from benthic.sched.pipeline.simulate import peak_activations

if TYPE_CHECKING:
    from benthic.sched.pipeline.simulate import Timeline


@dataclass(frozen=True)
class Summary:
    """The figures of one schedule.

    `bubble` is idle time over all ranks' time, in [0, 1); `idle` the idle time of the rank that idles most,
    in units of cost; `peaks` the most activations that each rank holds at once.
    """

    title: str
    makespan: float
    bubble: float
    idle: float
    peaks: tuple[int, ...]

    @property
    def lines(self) -> tuple[str, str]:
        """Two lines of text, at most 80 columns wide for up to sixteen ranks."""
        times = f"makespan {number(self.makespan)}, idle {number(self.idle)} a rank"
        same = len(set(self.peaks)) == 1
        held = f"{self.peaks[0]} on every rank" if same else " ".join(map(str, self.peaks))
        return (f"bubble {units.percent(self.bubble)} of the time ({times})", f"peak activations: {held}")


def summarise(timeline: Timeline) -> Summary:
    """The figures of `timeline`."""
    table = timeline.table
    return Summary(
        title=f"{table.name}, {_of(table.ranks, 'rank')}, {_of(table.microbatches, 'microbatch')}",
        makespan=timeline.makespan,
        bubble=timeline.bubble_fraction,
        idle=max(timeline.bubble(rank) for rank in range(table.ranks)),
        peaks=peak_activations(table),
    )


def number(value: float) -> str:
    """A time without trailing zeros: 33, 1.5, 0.3333."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _of(count: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"
