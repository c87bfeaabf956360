"""What the machine can do, as one value: asked once, then only passed on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal

import torch

from benthic import units
from benthic.errors import BackendError, ConfigError
from benthic.spec import hardware

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE: Final = 1024
_LEAST: Final = 3
_MOST: Final = 20
_SECONDS: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class HardwareFacts:
    """One device.

    `peak_flops` is per dtype name, in FLOP/s without sparsity, and lacks a dtype whose peak is not known;
    `peak_source` says where it is from. `total_memory` is in bytes: of the GPU, or of a CPU's host. `threads`
    are those of operators on the host: beside a GPU one, since such operators are small.
    """

    device: Literal["cpu", "cuda"]
    name: str
    total_memory: int
    threads: int
    peak_flops: dict[str, float]
    peak_source: str


def detect(
    device: str, *, threads: int | None = None, clock: Callable[[], float] = perf_counter
) -> HardwareFacts:
    """Look at the machine; "auto" takes a CUDA GPU where there is one.

    The peak of a GPU is the published one, where its name is known; that of a CPU is measured with products
    of two 1024 x 1024 float32 matrices on `threads` threads (None: torch's choice), for a fifth of a second.

    Raises:
        BackendError: "cuda" was asked for and there is none.
        ConfigError: a CPU without threads was asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        message = "device=cuda, but torch sees 0 CUDA GPUs. Set device=cpu, or install torch with CUDA."
        raise BackendError(message)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return _gpu()
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        message = f"train.threads={threads} is below 1. Set it to 1 or more."
        raise ConfigError(message)
    peak = _measured_peak(threads, clock)
    return HardwareFacts(
        device="cpu",
        name=platform.processor() or platform.machine(),
        total_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        threads=threads,
        peak_flops={"float32": peak},
        peak_source=f"{_SIZE}^3 float32 matmul measured here on {units.plural(threads, 'thread')}",
    )


def _gpu() -> HardwareFacts:
    found = torch.cuda.get_device_properties(0)
    known = [name for name in hardware.names() if name in found.name.lower()]
    unknown: tuple[dict[str, float], str] = ({}, f"unknown: no published peak for {found.name!r}")
    peaks, source = _published(known[0]) if known else unknown
    return HardwareFacts(
        device="cuda",
        name=found.name,
        total_memory=found.total_memory,
        threads=1,
        peak_flops=peaks,
        peak_source=source,
    )


def _published(name: str) -> tuple[dict[str, float], str]:
    gpu = hardware.get(name)
    peaks = {"bfloat16": gpu.bf16_flops}
    if gpu.fp8_flops is not None:
        peaks["fp8"] = gpu.fp8_flops
    return peaks, f"published dense peak of {gpu.name}"


def _measured_peak(threads: int, clock: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _best_rate(clock)
    finally:
        torch.set_num_threads(before)


def _best_rate(clock: Callable[[], float]) -> float:
    """The fastest of the products that fit into `_SECONDS`, after one that warms the caches."""
    a = torch.ones(_SIZE, _SIZE)
    torch.mm(a, a)
    seconds: list[float] = []
    while len(seconds) < _LEAST or (len(seconds) < _MOST and sum(seconds) < _SECONDS):
        start = clock()
        torch.mm(a, a)
        seconds.append(clock() - start)
    return 2.0 * _SIZE**3 / max(min(seconds), 1e-9)
