"""The highest rate that a server bears: double until the targets are missed, then halve the interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run at one rate: share of requests that met every target, and what spoils it as a measurement."""

    attainment: float
    spoiled: str | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to look.

    Attributes:
        start: first rate, requests a second.
        attainment: share of requests that must meet every target.
        precision: the answer's interval over its upper end.
        most: the last rate that is tried.
        least: below this rate nothing is looked for.
    """

    start: float = 1.0
    attainment: float = 0.9
    precision: float = 0.05
    most: float = 4096.0
    least: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.attainment <= 1.0 or not 0.0 < self.precision < 1.0:
            msg = f"attainment = {self.attainment} must be in (0, 1], precision = {self.precision} in (0, 1)"
            raise ConfigError(msg)
        if not self.least <= self.start <= self.most:
            msg = f"the first rate {self.start} lies outside {self.least} to {self.most} requests/s"
            raise ConfigError(msg)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The highest rate that passed and the lowest that failed (inf when none did: the rate is a lower bound).

    `rate` is 0 when even `Search.least` failed.
    """

    rate: float
    failed: float
    trials: dict[float, Trial]


async def find_goodput(run: Callable[[float], Awaitable[Trial]], search: Search) -> Found:
    """Search, with one `run` a rate.

    Raises:
        ServeError: a run was spoiled (the client could not keep up): its rate says nothing of the server.
    """
    trials: dict[float, Trial] = {}

    async def passes(rate: float) -> bool:
        trial = trials[rate] = await run(rate)
        if trial.spoiled is not None:
            msg = f"at {rate:g} requests/s {trial.spoiled}. The search cannot go on."
            raise ServeError(msg)
        return trial.attainment >= search.attainment

    low, high = await _bracket(passes, search)
    while math.isfinite(high) and low > 0.0 and high - low > search.precision * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if await passes(middle) else (low, middle)
    return Found(rate=low, failed=high, trials=trials)


async def _bracket(passes: Callable[[float], Awaitable[bool]], search: Search) -> tuple[float, float]:
    """A rate that passes (0: none does) and, above it, one that fails (inf: none up to `most`)."""
    rate = search.start
    if await passes(rate):
        while rate < search.most:
            higher = min(2.0 * rate, search.most)
            if not await passes(higher):
                return rate, higher
            rate = higher
        return rate, math.inf
    while rate > search.least:
        lower = max(rate / 2.0, search.least)
        if await passes(lower):
            return lower, rate
        rate = lower
    return 0.0, rate
