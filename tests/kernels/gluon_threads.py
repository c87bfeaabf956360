"""Runs warp-specialised Gluon kernels in Python: each part is a thread, and barriers are waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

turn = threading.Condition()


class Barrier:
    """Phases that end when all have arrived and all bytes have come."""

    def __init__(self, arrivals):
        self.count = self.missing = arrivals
        self.bytes = self.phase = 0

    def came(self, arrivals=0, size=0):
        with turn:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0
            if not self.missing and not self.bytes:
                self.phase, self.missing = self.phase + 1, self.count
            turn.notify_all()


def _wait(bar, parity):
    with turn:
        assert turn.wait_for(lambda: bar.phase & 1 != parity, timeout=10), "nobody comes"


def _expect(bar, size, *, pred=True):
    if pred:
        bar.came(arrivals=1, size=size)


def _arrive(bar, count, *, pred=True):
    if pred:
        bar.came(arrivals=count)


def _new_bars(count, arrivals):
    bars = [Barrier(arrivals) for _ in range(count)]
    return SimpleNamespace(index=lambda at: bars[at])


def specialize(parts, *_settings):
    """Run the parts of a program side by side; the first error of any is raised."""
    failed = []

    def run(part, operands):
        try:
            getattr(part, "fn", part)(*operands)
        except BaseException as error:  # noqa: BLE001 (told to the test below)
            failed.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def in_python(monkeypatch, modules, **own):
    """Make functions of modules Python's, their constants numbers, and names of `own` what these are."""
    own |= {
        "new_bars": _new_bars,
        "mbarrier": SimpleNamespace(wait=_wait, expect=_expect, arrive=_arrive),
        "meet": lambda: None,
        "fence_async_shared": lambda: None,
        "tma": SimpleNamespace(store_wait=lambda _: None),
        "warpgroup_mma_wait": lambda _, deps: deps[0],
    }
    for module in modules:
        for name, value in vars(module).copy().items():
            if name in own:
                monkeypatch.setattr(module, name, own[name])
            elif name.isupper() and hasattr(value, "value"):
                monkeypatch.setattr(module, name, value.value)
            elif hasattr(value, "fn"):
                monkeypatch.setattr(module, name, value.fn)
