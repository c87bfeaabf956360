"""A checkpoint of any layout goes on in any other with the numbers of one process; ranks fail together."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from layouts import alone, train, trainer_of, with_layout
from small_runs import small_run, write_documents
from spawn import RankError, spawn

from benthic.errors import CheckpointError
from benthic.parallel import snapshot
from benthic.parallel.boxes import Box
from benthic.parallel.held import Held
from benthic.parallel.mesh import Mesh
from benthic.parallel.peers import Peers
from benthic.spec.layout import Layout
from benthic.train.checkpoint import FolderStore, Saved

if TYPE_CHECKING:
    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

pytestmark = pytest.mark.dist

PP2_EP2 = Layout(pp_degree=2, dp_degree=2, ep_degree=2)
PP4_EP2 = Layout(pp_degree=4, dp_degree=2, ep_degree=2)
EP4_ZERO3 = Layout(dp_degree=4, ep_degree=4, zero_stage=3)
DUALPIPE = Layout(pp_degree=2, dp_degree=2, schedule="dualpipe", zero_stage=2)
TP2_CP2 = Layout(tp_degree=2, cp_degree=2, ep_degree=2)
DP3_ZERO2 = Layout(dp_degree=3, zero_stage=2)
ONE = Layout()


def config(rows: int = 1) -> RunConfig:
    """Four layers, so that four pipeline ranks have one each, and 12 rows for three ranks or four.

    AdamW's eps is above the rounding of gradients, else elements that are all rounding move by a whole step.
    """
    small = small_run(layers=4, rows=rows, microbatches=12 // rows)
    return dataclasses.replace(
        small, optimizer=dataclasses.replace(small.optimizer, moment_dtype="bfloat16", eps=1e-5)
    )


@dataclasses.dataclass(frozen=True)
class Leg:
    """Go on from step `start` with `layout` and save after one step; `twice`: and do the next step twice.

    A microbatch has `rows` of the step's 12 rows: as many as the layout bears, since small steps cost as
    much as large ones.
    """

    layout: Layout
    start: int
    rows: int
    twice: bool = False


def whole(store: FolderStore, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but the random states."""
    reader, tensors = store.open(step).reader, {}
    for name, found in reader.metadata.state_dict_metadata.items():
        if not name.startswith("random."):
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
    reader.read({name: Held.whole(tensor) for name, tensor in tensors.items()})
    return tensors


def go(rank: int, folder: str, data: str, legs: list[Leg], expected: list[tuple[float, ...]]) -> None:
    """On every rank of the legs' layouts."""
    peers = Peers.everyone()
    store = FolderStore(Path(folder), peers=peers)
    for leg in legs:
        copies = FolderStore(store.folder / f"copy-{leg.start}", peers=peers)
        mesh, own = Mesh.of(leg.layout, rank), with_layout(config(leg.rows), leg.layout)
        trainer = trainer_of(own, Path(data), mesh)
        trainer.restore(store.open(leg.start))
        copies.save(trainer.saved())
        wanted = expected[leg.start]  # what MTP and balance add is compared on the scale of the loss
        assert train(trainer, 1).losses[0] == pytest.approx(wanted, rel=0, abs=1e-6 * wanted[0]), leg
        store.save(trainer.saved(), wait=False)
        if leg.twice:
            resumed_step_is_the_same(trainer, trainer_of(own, Path(data), mesh), store)
        store.wait()


def resumed_step_is_the_same(trainer: Trainer, again: Trainer, store: FolderStore) -> None:
    """Bit for bit, because the layout is the same; the thread still writes when the step begins."""
    step = trainer.steps_done
    straight = train(trainer, 1)
    again.restore(store.open(step))
    resumed = train(again, 1)
    assert (resumed.losses, resumed.norms) == (straight.losses, straight.norms)


@pytest.mark.slow
def test_a_run_goes_through_seven_layouts_with_the_losses_of_one_process(tmp_path: Path) -> None:
    """1 -> PP2 x EP2 -> PP4 x EP2 -> EP4 x ZeRO-3 -> DualPipe, whose stages live twice -> 1 -> 3 ranks, whose
    shards are uneven -> TP2 x CP2 -> 1.

    Every leg first saves what it restored: all tensors of both checkpoints are equal to the last bit.
    """
    spawns = [
        [Leg(PP2_EP2, 0, 3)],
        [Leg(PP4_EP2, 1, 1)],
        [Leg(EP4_ZERO3, 2, 3, twice=True), Leg(DUALPIPE, 3, 1, twice=True)],
        [Leg(ONE, 4, 12)],
        [Leg(DP3_ZERO2, 5, 2)],
        [Leg(TP2_CP2, 6, 6)],
        [Leg(ONE, 7, 4)],
    ]
    data = write_documents(tmp_path / "data")
    store, serial = FolderStore(tmp_path / "run"), alone(config(), data)
    store.save(serial.saved())
    expected = train(serial, 8).losses
    for legs in spawns:
        arguments = (str(store.folder), str(data), legs, expected)
        if legs[0].layout.ranks == 1:
            go(0, *arguments)
        else:
            spawn(go, legs[0].layout.ranks, *arguments, seconds=120)
    for start in range(8):
        one, two = whole(store, start), whole(FolderStore(store.folder / f"copy-{start}"), start)
        assert set(one) == set(two)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), start


def toy(rank: int, size: int = 8) -> Saved:
    """One tensor of two rows, of which each rank owns one, filled with its rank."""
    flat = torch.full((size,), float(rank))
    return Saved(rank, {"w": Held((2, size), (Box((rank, 0), (1, size)),), flat)}, {})


def at(step: int, saved: Saved) -> Saved:
    return dataclasses.replace(saved, step=step, state={"step": step})


def fails_together(rank: int, folder: str) -> None:
    store = FolderStore(Path(folder), peers=Peers.everyone())
    store.save(at(1, toy(rank)))
    disk_of_rank_1_is_full(rank, store)
    row_owned_by_no_rank_is_refused(rank, store)
    damage_is_named_on_every_rank(rank, store)


def disk_of_rank_1_is_full(rank: int, store: FolderStore) -> None:
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    words = r"rank 1 of 2: \[Errno 27\] File too large. Step 1 is intact"
    with pytest.raises(CheckpointError, match=words):
        store.save(at(2, toy(rank, 2**16)))
    store.save(at(2, toy(rank, 2**16)), wait=False)
    with pytest.raises(CheckpointError, match=words):
        store.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.peers.each(lambda: None)
    assert [path.name for path in store.folder.iterdir()] == ["step-1"]


def row_owned_by_no_rank_is_refused(rank: int, store: FolderStore) -> None:
    missing = {"w": dataclasses.replace(toy(rank).tensors["w"], owned=rank == 0)}
    with pytest.raises(CheckpointError, match="ValueError: Failed to validate global plan"):
        store.save(at(2, Saved(0, missing, {})))
    assert store.steps() == [1]


def damage_is_named_on_every_rank(rank: int, store: FolderStore) -> None:
    stored, back = store.open(1), torch.empty(16)
    stored.fill({"w": Held.whole(back.view(2, 8))})
    assert back.tolist() == [0.0] * 8 + [1.0] * 8
    store.peers.first(lambda: os.truncate(store.path(1) / "__1_0.distcp", 100))
    with pytest.raises(CheckpointError, match=r"rank \d of 2: .*__1_0.distcp has 100 bytes, but manifest"):
        store.open(1)


def test_full_disk_and_damage_are_told_on_every_rank(tmp_path: Path) -> None:
    spawn(fails_together, 2, str(tmp_path))


def rank_1_is_killed(rank: int, folder: str) -> None:
    store = FolderStore(Path(folder), peers=Peers.everyone())
    store.save(at(1, toy(rank)))

    def dying(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        snapshot._Writer.write_data = dying  # type: ignore[assignment,method-assign]
    with pytest.raises(CheckpointError, match="rank 0 of 2 lost contact with the others"):
        store.save(at(2, toy(rank)))


def test_killed_rank_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        spawn(rank_1_is_killed, 2, str(tmp_path))
    store, back = FolderStore(tmp_path), torch.empty(2, 8)
    assert store.latest() == 1
    store.open(1).fill({"w": Held.whole(back)})
    assert back.sum() == 8
    (tmp_path / "step-2.tmp").mkdir(exist_ok=True)
    store.save(Saved(3, {"w": Held.whole(back)}, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]
