"""Masters that are kept as bfloat16 weights and 16 more bits: every bit of those that are kept whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from layouts import train, trainer_of, with_layout
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.kernels import ops
from benthic.parallel.buckets import Piece
from benthic.parallel.mesh import Mesh
from benthic.parallel.peers import Peers
from benthic.spec.layout import Layout
from benthic.train.checkpoint import FolderStore

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

STEPS = 3
LAYOUTS = (
    Layout(dp_degree=2, ep_degree=2, zero_stage=1),
    Layout(dp_degree=2, zero_stage=3),
    Layout(pp_degree=2, schedule="dualpipe", zero_stage=2),
)


def config(layout: Layout, *, split: bool, name: str = "adamw", weights: str = "bfloat16") -> RunConfig:
    small = small_run(layers=2, rows=1, microbatches=4)
    precision = dataclasses.replace(small.precision, weights=weights, matmul=weights)
    optimizer = dataclasses.replace(
        small.optimizer, name=name, moment_dtype="bfloat16", store_param_remainders=split
    )
    return with_layout(dataclasses.replace(small, precision=precision, optimizer=optimizer), layout)


def away_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round whole masters as split ones are: else one that lies between two weights changes gradients."""
    adamw, write = ops.adamw, Piece.write

    def rounded(master: Tensor, running: Tensor | None) -> None:
        if running is not None and running.dtype == torch.bfloat16:
            ops.split_master(master, running, torch.empty_like(running, dtype=torch.int16))

    def update(master: Tensor, *rest, running: Tensor | None = None) -> None:
        adamw(master, *rest)
        rounded(master, running)

    def set_master(piece: Piece, master: Tensor) -> None:
        write(piece, master)
        rounded(piece.master, piece.running)

    monkeypatch.setattr(ops, "adamw", update)
    monkeypatch.setattr(Piece, "write", set_master)


def masters(trainer: Trainer) -> dict[str, Tensor]:
    return {piece.name: piece.master.clone() for bucket in trainer.buckets for piece in bucket.pieces()}


def same(mine: Trainer, theirs: Trainer) -> None:
    others = masters(theirs)
    for name, master in masters(mine).items():
        assert torch.equal(master.view(torch.int32), others[name].view(torch.int32)), name


def compare(rank: int, data: str, folder: str, layout: Layout, *, name: str, weights: str) -> None:
    """Train both ways; then let each go on from the other's checkpoint."""
    trainers, found = {}, {}
    stores = {
        split: FolderStore(Path(folder) / str(split), peers=Peers.everyone()) for split in (True, False)
    }
    for split in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not split:
                away_from_zero(patch)
            own = config(layout, split=split, name=name, weights=weights)
            trainers[split] = trainer_of(own, Path(data), Mesh.of(layout, rank))
            found[split] = train(trainers[split], STEPS)
        stores[split].save(trainers[split].saved(), wait=split)
    assert found[True].losses == found[False].losses, layout
    assert found[True].norms == found[False].norms, layout
    kept = {piece.kept.dtype for bucket in trainers[True].buckets for piece in bucket.pieces()}
    assert kept == ({torch.int16} if weights == "bfloat16" else {torch.int16, torch.float32})
    same(trainers[True], trainers[False])
    for split in (True, False):
        own = config(layout, split=split, name=name, weights=weights)
        again = trainer_of(own, Path(data), Mesh.of(layout, rank))
        again.restore(stores[not split].open(STEPS))
        same(again, trainers[True])
        for bucket, expected in zip(again.buckets, trainers[True].buckets, strict=True):
            if split:
                assert torch.equal(bucket._shard, expected._shard)
                assert torch.equal(bucket.kept, expected.kept)


def compare_layouts(rank: int, data: str, folder: str) -> None:
    for number, layout in enumerate(LAYOUTS):
        compare(rank, data, f"{folder}/{number}", layout, name="adamw", weights="bfloat16")


@pytest.mark.dist
def test_ranks_keep_in_halves_every_bit_of_whole_masters(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    spawn(compare_layouts, 2, str(data), str(tmp_path / "saved"), seconds=240)


@pytest.mark.parametrize(("name", "weights"), [("adamw", "bfloat16"), ("muon", "bfloat16"), ("adamw", "fp8")])
def test_one_process_keeps_in_halves_every_bit_of_whole_masters(
    tmp_path: Path, name: str, weights: str
) -> None:
    data = write_documents(tmp_path / "data")
    compare(0, str(data), str(tmp_path / "saved"), Layout(), name=name, weights=weights)
