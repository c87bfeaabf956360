from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from spawn import RankError, spawn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: TID251 (as a user would)

from benthic.cli.settings import apply
from benthic.errors import CheckpointError, NotACheckpointError, TensorMismatchError
from benthic.parallel import snapshot
from benthic.parallel.held import Held
from benthic.spec.parameters import parameters
from benthic.train import checkpoint
from benthic.train.checkpoint import FolderStore, Saved, weights_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer


def tensors(step: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((4, 16), float(step)),
        "first.w": torch.arange(3, dtype=torch.bfloat16),
        "random.0.cpu": torch.get_rng_state() if step else torch.zeros_like(torch.get_rng_state()),
    }


def saved(step: int) -> Saved:
    held = {name: Held.whole(tensor) for name, tensor in tensors(step).items()}
    return Saved(step, held, {"step": step, "position": 10 * step})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(7))
    stored, found = store.open(7), tensors()
    stored.fill({name: Held.whole(tensor) for name, tensor in found.items()})
    assert (stored.step, stored.state) == (7, {"step": 7, "position": 70})
    for name, tensor in tensors(7).items():
        assert torch.equal(found[name], tensor), name


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    lists = []
    for name in ("one", "two"):
        store = FolderStore(tmp_path / name)
        store.save(saved(3))
        lists.append((store.path(3) / "manifest.json").read_text())
    assert lists[0] == lists[1]
    assert sorted(json.loads(lists[0])) == [".metadata", "__0_0.distcp", "state.json"]


def test_latest_is_the_highest_step_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep_latest_k=2)
    assert store.latest() is None
    for step in (5, 20, 100):
        store.save(saved(step))
    assert (store.steps(), store.latest()) == ([20, 100], 100)
    store.forget_after(20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-20"]


def test_zero_keeps_every_checkpoint(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep_latest_k=0)
    for step in range(1, 5):
        store.save(saved(step))
    assert store.steps() == [1, 2, 3, 4]


def test_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    store.save(Saved(3, saved(4).tensors, {"again": True}))
    assert store.open(3).state == {"again": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), r"has \d+ bytes, but manifest.json counts"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\x01"), r"has SHA-256 .* but manifest.json says"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_damaged_checkpoint_is_refused_by_file(tmp_path: Path, name: str, damage: object, words: str) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    damage(store.path(3) / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=rf"{name} {words}"):
        store.open(3)


def test_missing_checkpoint_lists_those_that_exist(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    with pytest.raises(NotACheckpointError, match=r"complete steps in .*: 3"):
        store.open(4)


def test_checkpoint_without_manifest_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    (store.path(3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        store.open(3)


def test_checkpoint_of_the_format_before_this_one_is_told_apart(tmp_path: Path) -> None:
    old = tmp_path / "step-3"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"weights")
    (old / "manifest.json").write_text(json.dumps({"model.safetensors": {"bytes": 7, "sha256": ""}}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: it was written before .* sharded"):
        FolderStore(tmp_path).open(3)


def test_tensors_that_differ_are_all_named_and_none_is_filled(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save(saved(3))
    good = torch.zeros(4, 16)
    wanted = {"model.w": good, "first.w": torch.zeros(3), "model.v": torch.zeros(2)}
    with pytest.raises(TensorMismatchError) as caught:
        store.open(3).fill({name: Held.whole(tensor) for name, tensor in wanted.items()})
    assert "first.w is torch.bfloat16 there, torch.float32 here; model.v is missing" in str(caught.value)
    with pytest.raises(TensorMismatchError, match=r"model.w is \[4, 16\] there, \[16, 4\] here"):
        store.open(3).fill({"model.w": Held.whole(torch.zeros(16, 4))})
    assert not good.any()


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


def full_disk(rank: int, folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    store = FolderStore(Path(folder))
    for wait in (True, False):
        with pytest.raises(CheckpointError) as told:
            save_and_wait(store, Saved(9, {"w": Held.whole(torch.zeros(1 << 20))}, {}), wait=wait)
        assert "checkpoint of step 9 (4194304 bytes) could not be written" in str(told.value)
        assert "Step 3 is intact" in str(told.value)


def save_and_wait(store: FolderStore, saved: Saved, *, wait: bool) -> None:
    store.save(saved, wait=wait)
    store.wait()


def test_write_that_fails_half_way_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """The operating system itself refuses to write more than 1 MiB of a 4 MiB checkpoint."""
    store = FolderStore(tmp_path)
    store.save(saved(3))
    spawn(full_disk, 1, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]
    assert store.open(3).step == 3


def save_and_die(rank: int, folder: str, moment: int) -> None:
    flush, calls = os.fsync, 0

    def dying(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    os.fsync = dying
    FolderStore(Path(folder)).save(Saved(9, {"w": Held.whole(torch.zeros(8))}, {"step": 9}))


def test_kill_at_any_moment_of_a_save_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Flushed in turn: tensors, metadata, state, manifest, folder; the sixth comes after the rename."""
    stores = {moment: FolderStore(tmp_path / str(moment)) for moment in range(1, 7)}
    for store in stores.values():
        store.save(saved(3))
    for moment, store in stores.items():
        with pytest.raises(RankError, match="SIGKILL"):
            spawn(save_and_die, 1, str(store.folder), moment)
        expected = 9 if moment == 6 else 3
        assert store.latest() == expected
        assert store.open(expected).step == expected
        assert (store.folder / "step-9.tmp").exists() == (moment < 6)
        store.save(saved(12))
        assert not list(store.folder.glob("*.tmp"))


def test_thread_writes_what_was_saved_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write is held back until the tensor has changed; the next save waits for it."""
    store, changed = FolderStore(tmp_path), threading.Event()
    write = snapshot.write

    def late(*arguments: object) -> None:
        assert changed.wait(60)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "write", late)
    weights = torch.ones(5)
    for step in (1, 2):
        changed.clear()
        store.save(Saved(step, {"w": Held.whole(weights)}, {}), wait=False)
        assert store.latest() == (None if step == 1 else 1)
        weights.add_(1)
        changed.set()
        store.wait()
    for step in (1, 2):
        store.open(step).fill({"w": Held.whole(weights)})
        assert torch.equal(weights, torch.full((5,), float(step)))


def test_failure_of_the_thread_is_raised_once_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage(1, 1, 0))
        store.save(saved(1), wait=False)
        with pytest.raises(CheckpointError, match="has 0 free"):
            store.save(saved(2))
    store.save(saved(2))
    assert store.steps() == [2]


def test_model_is_read_whole_without_the_optimizer_here_and_by_torchs_tool(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig, tmp_path: Path
) -> None:
    run, store = trainer(apply(nano, ["precision.weights=bfloat16"])), FolderStore(tmp_path)
    run.step()
    store.save(run.saved())
    read = weights_of(store.path(1))
    found = {param.name: read(param) for param in parameters(run.config.model)}
    own = run.model.state_dict()
    assert set(found) == set(own)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in own.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    dcp_to_torch_save(store.path(1), tmp_path / "whole.pt")
    by_torch = torch.load(tmp_path / "whole.pt")
    assert all(torch.equal(by_torch[f"model.{name}"], tensor) for name, tensor in found.items())
    (store.path(1) / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has 0 bytes"):
        weights_of(store.path(1))
