"""Writing safetensors shards one tensor at a time, aside, to be moved into place when complete.

The library's own writer wants a whole shard in memory; planning offsets first and writing each tensor at its
place keeps one tensor in memory, whatever the model's size.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from benthic.errors import CheckpointError
from benthic.model.shards import CONFIG_FILE, DTYPES, INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

_PARTIAL: Final = ".partial-"
_LOCK_FILE: Final = ".lock"
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go: `offset` counts from the start of the shard's file."""

    file: Path
    offset: int
    planned: Planned


def split(tensors: Iterable[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Fill shards in the given order; a tensor larger than `max_shard_bytes` has a shard of its own.

    Raises:
        CheckpointError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes <= 0:
        message = (
            f"max_shard_bytes = {max_shard_bytes}; a shard needs at least one byte. Give a positive size."
        )
        raise CheckpointError(message)
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _header(shard: Sequence[Planned]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes and each tensor's offset in the file.

    Wider types come first, as in the library's own files, so that every tensor is aligned to its type.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor in sorted(shard, key=lambda t: -t.dtype.itemsize):
        starts[tensor.name] = end
        code = _CODES[tensor.dtype]
        end += tensor.nbytes
        offsets = [starts[tensor.name], end]
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + start for name, start in starts.items()}


class ShardWriter:
    """A checkpoint being written; leaving the `with` block moves it into place, or removes it after an error.

    Tensors may come in any order, each exactly once. `config.json` is moved last: without it the folder is
    not a checkpoint, so a write that was cut off is never mistaken for one. What a killed writer left behind
    is removed by the next one.

    Raises:
        CheckpointError: `folder` already holds a checkpoint, the disk has too little room (both sizes named),
            or a planned tensor was never written.
    """

    def __init__(self, folder: Path, tensors: Sequence[Planned], max_shard_bytes: int) -> None:
        self.folder = folder
        self.done_bytes = 0
        self.total_bytes = sum(t.nbytes for t in tensors)
        _refuse_occupied(folder)
        self._shards = split(tensors, max_shard_bytes)
        self._partial = folder / f"{_PARTIAL}{os.getpid()}"
        self._places: dict[str, Place] = {}

    def __enter__(self) -> Self:
        try:
            _remove_abandoned(self.folder)
            self._refuse_lack_of_room()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir()
            self._lock = (self._partial / _LOCK_FILE).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            for number, shard in enumerate(self._shards):
                self._begin(number, shard)
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(self._failure(error)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            error = failure
        finally:
            self._lock.close()
            shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(self._failure(error)) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its planned place.

        Raises:
            CheckpointError: the tensor is not planned, or its type or shape is not the planned one.
        """
        place = self._places.pop(name, None)
        if place is None or (place.planned.dtype, place.planned.shape) != (tensor.dtype, tuple(tensor.shape)):
            message = (
                f"{name}: writing {tensor.dtype} {list(tensor.shape)}, planned: {place and place.planned}."
            )
            raise CheckpointError(message)
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
        with place.file.open("r+b") as file:
            file.seek(place.offset)
            file.write(data)
        self.done_bytes += place.planned.nbytes

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Add a JSON file."""
        (self._partial / name).write_text(json.dumps(content, indent=2) + "\n")

    def copy(self, file: Path) -> None:
        """Add a file as it is."""
        shutil.copyfile(file, self._partial / file.name)

    def _failure(self, error: OSError) -> str:
        return f"{self.folder}: writing the checkpoint failed: {error}. No part of it was left behind."

    def _refuse_lack_of_room(self) -> None:
        there = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        room = shutil.disk_usage(there).free
        if room < self.total_bytes:
            message = (
                f"{self.folder}: the checkpoint needs {self.total_bytes} bytes, the disk has {room} free. "
                "Free some space or choose another folder."
            )
            raise CheckpointError(message)

    def _begin(self, number: int, shard: Sequence[Planned]) -> None:
        header, offsets = _header(shard)
        path = self._partial / self._file_name(number)
        path.write_bytes(header)
        for tensor in shard:
            self._places[tensor.name] = Place(path, offsets[tensor.name], tensor)

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _finish(self) -> None:
        if self._places:
            message = (
                f"{self.folder}: {len(self._places)} tensors were never written: {', '.join(self._places)}."
            )
            raise CheckpointError(message)
        if len(self._shards) > 1:
            weight_map = {t.name: self._file_name(i) for i, shard in enumerate(self._shards) for t in shard}
            self.write_json(
                INDEX_FILE, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            )
        _refuse_occupied(self.folder)  # again: another process may have been faster
        (self._partial / _LOCK_FILE).unlink()
        names = sorted((p.name for p in self._partial.iterdir()), key=lambda name: name == CONFIG_FILE)
        for name in names:
            _fsync(self._partial / name)
        for name in names:
            (self._partial / name).replace(self.folder / name)
        _fsync(self.folder)


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        message = f"{folder} is a file. Name a folder to write the checkpoint into."
        raise CheckpointError(message)
    taken = [name for name in (CONFIG_FILE, INDEX_FILE, SINGLE_FILE) if (folder / name).exists()]
    if taken:
        message = (
            f"{folder} already holds a checkpoint ({', '.join(taken)}). Remove it or choose another folder."
        )
        raise CheckpointError(message)


def _remove_abandoned(folder: Path) -> None:
    """Remove unfinished writes whose writer is gone: the system drops a dead process's locks."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        try:
            with (partial / _LOCK_FILE).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
        except BlockingIOError:
            continue  # another process is writing here; whoever ends last is refused


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
