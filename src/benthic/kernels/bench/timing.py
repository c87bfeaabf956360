"""Timing one call with rotating operands, and the lines that come of it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[int], Any]
CACHE_BYTES = 256 << 20  # rotate through more than this: five times the L2 of an H200
WORST_ERROR = 0.02  # a result further than this from the definition is not worth timing


@dataclass(frozen=True)
class Line:
    """One timed call; `rate` is in tera-units a second, `error` is relative to the definition."""

    op: str
    shape: str
    implementation: str
    microseconds: float
    rate: float
    unit: str
    error: float | None


@dataclass
class Bench:
    """Where it runs, how large, the lines so far, and who hears of a new one."""

    device: str
    dtype: torch.dtype
    small: bool
    lines: list[Line]
    say: Callable[[str], None] = print

    def random(self, *shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
        """Normal random numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
        return x.to(self.dtype).requires_grad_(grad)

    def sets(self, make: Make, size: float) -> list[Any]:
        """Operand sets that together exceed the cache."""
        count = 1 if self.small else min(8, max(1, math.ceil(CACHE_BYTES / max(size, 1))))
        return [make(seed) for seed in range(count)]

    def time(self, call: Callable[..., Any], operands: list[Any]) -> float:
        """Median seconds of `call(*operands)` over rotating operands, after warming up."""
        for operand in operands:
            call(*operand)
        rotation = itertools.cycle(operands)
        if self.device == "cpu":
            return statistics.median(_clocked(call, next(rotation)) for _ in range(3))
        return statistics.median(self._events(call, rotation, 30 if not self.small else 3))

    def _events(self, call: Callable[..., Any], rotation: Iterator[Any], repeats: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        # Keep the GPU busy while calls are queued, so that launch time on the host is not counted.
        torch.cuda._sleep(200_000_000 if not self.small else 1_000_000)  # noqa: SLF001 (no public spin)
        for start, end in pairs:
            operand = next(rotation)
            start.record()
            call(*operand)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def add(
        self,
        op: str,
        shape: str,
        implementation: str,
        seconds: float,
        work: float,
        unit: str,
        error: float | None,
    ) -> None:
        """Record a line and say it; `work` is bytes or FLOPs."""
        if error is not None and not error <= WORST_ERROR:
            msg = f"{op} {shape} by {implementation}: relative error {error:.1e} exceeds {WORST_ERROR}"
            raise SystemExit(msg)
        rate = work / seconds / 1e12
        line = Line(op, shape, implementation, seconds * 1e6, rate, unit, error)
        self.lines.append(line)
        shown = "" if error is None else f"{error:9.1e}"
        timing = f"{line.microseconds:11.1f} us {rate:9.2f} {unit:8}"
        self.say(f"{op:22} {shape:34} {implementation:16} {timing} {shown}")


def _clocked(call: Callable[..., Any], operand: Any) -> float:
    start = time.perf_counter()
    call(*operand)
    return time.perf_counter() - start


def relative(fast: torch.Tensor, exact: torch.Tensor) -> float:
    """Root-mean-square error relative to the exact values."""
    fast, exact = fast.detach().double(), exact.detach().double()
    return float((fast - exact).square().mean().sqrt() / exact.square().mean().sqrt())
