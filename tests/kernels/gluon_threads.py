"""Runs warp-specialised Gluon kernels in Python: each part is a thread, and barriers are waited for."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import NamedTuple

import torch

turn = threading.Condition()
_thread = threading.local()
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


class Values(torch.Tensor):
    """Values in registers: they have Triton's type, and adding to a name gives it others."""

    type = SimpleNamespace(layout=None)

    def __iadd__(self, more):
        return self + more


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
        return self.data.clone().as_subclass(Values)


class Pointer:
    """A tensor and places in it, and how often each is written."""

    def __init__(self, data, at=0, written=None):
        self.data, self.at = data.view(-1), at
        self.written = torch.zeros(data.numel(), dtype=torch.int64) if written is None else written
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more):
        return Pointer(self.data, self.at + more, self.written)


class Numbers(NamedTuple):
    """Some numbers and a place among them."""

    data: list[int]
    at: int = 0

    def __add__(self, more):
        return Numbers(self.data, self.at + more)


def take(pointer, *, mask=True, other=None):
    """What lies at a place, a whole number as Python's."""
    if not mask:
        return other
    found = pointer.data[pointer.at]
    return found if isinstance(found, torch.Tensor) and found.is_floating_point() else int(found)


def take_all(pointer, *, mask=True, other=0):
    """What lies at the places that a mask names: others are not read, not even beyond the end."""
    at, mask = torch.as_tensor(pointer.at), torch.as_tensor(mask)
    return torch.where(mask, pointer.data[torch.where(mask, at, 0)], torch.as_tensor(other))


def put(pointer, values, *, mask=True):
    """Write what a mask names, and count it."""
    at = torch.as_tensor(pointer.at)
    mask, values = (torch.as_tensor(each).expand(at.shape) for each in (mask, values))
    with turn:
        pointer.data[at[mask]] = values[mask]
        pointer.written.view(-1).index_add_(0, at[mask], torch.ones_like(at[mask]))


class Described:
    """A tensor whose blocks are loaded or stored, where those began, and how often each place was written."""

    def __init__(self, data, *block, written=None):
        self.data, self.dtype, self.layout, self.loaded, self.written = data, data.dtype, None, [], written
        self.block_type = SimpleNamespace(shape=list(block), nbytes=math.prod(block) * data.itemsize)


def places(corner, shape):
    return tuple(slice(int(at), int(at) + size) for at, size in zip(corner, shape, strict=True))


def load(described, corner, bar, tile, *, pred=True):
    """A whole block; zeros lie behind the ends."""
    if pred:
        assert list(tile.shape) == described.block_type.shape
        described.loaded.append(tuple(int(at) for at in corner))
        part = described.data[places(corner, tile.shape)]
        tile.data.zero_()
        tile.data[places([0] * part.ndim, part.shape)] = part
        bar.came(size=-described.block_type.nbytes)


def _leaving():
    """What this thread has told TMA to write and not waited for."""
    if not hasattr(_thread, "leaving"):
        _thread.leaving = []
    return _thread.leaving


def unload(described, corner, tile):
    """TMA reads shared memory as late as it may. What stands over the edge is left out."""
    _leaving().append((described, corner, tile))


def store_wait(most):
    """Until no more than `most` are on their way; what stood in shared memory is of no use then."""
    while len(_leaving()) > most:
        described, corner, tile = _leaving().pop(0)
        place = places(corner, tile.shape)
        part = described.data[place]
        part.copy_(tile.data[places([0] * part.ndim, part.shape)])
        described.written[place] += 1
        tile.data.fill_(torch.nan)


def unload_whole(described, corner, tile):
    assert len(described.data[places(corner, tile.shape)]) == 64, "whole parts alone leave by TMA"
    unload(described, corner, tile)


def _tile_scale(amax, power_of_two):
    scale = amax.clamp(min=1e-4) / 448.0
    return torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale


QUOTIENTS = {
    "tile_scale": _tile_scale,
    "inverse_of": lambda scale: 1.0 / scale,
    "quotient": lambda x, by, _inverse: x / by,
}


def where(condition, *either):
    return torch.where(*(torch.as_tensor(each) for each in (condition, *either))).as_subclass(Values)


def of_tensors(function):
    """A function of two tensors that takes numbers too."""
    return lambda left, right: function(torch.as_tensor(left), torch.as_tensor(right)).as_subclass(Values)


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
            assert not _leaving(), "shared memory is given up while TMA reads it"
        except BaseException as error:  # noqa: BLE001 (told to the test below)
            failed.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _memory(dtype, shape, _layout):
    """Shared memory that nobody has written yet."""
    return Tiles(torch.full(shape, torch.nan if dtype.is_floating_point else -1).to(dtype))


LAYOUTS = ("Blocked", "DistributedLinear", "NVMMADistributed", "Slice", "SwizzledShared")
COMMON = {f"{name}Layout": lambda *_: None for name in LAYOUTS} | {
    "load": take, "store": put, "where": lambda condition, left, right: left if condition else right,
    "minimum": min, "maximum": max, "exp": torch.exp, "abs": torch.abs,
    "sum": lambda x, axis: x.sum(axis), "max": lambda x, axis: x.amax(axis),
    "arange": lambda start, end, layout=None: torch.arange(start, end).as_subclass(Values),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype).as_subclass(Values),
    "zeros_like": torch.zeros_like, "reshape": torch.reshape, "permute": torch.permute,
    "split": lambda x: x.unbind(-1), "convert_layout": lambda x, _layout: x, "multiple_of": lambda x, _: x,
    "static_range": range, "warp_specialize": specialize, "allocate_shared_memory": _memory,
    "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda *_: None),
    "float32": torch.float32, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


def gluon_language(**own):
    """What stands for the Gluon language: what is common, and what a test adds or has otherwise."""
    return SimpleNamespace(**(COMMON | own))


def each_program(language, count, number=int):
    """Be one program of a launch after the other."""
    language.num_programs = lambda _axis: count
    for program in range(count):
        language.program_id = lambda _axis, program=program: number(program)
        yield program


QUEUE = {
    "asked": lambda counter: 0 if counter is None else next(counter),
    "answered": lambda answer: answer,
    "write_number": lambda numbers, at, value: numbers.index(at).data.fill_(value),
    "read_number": lambda numbers, at: int(numbers.index(at).data),
}
"""What programs ask for their next tile: an iterator, or nothing."""


def in_python(monkeypatch, modules, **own):
    """Make functions of modules Python's, their constants numbers, and names of `own` what these are."""
    own = {
        "new_bars": _new_bars,
        "mbarrier": SimpleNamespace(wait=_wait, expect=_expect, arrive=_arrive),
        "meet": lambda: None,
        "fence_async_shared": lambda: None,
        "tma": SimpleNamespace(store_wait=store_wait),
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
