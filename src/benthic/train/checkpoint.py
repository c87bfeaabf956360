"""Checkpoints: a run continues from one exactly, and a killed process never leaves half of one.

    RUN/checkpoint/step-200/
        model.safetensors       parameters and router biases
        optimizer.safetensors   moments, masters, random states
        state.json              step, tokens, data position, config
        manifest.json           size and SHA-256 of the files above, written last

A checkpoint is written as `step-200.tmp`, flushed to disk, then renamed: a name without `.tmp` is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benthic.errors import CheckpointError, NotACheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


Groups = dict[str, dict[str, torch.Tensor]]
_NAME: Final = re.compile(r"^step-(\d+)$")
_SLACK: Final = 2**20
MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"


@dataclass(frozen=True)
class Saved:
    """One checkpoint: groups of tensors by name, and what is not a tensor."""

    step: int
    tensors: Groups
    state: dict[str, Any]


class Store(Protocol):
    """Where checkpoints live; a sharded store takes the same calls on every rank."""

    def save(self, saved: Saved) -> None:
        """Make `saved` durable under its step, then drop the oldest ones."""
        ...

    def load(self, step: int) -> Saved:
        """Read one back, verified."""
        ...

    def latest(self) -> int | None:
        """The highest complete step, None when there is none."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """Checkpoints in one folder, written by one process; `keep_latest_k=0` keeps all."""

    folder: Path
    keep_latest_k: int = 0

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Every complete step, ascending."""
        names = (_NAME.match(p.name) for p in self.folder.iterdir()) if self.folder.is_dir() else iter(())
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> int | None:
        """The highest complete step, None when there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, saved: Saved) -> None:
        """Write a checkpoint; it appears under its name only when it is complete and on disk.

        Raises:
            CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
        """
        unfinished = self.folder / f"step-{saved.step}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._check_space(saved)
        try:
            unfinished.mkdir()
            _write(unfinished, saved)
            self._publish(unfinished, self.path(saved.step))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._failed(saved, error) from error
        self._prune()

    def load(self, step: int) -> Saved:
        """Read the checkpoint of `step` after comparing every file with its checksum.

        Raises:
            NotACheckpointError: there is none.
            CheckpointError: a file is missing, truncated or changed.
        """
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            message = f"{folder} does not exist; complete steps in {self.folder}: {known}."
            raise NotACheckpointError(message)
        _verify(folder)
        groups = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return Saved(step, groups, json.loads((folder / STATE).read_text(encoding="utf-8")))

    def forget_after(self, step: int) -> None:
        """Delete the steps after `step`: a run that goes back to it will write them anew."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))

    def _sweep(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob("step-*.tmp"):
            shutil.rmtree(path)

    def _check_space(self, saved: Saved) -> None:
        needed, free = _bytes(saved) + _SLACK, shutil.disk_usage(self.folder).free
        if needed > free:
            message = (
                f"checkpoint of step {saved.step} needs {needed} bytes, but {self.folder} has {free} free. "
                f"{self._intact()} Free some space, or lower checkpoint.keep_latest_k."
            )
            raise CheckpointError(message)

    def _publish(self, unfinished: Path, final: Path) -> None:
        if final.exists():  # the same step saved again, after going back to an earlier one
            shutil.rmtree(final)
        unfinished.rename(final)
        _flush(self.folder)

    def _prune(self) -> None:
        if self.keep_latest_k > 0:
            for step in self.steps()[: -self.keep_latest_k]:
                shutil.rmtree(self.path(step))

    def _failed(self, saved: Saved, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"checkpoint of step {saved.step} ({_bytes(saved)} bytes) could not be written to {self.folder} "
            f"({free} bytes free): {error}. {self._intact()} Free some space and pass --resume."
        )

    def _intact(self) -> str:
        latest = self.latest()
        return "No earlier checkpoint exists." if latest is None else f"Step {latest} is intact."


def _write(folder: Path, saved: Saved) -> None:
    for group, tensors in saved.tensors.items():
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            folder / f"{group}.safetensors",
        )
    (folder / STATE).write_text(json.dumps(saved.state, indent=2) + "\n", encoding="utf-8")
    files = sorted(folder.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST, folder):
        _flush(path)


def _verify(folder: Path) -> None:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file} cannot be read: {error}. Resume from an earlier step with --resume-step."
        raise CheckpointError(message) from error
    for name, expected in manifest.items():
        _verify_file(folder / name, expected)


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != expected["bytes"]:
        found = f"has {size} bytes" if size >= 0 else "is missing"
        message = (
            f"{path} {found}, but {MANIFEST} counts {expected['bytes']}. "
            "Resume from an earlier step with --resume-step."
        )
        raise CheckpointError(message)
    digest = _sha256(path)
    if digest != expected["sha256"]:
        message = (
            f"{path} has SHA-256 {digest[:12]}…, but {MANIFEST} says {expected['sha256'][:12]}…. "
            "Resume from an earlier step with --resume-step."
        )
        raise CheckpointError(message)


def _bytes(saved: Saved) -> int:
    return sum(t.numel() * t.element_size() for group in saved.tensors.values() for t in group.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
