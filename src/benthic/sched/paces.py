"""How fast instances of one kind are: seconds of a step as a line in what the step computes.

DistServe (OSDI'24) appendix A: above a constant, a prefill step grows with its tokens and a decode step with
the contexts of its sequences; here lengths are those of the load that is there, so tokens and sequences stand
for them. The line is fitted to steps that ran: nothing has to be profiled beforehand. Every size has one
voice, the median of its latest steps, however often it occurred: a rare slow step (a compilation, the first
ones after a change) moves nothing, and a load that stays at one size for hours does not drown the others.
"""

from __future__ import annotations

from collections import deque
from math import inf, log2
from statistics import fmean, median_low
from typing import Final, NamedTuple

LATEST: Final = 9
"""Measurements kept for one size."""

ENOUGH: Final = 3
"""Measurements after which a size has a voice."""

SIZES: Final = 4
"""Sizes to an octave."""

NEAR: Final = 0.75
"""A size of so large a share of the largest speaks for it without a line."""

LEAST_SHARE: Final = 0.25
"""A latency target takes at most the rest of the speed away.

A target near what nothing can meet would otherwise ask for any number of instances, and one beyond it for
none; so it is bounded, and small changes of what is measured are small changes of what is needed.
"""


class Line(NamedTuple):
    """`base + slope * size` seconds."""

    base: float
    slope: float

    def seconds(self, size: float) -> float:
        """Of a step of that size."""
        return self.base + self.slope * size

    def size(self, seconds: float) -> float:
        """The largest step that takes no longer."""
        return (seconds - self.base) / self.slope if self.slope else inf


class Step(NamedTuple):
    """A step: what it computes, and how long it takes."""

    size: float
    seconds: float

    @property
    def speed(self) -> float:
        """What such steps compute a second, one behind the other."""
        return self.size / self.seconds


class Pace:
    """Learns the line of one kind of instance, whose largest step has size `most`."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._seen: dict[int, deque[tuple[float, float]]] = {}

    def add(self, size: float, seconds: float) -> None:
        """Steps of this mean size took this mean time; those without work tell nothing."""
        if size > 0.0 and seconds > 0.0:
            number = round(SIZES * log2(size))
            self._seen.setdefault(number, deque(maxlen=LATEST)).append((seconds, size))

    def line(self) -> Line | None:
        """The line through what was seen; None while it is too little to say how time grows with size."""
        voices = [median_low(seen) for seen in self._seen.values() if len(seen) >= ENOUGH]
        if len(voices) > 1:
            return _fit([(size, seconds) for seconds, size in voices])
        if voices and voices[0][1] >= NEAR * self._most:
            seconds, size = voices[0]
            return Line(0.0, seconds / size)
        return None

    def within(self, bound_s: float = inf) -> Step | None:
        """The largest step within `bound_s` that has `LEAST_SHARE` of the speed; None while unknown."""
        line = self.line()
        if line is None:
            return None
        least = LEAST_SHARE * self._most / line.seconds(self._most)
        slowest = least * line.base / (1.0 - least * line.slope)
        size = min(self._most, max(line.size(bound_s), slowest))
        return Step(size, line.seconds(size))


def _fit(points: list[tuple[float, float]]) -> Line:
    """Least squares, with neither a step of no time nor one that is shorter for being larger."""
    mean_size, mean_s = fmean([size for size, _ in points]), fmean([seconds for _, seconds in points])
    spread = sum([(size - mean_size) ** 2 for size, _ in points])
    slope = sum([(size - mean_size) * (seconds - mean_s) for size, seconds in points]) / spread
    if slope <= 0.0:
        return Line(mean_s, 0.0)
    if slope * mean_size > mean_s:
        squares = sum([size * size for size, _ in points])
        return Line(0.0, sum([size * seconds for size, seconds in points]) / squares)
    return Line(mean_s - slope * mean_size, slope)
