"""Builds `native.c` for this machine on first use, and says why when it cannot.

The library is compiled with the system's C compiler (about two seconds), kept in the user's cache folder
under a name that hashes source, compiler and processor, and loaded through ctypes. It shares torch's OpenMP
threads: its OpenMP symbols are left open when it is linked and bound to the runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from benthic.errors import BackendError
from benthic.kernels.table import Case, Verdict, no, yes

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
)

_POINTER, _SIZE, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_LETTERS = {"p": _POINTER, "n": _SIZE, "f": _FLOAT, "i": _INT}
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
    "add": "pppn",
    "scale": "pfpn",
    "embedding": "pnnppnn",
    "outer": "pppnn",
    "cosine": "ppn",
    "sine": "ppn",
}
"""Arguments of every function: p pointer, n int64, f float, i int."""


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
def built() -> ctypes.CDLL:
    """The loaded library, built if the cache does not hold it.

    Raises:
        BackendError: there is no C compiler, or it refuses the source, or the result cannot be loaded.
    """
    compiler = _compiler()
    name = f"native-{_fingerprint(compiler)}.so"
    path = cache_folder() / name
    if not path.exists():
        _build(compiler, path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        msg = f"the compiled CPU kernels cannot be loaded: {error}"
        raise BackendError(msg) from error
    for function, letters in SIGNATURES.items():
        getattr(loaded, function).argtypes = [_LETTERS[letter] for letter in letters]
        getattr(loaded, function).restype = None
    loaded.mla_decode.restype = _INT
    return loaded


def _compiler() -> str:
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    msg = f"no C compiler found ({', '.join(COMPILERS)}); install one for CPU kernels built for this machine"
    raise BackendError(msg)


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, text=True).stdout  # noqa: S603
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(FLAGS), version, platform.machine(), _processor())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """Model and instruction sets of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def cache_folder() -> Path:
    """Where compiled libraries are kept: the user's cache, else a private temporary folder."""
    folder = Path.home() / ".cache" / "benthic"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="benthic-native-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="benthic-native-"))


def _build(compiler: str, path: Path) -> None:
    """Compile, then move into place at once: processes that start together never see half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        _call([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        # No -fopenmp here: a second OpenMP runtime would bring threads of its own.
        _call([compiler, "-shared", str(compiled), "-o", str(linked), "-lm"])
        linked.replace(path)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
    if done.returncode:
        msg = f"{command[0]} failed with exit code {done.returncode}: {done.stderr.strip()[:500]}"
        raise BackendError(msg)
