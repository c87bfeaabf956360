"""What a simulated schedule comes to: the figures printed under its picture."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from benthic import units
from benthic.sched.pipeline.simulate import peak_activations, stages_held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.simulate import Timeline


@dataclass(frozen=True)
class Summary:
    """The figures of one schedule.

    `bubble` is idle time over all ranks' time, in [0, 1); `idle` the idle time of the rank that idles most,
    in units of cost; `peaks` the most activations that each rank holds at once, one for each stage and
    microbatch, a stage being 1/(ranks x `virtual_stages`) of the model; `held` how many stages of parameters
    a rank holds.
    """

    title: str
    makespan: float
    bubble: float
    idle: float
    peaks: tuple[int, ...]
    virtual_stages: Fraction
    held: int

    @property
    def peak(self) -> Fraction:
        """The largest peak, in microbatches on a whole rank's share of the model."""
        return max(self.peaks) / self.virtual_stages

    @property
    def copies(self) -> Fraction:
        """How often the ranks together hold the parameters of the model."""
        return self.held / self.virtual_stages

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines of text, at most 80 columns wide for up to sixteen ranks."""
        times = f"makespan {number(self.makespan)}, idle {number(self.idle)} a rank"
        same = len(set(self.peaks)) == 1
        held = f"{self.peaks[0]} on every rank" if same else " ".join(map(str, self.peaks))
        first = f"bubble {units.percent(self.bubble)} of the time ({times})"
        return (first, f"peak activations: {held}", *self._shares)

    @property
    def _shares(self) -> Iterator[str]:
        """What an activation and a rank's parameters are, where a rank holds more than one stage."""
        if self.held > 1:
            share = f"stages are 1/{self.virtual_stages} of a rank's share"
            whole = "a rank holds its share of the model in two directions"
            each = whole if self.virtual_stages == 1 else share
            yield f"{each}; parameters held {number(float(self.copies))}x"


def summarise(timeline: Timeline) -> Summary:
    """The figures of `timeline`."""
    table = timeline.table
    ranks, microbatches = units.plural(table.ranks, "rank"), units.plural(table.microbatches, "microbatch")
    return Summary(
        title=f"{table.name}, {ranks}, {microbatches}",
        makespan=timeline.makespan,
        bubble=timeline.bubble_fraction,
        idle=max(timeline.bubble(rank) for rank in range(table.ranks)),
        peaks=peak_activations(table),
        virtual_stages=Fraction(table.stages, table.ranks),
        held=max(stages_held(table)),
    )


def number(value: float) -> str:
    """A time without trailing zeros: 33, 1.5, 0.3333, and small ones more exactly: 0.000125."""
    return f"{value:.{4 if abs(value) >= 0.1 else 6}f}".rstrip("0").rstrip(".")
