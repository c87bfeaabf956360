"""The library of `native_c`: loaded once, called with arguments packed as its C structs are.

Every function takes a pointer to its arguments; `run` makes a list of such calls with a number of threads.
One op through Python is a list of one; a tape (`benthic.kernels.tape`) is a list of a whole step.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benthic.errors import BackendError
from benthic.kernels import native_build
from benthic.kernels.table import Case, Verdict, no, yes

if TYPE_CHECKING:
    from collections.abc import Callable

_LETTERS = {"p": "P", "n": "q", "f": "f", "i": "i"}
SIGNATURES = {
    "grouped_linear": "ppnnppnnnn",
    "linear": "pnpnpnnn",
    "mla_decode": "pnnpnnppnppnnnnnnf",
    "store_latent": "ppnpnpnnn",
    "add_rms_norm": "pnpnpppnnf",
    "swiglu": "pnpnn",
    "rope": "pnnpppnnn",
    "route": "pppppnnnnnniif",
    "permute": "ppppppnnnn",
    "unpermute": "ppppnnn",
    "bmm": "pnnnpnnpnnnnnn",
    "lay_panels": "pnnnpnnn",
    "add": "pppn",
    "scale": "pfpn",
    "embedding": "pnnppnn",
    "outer": "pppnn",
    "cosine": "ppn",
    "sine": "ppn",
}
"""Members of every function's struct: p pointer, n int64, f float, i int."""

PANEL = 16
"""Columns of a panel, as in `product.h`."""


def native_runs(reason: str) -> functools.partial[Verdict]:
    """A `when` for the ops of this library: CPU and float32, where the library can be built."""
    return functools.partial(_verdict, reason)


def _verdict(reason: str, case: Case) -> Verdict:
    if case.device != "cpu" or case.dtype != torch.float32:
        return no(f"runs on cpu in float32, not on {case.device} in {case.dtype}")
    refusal = build_refusal()
    return yes(reason) if refusal is None else no(refusal)


@functools.cache
def build_refusal() -> str | None:
    """Why the library cannot be built or loaded here; None when it is ready."""
    try:
        built()
    except BackendError as error:
        return str(error)
    return None


RECORDER: ContextVar[Any] = ContextVar("RECORDER", default=None)
"""Stands in for the library while a tape is recorded (`benthic.kernels.tape`)."""


def library() -> Any:
    """The loaded library, or the recorder that wraps it."""
    return RECORDER.get() or built()


@functools.cache
def built() -> Library:
    """The loaded library, built if its folder does not hold it.

    Raises:
        BackendError: it cannot be built (see `native_build.built`), or the result cannot be loaded.
    """
    path = native_build.built()
    try:
        return Library(ctypes.CDLL(str(path)))
    except OSError as error:
        msg = f"the compiled CPU kernels cannot be loaded: {error}"
        raise BackendError(msg) from error


class Call(NamedTuple):
    """A call to be made later: a function of the library and its packed arguments."""

    name: str
    packed: bytes


class CallList(NamedTuple):
    """Calls in the memory of C: pairs of a function and its arguments, and the memory of the latter."""

    pairs: Any
    packed: list[Any]


class Library:
    """Its functions as attributes, each taking the members of its struct; None is a null pointer."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._run, self._run_one = loaded.run, loaded.run_one
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._run_one.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        self._run.restype = self._run_one.restype = None
        self._addresses = {name: ctypes.cast(getattr(loaded, name), ctypes.c_void_p) for name in SIGNATURES}
        for name in SIGNATURES:
            setattr(self, name, self._caller(name))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., None]: ...

    def listed(self, calls: list[Call]) -> CallList:
        """Calls as `run` takes them."""
        packed = [ctypes.create_string_buffer(call.packed, len(call.packed)) for call in calls]
        pairs = (ctypes.c_void_p * (2 * len(calls)))()
        for i, (call, buffer) in enumerate(zip(calls, packed, strict=True)):
            pairs[2 * i], pairs[2 * i + 1] = self._addresses[call.name].value, ctypes.addressof(buffer)
        return CallList(pairs, packed)

    def run(self, calls: CallList, first: int, count: int) -> None:
        """Make `count` calls from number `first` on, with torch's number of threads."""
        at = ctypes.addressof(calls.pairs) + first * 2 * ctypes.sizeof(ctypes.c_void_p)
        self._run(at, count, torch.get_num_threads())

    def _caller(self, name: str) -> Callable[..., None]:
        address, run_one = self._addresses[name], self._run_one

        def call(*arguments: Any) -> None:
            run_one(address, pack(name, arguments), torch.get_num_threads())

        return call


@functools.cache
def _struct(name: str) -> struct.Struct:
    return struct.Struct("@" + "".join(_LETTERS[letter] for letter in SIGNATURES[name]))


def pack(name: str, arguments: tuple[Any, ...]) -> bytes:
    """The struct of a function's arguments, as C lays it out."""
    return _struct(name).pack(*[0 if value is None else value for value in arguments])
