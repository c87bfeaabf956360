"""The list of a checkpoint's files with sizes and checksums: a damaged one is found before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MANIFEST: Final = "manifest.json"
_REMEDY: Final = "Resume from an earlier step with --resume-step."
Entries = dict[str, dict[str, Any]]


def entries_of(paths: Iterable[Path]) -> Entries:
    """Size and SHA-256 of files, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def write(folder: Path, entries: Entries) -> None:
    """Write the list into `folder` and flush both to the disk.

    Raises:
        CheckpointError: a listed file is not in `folder` as listed: ranks do not write to the same disk.
        OSError: the disk does not take it.
    """
    for name, expected in entries.items():
        if _size(folder / name) != expected["bytes"]:
            message = (
                f"a rank wrote {expected['bytes']} bytes to {name}, but for rank 0 it {_seen(folder / name)} "
                f"in {folder}. Put the run folder on a disk that all hosts share."
            )
            raise CheckpointError(message)
    file = folder / MANIFEST
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    flush(file)
    flush(folder)


def read(folder: Path) -> Entries:
    """The list in `folder`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = folder / MANIFEST
    try:
        entries: Entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file} cannot be read: {error}. {_REMEDY}"
        raise CheckpointError(message) from error
    return entries


def verify(folder: Path, names: Iterable[str], entries: Entries) -> None:
    """Compare the files `names` with what `entries` says of them.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    for name in names:
        _verify_file(folder / name, entries[name])


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if _size(path) != expected["bytes"]:
        message = f"{path} {_seen(path)}, but {MANIFEST} counts {expected['bytes']}. {_REMEDY}"
        raise CheckpointError(message)
    digest = _sha256(path)
    if digest != expected["sha256"]:
        message = (
            f"{path} has SHA-256 {digest[:12]}…, but {MANIFEST} says {expected['sha256'][:12]}…. {_REMEDY}"
        )
        raise CheckpointError(message)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _seen(path: Path) -> str:
    size = _size(path)
    return "is missing" if size is None else f"has {size} bytes"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
