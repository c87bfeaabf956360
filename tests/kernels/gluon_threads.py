"""Runs warp-specialised Gluon kernels in Python: each part is a thread, and barriers are waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch

turn = threading.Condition()
TILE = 128


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


class Tiles:
    """Shared memory: tiles one after another."""

    def __init__(self, data):
        self.data, self.shape, self.dtype, self.layout = data, data.shape, data.dtype, None

    def index(self, at):
        assert 0 <= at < len(self.data)
        return type(self)(self.data[at])

    def permute(self, order):
        return type(self)(self.data.permute(order))

    def slice(self, start, length, dim=0):
        return type(self)(self.data.narrow(dim, start, length))

    def store(self, values):
        self.data.copy_(values)

    def load(self, _layout):
        return self.data.clone()


class Pointer:
    """A tensor and places in it, and how often each is written."""

    def __init__(self, data, at=0, written=None):
        self.data, self.at = data.view(-1), at
        self.written = torch.zeros(data.numel(), dtype=torch.int64) if written is None else written
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more):
        return Pointer(self.data, self.at + more, self.written)


class Described:
    """A matrix whose squares are loaded; zeros lie behind its ends."""

    def __init__(self, data):
        self.data, self.dtype, self.layout = data, data.dtype, None
        self.block_type = SimpleNamespace(nbytes=TILE * TILE * data.itemsize)


def load(described, corner, bar, tile, *, pred=True):
    if pred:
        row, column = (int(each) for each in corner)
        part = described.data[row : row + TILE, column : column + TILE]
        block = torch.zeros(TILE, TILE, dtype=part.dtype)
        block[: part.shape[0], : part.shape[1]] = part
        tile.store(block)
        bar.came(size=-described.block_type.nbytes)


def tile_scale(amax, power_of_two):
    scale = amax.clamp(min=1e-4) / 448.0
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


def where(condition, *either):
    return torch.where(torch.as_tensor(condition), *(torch.as_tensor(each) for each in either))


def _wait(bar, parity, *, pred=True):
    if pred:
        with turn:
            assert turn.wait_for(lambda: bar.phase & 1 != parity, timeout=20), "nobody comes"


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
    own = {
        "new_bars": _new_bars,
        "mbarrier": SimpleNamespace(wait=_wait, expect=_expect, arrive=_arrive),
        "meet": lambda: None,
        "fence_async_shared": lambda: None,
        "tma": SimpleNamespace(store_wait=lambda _: None),
        "warpgroup_mma_wait": lambda _, deps: deps[0],
    } | own
    for module in modules:
        for name, value in vars(module).copy().items():
            if name in own:
                monkeypatch.setattr(module, name, own[name])
            elif name.isupper() and hasattr(value, "value"):
                monkeypatch.setattr(module, name, value.value)
            elif hasattr(value, "fn"):
                monkeypatch.setattr(module, name, value.fn)
