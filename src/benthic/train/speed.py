"""How fast a run goes and what part of the machine's peak that is."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic import units
from benthic.parallel.setup import number
from benthic.spec import flops

if TYPE_CHECKING:
    from benthic.train.config import RunConfig
    from benthic.train.hardware import HardwareFacts
    from benthic.train.trainer import StepResult


@dataclass(frozen=True)
class Speed:
    """Over the last steps. `mfu` is None where the peak of the dtype in use is not known.

    Tokens are those of all ranks together, FLOPs those of one rank on average.

    `memory` is the highest so far in bytes: of tensors on a GPU, of the process on a CPU.
    """

    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    memory: int
    memory_fraction: float


class Meter:
    """Turns seconds of steps into speed.

    FLOPs are counted by `benthic.spec.flops.training`, causal, MTP modules included as they run; what is
    recomputed is not counted. The peak is that of the dtype of the products.
    """

    def __init__(self, config: RunConfig, facts: HardwareFacts) -> None:
        figure = flops.training(config.model, number(config.train.seq_len), mtp=True)
        self._facts, self._flops, self._rule = facts, figure.value, figure.rule
        self._dtype = config.precision.matmul
        self._peak = facts.peak_flops.get(self._dtype)
        self._ranks = config.layout.ranks
        self._seconds, self._tokens = 0.0, 0

    def describe(self) -> str:
        """Which FLOPs are counted and which peak they are divided by."""
        counted = f"{units.flops(self._flops)} a token, causal ({self._rule})"
        if self._peak is None:
            return f"FLOPs: {counted}; mfu unknown: no {self._dtype} peak ({self._facts.peak_source})"
        return f"FLOPs: {counted}; mfu of {units.rate(self._peak, 'FLOP')} ({self._facts.peak_source})"

    def add(self, result: StepResult, seconds: float) -> Speed:
        """Count one step; the speed is that step's."""
        self._seconds += seconds
        self._tokens += result.step_tokens
        return self._speed(result.step_tokens, seconds)

    def since_last(self) -> Speed:
        """The speed over all steps added since the last call."""
        speed = self._speed(self._tokens, self._seconds)
        self._seconds, self._tokens = 0.0, 0
        return speed

    def _speed(self, tokens: int, seconds: float) -> Speed:
        rate = tokens / max(seconds, 1e-9)
        done, memory = rate * self._flops / self._ranks, _memory(self._facts.device)
        mfu = None if self._peak is None else done / self._peak
        return Speed(rate, done, mfu, memory, memory / self._facts.total_memory)


def console_line(result: StepResult, speed: Speed) -> str:
    """The line that people who train know by heart."""
    gib = speed.memory / 2**30
    mfu = "unknown" if speed.mfu is None else f"{100 * speed.mfu:.2f}%"
    return (
        f"step: {result.step:>5}  loss: {result.loss:8.5f}  grad_norm: {result.grad_norm:7.4f}  "
        f"memory: {gib:5.2f}GiB({100 * speed.memory_fraction:.2f}%)  tps: {speed.tokens_per_second:,.0f}  "
        f"tflops: {speed.flops_per_second / 1e12:,.4g}  mfu: {mfu}"
    )


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
