"""Closed forms: waiting for a server of constant time, and how many prefill instances feed a decode instance.

DistServe section 3.1 (M/D/1, and prefill split over two GPUs by layers or by heads) and its blog's example.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benthic.errors import ConfigError


def mean_ttft(service_s: float, rate: float) -> float:
    """Mean TTFT of prompts of equal length: `D + R D^2 / (2 (1 - R D))`.

    Raises:
        ConfigError: the rate is at least what the server bears.
    """
    _check_load(service_s * rate, rate)
    return service_s + rate * service_s**2 / (2.0 * (1.0 - rate * service_s))


def mean_ttft_inter(service_s: float, rate: float) -> float:
    """The same with layers on two GPUs: `D + R D^2 / (4 (2 - R D))`.

    Raises:
        ConfigError: the rate is at least what the servers bear.
    """
    _check_load(service_s * rate / 2.0, rate)
    return service_s + rate * service_s**2 / (4.0 * (2.0 - rate * service_s))


def mean_ttft_intra(service_s: float, rate: float, speedup: float) -> float:
    """The same with heads on two GPUs, `speedup` times as fast: `D/K + R D^2 / (2 K (K - R D))`.

    Raises:
        ConfigError: the rate is at least what the servers bear.
    """
    _check_load(service_s * rate / speedup, rate)
    wait = rate * service_s**2 / (2.0 * speedup * (speedup - rate * service_s))
    return service_s / speedup + wait


def load_for_wait(service_s: float, wait_s: float, share: float) -> float:
    """The load at which `share` of the prompts wait at most `wait_s` for a server of constant time.

    From the heavy-traffic tail `P(wait > t) = rho exp(-2 (1 - rho) t / (rho D))`; 0 for a negative wait.
    """
    if wait_s < 0.0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        load = (low + high) / 2.0
        late = load * math.exp(-2.0 * (1.0 - load) * wait_s / (load * service_s))
        low, high = (load, high) if late <= 1.0 - share else (low, load)
    return low


class Phases(NamedTuple):
    """What one instance of each phase bears, requests a second, and its GPUs."""

    prefill_rate: float
    decode_rate: float
    prefill_gpus: int = 1
    decode_gpus: int = 1

    def per_gpu(self, prefills: int, decodes: int) -> float:
        """Requests a second and GPU of so many instances: the slower phase sets it."""
        gpus = prefills * self.prefill_gpus + decodes * self.decode_gpus
        return min(prefills * self.prefill_rate, decodes * self.decode_rate) / gpus

    @property
    def ratio(self) -> float:
        """Prefill instances for each decode instance at which neither waits for the other."""
        return self.decode_rate / self.prefill_rate

    @property
    def bound(self) -> float:
        """Requests a second and GPU if instances could be cut in pieces."""
        return 1.0 / (self.prefill_gpus / self.prefill_rate + self.decode_gpus / self.decode_rate)

    def best(self, gpus: int) -> tuple[int, int]:
        """Instances of each phase within `gpus` GPUs that bear most; fewest GPUs among equals.

        Raises:
            ConfigError: not even one of each fits.
        """
        if gpus < self.prefill_gpus + self.decode_gpus:
            msg = (
                f"a prefill instance of {self.prefill_gpus} GPUs and a decode instance of {self.decode_gpus} "
                f"need {self.prefill_gpus + self.decode_gpus}, but there are {gpus}."
            )
            raise ConfigError(msg)
        counts = [
            (prefills, (gpus - prefills * self.prefill_gpus) // self.decode_gpus)
            for prefills in range(1, (gpus - self.decode_gpus) // self.prefill_gpus + 1)
        ]
        prefills, decodes = max(counts, key=self._borne)
        rate = self._borne((prefills, decodes))
        return math.ceil(rate / self.prefill_rate - 1e-9), math.ceil(rate / self.decode_rate - 1e-9)

    def _borne(self, counts: tuple[int, int]) -> float:
        return min(counts[0] * self.prefill_rate, counts[1] * self.decode_rate)


def _check_load(load: float, rate: float) -> None:
    if not 0.0 <= load < 1.0:
        msg = f"{rate} requests/s load the server by {load:.3f}, but at 1 or more the queue never ends"
        raise ConfigError(msg)
