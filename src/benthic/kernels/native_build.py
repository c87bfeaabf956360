"""Compiles `native_c/*.c` for this machine on first use, and says why when it cannot.

The library is kept under a name that hashes sources, flags, compiler and processor, in the first of these
folders that can be written: the one that `configure` was given; `__pycache__` beside the sources, for it is
to them what bytecode is to Python's; a temporary folder of this process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from benthic.errors import BackendError

SOURCES: Final = Path(__file__).with_name("native_c")
COMPILERS: Final = ("cc", "gcc", "clang")
FLAGS: Final = (
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
)

_FOLDER: ContextVar[Path | None] = ContextVar("_FOLDER", default=None)


def configure(folder: Path) -> None:
    """Keep compiled libraries in `folder`, made when needed; call it before the library is first used."""
    _FOLDER.set(folder)


def built(sources: Path = SOURCES) -> Path:
    """The compiled library; compiled now (about three seconds) if its folder does not hold it.

    Raises:
        BackendError: there is no C compiler, or it refuses the sources.
    """
    compiler = _compiler()
    files = sorted(sources.glob("*.[ch]"))
    path = library_folder() / f"native-{_fingerprint(compiler, files)}.so"
    if not path.exists():
        _compile(compiler, [file for file in files if file.suffix == ".c"], path)
    return path


def library_folder() -> Path:
    """The first folder that can be written: the configured one, one beside the sources, a temporary one."""
    for folder in (_FOLDER.get(), SOURCES / "__pycache__"):
        if folder is not None and _writable(folder):
            return folder
    return _private_folder()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="benthic-native-"))


def _compiler() -> str:
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    msg = f"no C compiler found ({', '.join(COMPILERS)}); install one for CPU kernels built for this machine"
    raise BackendError(msg)


def _fingerprint(compiler: str, files: list[Path]) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, text=True).stdout  # noqa: S603
    texts = [file.read_text(encoding="utf-8") for file in files]
    parts = (*texts, " ".join(FLAGS), version, platform.machine(), _processor())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """Model and instruction sets of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, files: list[Path], path: Path) -> None:
    """Compile, then move into place at once: processes that start together never see half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "native.so"
        command = [compiler, *FLAGS, *map(str, files), "-o", str(whole), "-lm"]
        done = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
        if done.returncode:
            msg = f"{compiler} failed with exit code {done.returncode}: {done.stderr.strip()[:500]}"
            raise BackendError(msg)
        whole.replace(path)
