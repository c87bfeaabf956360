"""Reading a folder of safetensors files: headers first, so that what is wrong is known before data moves."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open

from benthic.errors import CheckpointError, NotACheckpointError
from benthic.spec import hf

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The safetensors types a weight may be stored in."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header describes it; `dtype` is the safetensors code."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Source:
    """The tensors of a checkpoint folder; a context manager that keeps its files open.

    Raises:
        NotACheckpointError: the folder lacks the files of a checkpoint; what was looked for is named.
        CheckpointError: a file is truncated (named with both sizes), or index and files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _read_headers(folder)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor, backed by the file's pages: nothing is copied until it is used."""
        stored = self.tensors[name]
        handle = self._open.get(stored.file)
        if handle is None:
            handle = self._stack.enter_context(safe_open(stored.file, framework="pt"))
            self._open[stored.file] = handle
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            message = f"{stored.file}: cannot read {name}: {error}. Fetch the file again."
            raise CheckpointError(message) from error
        return tensor


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        NotACheckpointError: there is no such folder or file, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise NotACheckpointError(_not_a_checkpoint(folder, CONFIG_FILE))
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        message = f"{path} is not JSON: {error}."
        raise NotACheckpointError(message) from error
    if not isinstance(config, dict):
        message = f"{path} holds a {type(config).__name__}, not an object with the model's hyper-parameters."
        raise NotACheckpointError(message)
    return config


def _read_headers(folder: Path) -> dict[str, Stored]:
    if (folder / INDEX_FILE).is_file():
        return _read_indexed(folder)
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    raise NotACheckpointError(_not_a_checkpoint(folder, f"{INDEX_FILE} or {SINGLE_FILE}"))


def _read_indexed(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX_FILE
    try:
        weight_map: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not an index of safetensors files (it needs a weight_map): {error!r}."
        raise CheckpointError(message) from error
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        message = (
            f"{path} names {len(files)} files, {len(absent)} are not there: {', '.join(absent)}. Fetch them."
        )
        raise CheckpointError(message)
    found: dict[str, Stored] = {}
    for name in files:
        found |= read_header(folder / name)
    astray = [name for name, file in weight_map.items() if name not in found or found[name].file.name != file]
    if astray:
        message = f"{path} places {len(astray)} tensors where they are not: {', '.join(astray[:20])}."
        raise CheckpointError(message)
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Names, types and shapes in one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is shorter or longer than its header says (both sizes named), or has none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        text = file.read(min(length, size))
    if 8 + length > size:
        needed = f"its header alone needs {8 + length} bytes"
        message = f"{path} is truncated or not a safetensors file: {needed}, found {size}. Fetch it again."
        raise CheckpointError(message)
    try:
        found, end = _parse_header(path, text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not a safetensors file ({size} bytes): {error!r}. Fetch it again."
        raise CheckpointError(message) from error
    expected = 8 + length + end
    if expected != size:
        word = "truncated" if size < expected else "longer than its header says"
        message = f"{path} is {word}: expected {expected} bytes, found {size}. Fetch it again."
        raise CheckpointError(message)
    return found


def _parse_header(path: Path, text: bytes) -> tuple[dict[str, Stored], int]:
    """The tensors, and where the last one's data ends."""
    entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}, end


def stored_bytes(stored: Stored) -> int:
    """Bytes of a tensor's data."""
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _not_a_checkpoint(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        return (
            f"{folder} is not a folder; looked for {wanted} in it. Name the folder that holds the checkpoint."
        )
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled and wanted != CONFIG_FILE:
        held = ", ".join(pickled[:3])
        return f"{folder} holds {held} but no {wanted}; only safetensors are read. Convert them first."
    seen = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"{folder} is not a checkpoint: looked for {wanted}, found {seen}. {hf.nearest_checkpoint(folder)}"
