"""Checkpoints: a run continues from one exactly, and a killed process never leaves half of one.

    RUN/checkpoint/step-200/
        __0_0.distcp    what rank 0 wrote of the masters, moments, router biases and random states
        __1_0.distcp    what rank 1 wrote, and so on: no element twice
        .metadata       where each box of each tensor lies (torch.distributed.checkpoint)
        state.json      step, tokens, data position, config
        manifest.json   size and SHA-256 of the files above, written last

The tensors are those of the whole model, so a run may go on with another layout. A checkpoint is written as
`step-200.tmp`, flushed to disk, then renamed: a name without `.tmp` is complete. `.metadata` is a pickle, as
torch writes it: load only checkpoints that you trust.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from benthic.errors import CheckpointError, NotACheckpointError
from benthic.parallel import snapshot
from benthic.parallel.held import Held, copy_to_host
from benthic.parallel.peers import Peers
from benthic.train import manifest
from benthic.train.background import Background

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from benthic.spec.parameters import Param
    from benthic.train.manifest import Entries

_NAME: Final = re.compile(r"^step-(\d+)$")
_SLACK: Final = 2**20
STATE: Final = "state.json"
_OLD: Final = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """What one rank puts into a checkpoint: tensors by name, and what is not a tensor (rank 0's counts)."""

    step: int
    tensors: Mapping[str, Held]
    state: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(one.nbytes for one in self.tensors.values() if one.owned)


@dataclass(frozen=True)
class Stored:
    """One verified checkpoint; `fill` reads what a rank needs of it."""

    step: int
    state: dict[str, Any]
    reader: snapshot.Reader
    peers: Peers = field(default_factory=Peers)

    def fill(self, tensors: Mapping[str, Held]) -> None:
        """Read into every `flat`, whatever layout wrote it; every rank calls it.

        Raises:
            TensorMismatchError: tensors are missing, of another shape or dtype.
        """
        self.peers.each(lambda: self.reader.read(tensors))


class Store(Protocol):
    """Where checkpoints live; every rank makes the same calls, and all raise when one of them fails."""

    def save(self, saved: Saved, *, wait: bool = True) -> None:
        """Make `saved` durable under its step, then drop the oldest ones."""
        ...

    def wait(self) -> None:
        """Return when the last save is done; raise what it raised."""
        ...

    def open(self, step: int) -> Stored:
        """One checkpoint, verified."""
        ...

    def latest(self) -> int | None:
        """The highest complete step, None when there is none."""
        ...


@dataclass
class FolderStore:
    """Checkpoints in one folder that all ranks share; `keep_latest_k=0` keeps all."""

    folder: Path
    keep_latest_k: int = 0
    peers: Peers = field(default_factory=Peers)
    _background: Background = field(default_factory=Background)
    _buffers: dict[str, Tensor] = field(default_factory=dict)

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

    def save(self, saved: Saved, *, wait: bool = True) -> None:
        """Write a checkpoint; it appears under its name only when it is complete and on disk.

        With `wait=False` the tensors are copied to host memory and a thread writes the copies; what it raises
        is raised by the next call of `save`, `wait`, `open` or `forget_after`.

        Raises:
            CheckpointError: a rank's disk is full or cannot be written; older checkpoints are untouched.
        """
        self.wait()
        if wait:
            self._save(saved)
            return
        copied = dataclasses.replace(saved, tensors=copy_to_host(saved.tensors, self._buffers))
        self._background.start(lambda: self._save(copied))

    def wait(self) -> None:
        """Return when the last save is done.

        Raises:
            CheckpointError: it failed.
        """
        self._background.wait()

    def open(self, step: int) -> Stored:
        """Open the checkpoint of `step` after comparing every file with its checksum, each on one rank.

        Raises:
            NotACheckpointError: there is none.
            CheckpointError: a file is missing, truncated or changed, or it has the format before this one.
        """
        self.wait()
        wanted = self.peers.each(lambda: step)
        if len(set(wanted)) > 1:
            message = f"ranks want different steps {wanted} of {self.folder}. Give --resume-step."
            raise CheckpointError(message)
        self.peers.each(lambda: self._verify(step))
        folder = self.path(step)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Stored(step, state, snapshot.Reader(folder), self.peers)

    def forget_after(self, step: int) -> None:
        """Delete the steps after `step`: a run that goes back to it will write them anew."""
        self.wait()
        self.peers.first(lambda: self._delete([later for later in self.steps() if later > step]))

    def _save(self, saved: Saved) -> None:
        unfinished = self.folder / f"step-{saved.step}.tmp"
        needed = sum(self.peers.each(lambda: saved.nbytes))
        self.peers.first(lambda: self._begin(saved.step, needed))
        try:
            self._write(unfinished, saved)
        except CheckpointError as error:
            if self.peers.index == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise self._failed(saved.step, needed, error) from error
        if self.keep_latest_k > 0:
            self.peers.first(lambda: self._delete(self.steps()[: -self.keep_latest_k]))

    def _begin(self, step: int, needed: int) -> None:
        """Remove what a killed process left half written; look whether there is room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("step-*.tmp"):
            shutil.rmtree(path)
        free = shutil.disk_usage(self.folder).free
        if needed + _SLACK > free:
            message = (
                f"checkpoint of step {step} needs {needed + _SLACK} bytes, but {self.folder} has {free} "
                f"free. {self._intact()} Free some space, or lower checkpoint.keep_latest_k."
            )
            raise CheckpointError(message)

    def _write(self, unfinished: Path, saved: Saved) -> None:
        snapshot.write(saved.tensors, unfinished, self.peers)
        lists = self.peers.each(lambda: self._finish_files(unfinished, saved))
        entries = {name: entry for found in lists for name, entry in found.items()}
        self.peers.first(lambda: self._publish(unfinished, saved.step, entries))

    def _finish_files(self, folder: Path, saved: Saved) -> Entries:
        """This rank's files, with rank 0's also those that belong to none."""
        files = sorted(folder.glob(f"__{self.peers.index}_*"))
        if self.peers.index == 0:
            state = folder / STATE
            state.write_text(json.dumps(saved.state, indent=2) + "\n", encoding="utf-8")
            manifest.flush(state)
            files += [folder / snapshot.METADATA, state]
        return manifest.entries_of(files)

    def _publish(self, unfinished: Path, step: int, entries: Entries) -> None:
        manifest.write(unfinished, entries)
        final = self.path(step)
        if final.exists():  # the same step saved again, after going back to an earlier one
            _discard(final)
        unfinished.rename(final)
        manifest.flush(self.folder)

    def _verify(self, step: int) -> None:
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            message = f"{folder} does not exist; complete steps in {self.folder}: {known}."
            raise NotACheckpointError(message)
        entries = _entries(folder)
        manifest.verify(folder, sorted(entries)[self.peers.index :: self.peers.size], entries)

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            _discard(self.path(step))

    def _failed(self, step: int, needed: int, error: CheckpointError) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free
        return CheckpointError(
            f"checkpoint of step {step} ({needed} bytes) could not be written to {self.folder} "
            f"({free} bytes free): {error}. {self._intact()} Free some space and pass --resume."
        )

    def _intact(self) -> str:
        latest = self.latest()
        return "No earlier checkpoint exists." if latest is None else f"Step {latest} is intact."


def _discard(path: Path) -> None:
    """Delete a checkpoint; killed half way, it no longer has the name of a complete one."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.old.tmp")))


def weights_of(folder: Path) -> Callable[[Param], Tensor]:
    """What reads one parameter or router bias after another of a `step-N` folder, whole, in float32.

    Neither moments nor anything else is read.

    Raises:
        CheckpointError: a file is missing, truncated or changed, here; a parameter is not there, when asked.
    """
    entries = _entries(folder)
    manifest.verify(folder, sorted(entries), entries)
    reader = snapshot.Reader(folder)

    def read(param: Param) -> Tensor:
        tensor = torch.empty(param.shape, dtype=torch.float32)
        reader.read({f"model.{param.name}": Held.whole(tensor)})
        return tensor

    return read


def _entries(folder: Path) -> Entries:
    """The manifest of a checkpoint in the present format."""
    entries = manifest.read(folder)
    if _OLD in entries:
        message = (
            f"{folder} holds {_OLD}: it was written before checkpoints were sharded, and only the version "
            "that wrote it can resume it. Finish that run there and use its export (RUN/hf), or start anew."
        )
        raise CheckpointError(message)
    missing = [name for name in (snapshot.METADATA, STATE) if name not in entries]
    if missing:
        message = (
            f"{folder / manifest.MANIFEST} does not list {' and '.join(missing)}: no checkpoint of a run."
        )
        raise CheckpointError(message)
    return entries
