from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from benthic.errors import CheckpointError, NotACheckpointError
from benthic.train import checkpoint
from benthic.train.checkpoint import FolderStore, Saved

if TYPE_CHECKING:
    from pathlib import Path


def saved(step: int, size: int = 64) -> Saved:
    model = {"w": torch.full((size,), float(step)), "b": torch.arange(3, dtype=torch.bfloat16)}
    random = {"cpu": torch.get_rng_state()}
    return Saved(step, {"model": model, "random": random}, {"step": step, "position": 10 * step})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(7))
    found = store.load(7)
    assert (found.step, found.state) == (7, {"step": 7, "position": 70})
    assert torch.equal(found.tensors["model"]["w"], torch.full((64,), 7.0))
    assert found.tensors["model"]["b"].dtype == torch.bfloat16
    assert torch.equal(found.tensors["random"]["cpu"], torch.get_rng_state())


def test_latest_is_the_highest_step_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep_latest_k=2)
    assert store.latest() is None
    for step in (5, 20, 100):
        store.save(saved(step))
    assert (store.steps(), store.latest()) == ([20, 100], 100)
    store.forget_after(20)
    assert store.steps() == [20]


def test_zero_keeps_every_checkpoint(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep_latest_k=0)
    for step in range(1, 5):
        store.save(saved(step))
    assert store.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), r"has \d+ bytes, but manifest.json counts"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\x01"), r"has SHA-256 .* but manifest.json says"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_damaged_checkpoint_is_refused_by_file(tmp_path: Path, damage: object, words: str) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    damage(store.path(3) / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=rf"model.safetensors {words}"):
        store.load(3)


def test_missing_checkpoint_lists_those_that_exist(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    with pytest.raises(NotACheckpointError, match=r"complete steps in .*: 3"):
        store.load(4)


def test_checkpoint_without_manifest_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    (store.path(3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        store.load(3)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, but .* has 1000 free. Step 3 is intact"):
        store.save(saved(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from benthic.errors import CheckpointError
from benthic.train.checkpoint import FolderStore, Saved
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    FolderStore(Path(sys.argv[1])).save(Saved(9, {"model": {"w": torch.zeros(1 << 20)}}, {}))
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def test_write_that_fails_half_way_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """The operating system itself refuses to write more than 1 MiB of a 4 MiB checkpoint."""
    store = FolderStore(tmp_path)
    store.save(saved(3))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "checkpoint of step 9 (4194304 bytes) could not be written" in done.stdout
    assert "Step 3 is intact" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]
    assert store.load(3).step == 3


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from benthic.train import checkpoint
from benthic.train.checkpoint import FolderStore, Saved
calls = 0
flush = checkpoint._flush
def dying(path):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
checkpoint._flush = dying
FolderStore(Path(sys.argv[1])).save(Saved(9, {"model": {"w": torch.zeros(8)}}, {"step": 9}))
"""


@pytest.mark.parametrize("moment", [1, 3, 4, 5])
def test_kill_at_any_moment_of_a_save_leaves_the_last_good_checkpoint(tmp_path: Path, moment: int) -> None:
    """Moments 1 to 4 flush files and folder before the rename; 5 comes after it."""
    store = FolderStore(tmp_path)
    store.save(saved(3))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], check=False)
    assert done.returncode == -signal.SIGKILL
    expected = 9 if moment == 5 else 3
    assert store.latest() == expected
    assert store.load(expected).step == expected
    assert (tmp_path / "step-9.tmp").exists() == (moment < 5)
    store.save(saved(12))
    assert not list(tmp_path.glob("*.tmp"))


def test_errors_of_the_disk_are_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*No earlier checkpoint exists"):
        FolderStore(tmp_path).save(saved(1))
    assert list(tmp_path.iterdir()) == []
