"""From seconds a step to a whole run: failures, days, GPU hours and money."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benthic.errors import ConfigError

_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How often GPUs fail and what that costs.

    gpu_mtbf_hours: of one GPU with its share of the host and the network. The default is about what the
        Llama 3 report counts: 419 unexpected interruptions of 16,384 GPUs in 54 days. checkpoint_seconds: for
        which training stands still to save. restart_seconds: from a failure until training goes on.
    """

    gpu_mtbf_hours: float = 50_000.0
    checkpoint_seconds: float = 10.0
    restart_seconds: float = 600.0

    def __post_init__(self) -> None:
        values = self.gpu_mtbf_hours, self.checkpoint_seconds, self.restart_seconds
        if not (all(map(math.isfinite, values)) and values[0] > 0 and min(values) >= 0):
            message = (
                f"gpu_mtbf_hours = {self.gpu_mtbf_hours}, checkpoint_seconds = {self.checkpoint_seconds}, "
                f"restart_seconds = {self.restart_seconds}: all must be finite, the first above 0, the "
                "others not below."
            )
            raise ConfigError(message)

    def interval(self, gpus: int) -> float:
        """Seconds between checkpoints that lose least: sqrt(2 C M) (Young, 1974), M being all GPUs' MTBF."""
        return math.sqrt(2 * self.checkpoint_seconds * self.gpu_mtbf_hours * _HOUR / gpus)

    def goodput(self, gpus: int) -> float:
        """The part of the time that trains: 1 over 1 + C/t + (t/2 + R)/M, t being the interval."""
        between = self.gpu_mtbf_hours * _HOUR / gpus
        interval = self.interval(gpus)
        saving = self.checkpoint_seconds / interval if interval else 0.0
        return 1 / (1 + saving + (interval / 2 + self.restart_seconds) / between)


@dataclass(frozen=True)
class Run:
    """A whole run: `goodput` is the part of its time that trains."""

    steps: int
    seconds: float
    gpu_hours: float
    usd: float
    goodput: float


def run(
    step_seconds: float, *, step_tokens: float, tokens: float, gpus: int, usd: float, failures: Failures
) -> Run:
    """What `tokens` take at so many seconds a step; `usd` is the price of a GPU for an hour."""
    steps = math.ceil(tokens / step_tokens)
    goodput = failures.goodput(gpus)
    seconds = steps * step_seconds / goodput
    hours = seconds * gpus / _HOUR
    return Run(steps, seconds, hours, hours * usd, goodput)
