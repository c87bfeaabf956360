"""FP8 training over data ranks: float32 masters in shards, whole only while FP8 copies of them are made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from layouts import train, trainer_of, with_layout
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.errors import ScheduleError
from benthic.model.fp8_products import MixedLinear
from benthic.parallel.buckets import Bucket
from benthic.parallel.footprint import footprints
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train.rows import rows_at, table_of

if TYPE_CHECKING:
    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

STEPS = 2
LAYOUTS = (
    Layout(dp_degree=4, ep_degree=2, zero_stage=1),
    Layout(dp_degree=4, zero_stage=2),
    Layout(dp_degree=4, ep_degree=4, zero_stage=3),
    Layout(pp_degree=2, dp_degree=2, schedule="dualpipe", zero_stage=1),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, schedule="zb-h1", zero_stage=1),
)


def config(layout: Layout) -> RunConfig:
    microbatches = 8 if layout.schedule == "dualpipe" else 4
    small = small_run(layers=2, rows=8 // microbatches, microbatches=microbatches)
    precision = dataclasses.replace(small.precision, weights="fp8", matmul="fp8")
    return with_layout(dataclasses.replace(small, precision=precision), layout)


def whole_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep masters whole on every rank, as other float32 weights under ZeRO-1 and 2 are."""
    made = Bucket.__init__

    def plain(self, *args, copied=False, **options):
        made(self, *args, **options)

    monkeypatch.setattr(Bucket, "__init__", plain)


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {piece.name: piece.master.clone() for bucket in trainer.buckets for piece in bucket.pieces()}


def check_what_is_kept(trainer: Trainer, own: RunConfig) -> None:
    """A rank keeps its shard of masters and two bytes a weight, as the dry run says."""
    linear = trainer.executor.linear
    assert isinstance(linear, MixedLinear)
    copies = sum(t.values.nbytes for held in linear.running._held.values() for t in (held.tiles, held.turned))
    weights = masters_ = 0
    for bucket in trainer.buckets:
        weights += bucket._flat.untyped_storage().nbytes()
        masters_ += bucket.kept.nbytes if bucket.gathered or bucket.kept is not bucket._shard else 0
        if bucket.zero_stage == 3 and not bucket._copied:
            weights += bucket._shard.nbytes
    said = footprints(own, table_of(own, rows_at(own, 0)))[trainer.mesh.place.pp]
    if said.rank == trainer.mesh.rank and own.layout.zero_stage < 3:
        assert said.bytes["masters"] == masters_, own.layout
        assert said.bytes["weights"] == weights + copies, own.layout


def same_as_with_whole_masters(rank: int, data: str) -> None:
    for layout in LAYOUTS:
        found = []
        for sharded in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not sharded:
                    whole_masters(patch)
                trainer = trainer_of(config(layout), Path(data), Mesh.of(layout, rank))
                found.append((train(trainer, STEPS), masters(trainer)))
                if sharded:
                    check_what_is_kept(trainer, config(layout))
        (mine, weights), (theirs, others) = found
        assert mine.losses == theirs.losses, layout
        assert mine.norms == theirs.norms, layout
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items()), layout


@pytest.mark.dist
def test_sharded_masters_have_every_bit_of_whole_ones_and_the_size_that_the_dry_run_says(
    tmp_path: Path,
) -> None:
    spawn(same_as_with_whole_masters, 4, str(write_documents(tmp_path / "data")), seconds=240)


def copies_are_made_of_whole_weights_alone(rank: int, data: str) -> None:
    layout = Layout(dp_degree=2)
    trainer = trainer_of(config(layout), Path(data), Mesh.of(layout, rank))
    linear = trainer.executor.linear
    assert isinstance(linear, MixedLinear)
    weight = next(p for p in trainer.stages.named_parameters().values() if p in linear.narrow)
    with pytest.raises(ScheduleError, match="Acquire its bucket first"):
        linear.running.of(weight)
    bucket = next(b for b in trainer.buckets if any(p is weight for p in b.params.values()))
    bucket.acquire(copies=True)
    before = linear.running.of(weight).tiles.values.clone()
    bucket.release(copies=True)
    assert torch.equal(linear.running.of(weight).tiles.values, before)
    assert bucket._flat.untyped_storage().nbytes() == 0
    bucket.acquire()  # an export reads the weights themselves
    assert weight.abs().sum() > 0
    bucket.release()


@pytest.mark.dist
def test_a_copy_is_never_made_of_weights_in_shards(tmp_path: Path) -> None:
    spawn(copies_are_made_of_whole_weights_alone, 2, str(write_documents(tmp_path / "data")))
