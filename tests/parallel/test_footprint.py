"""What `benthic train --dry-run` says a rank keeps is what a rank keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from layouts import trainer_of, with_layout
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.parallel.footprint import footprints
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train.rows import rows_at, table_of

if TYPE_CHECKING:
    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

LAYOUTS = (
    Layout(pp_degree=2, dp_degree=2, ep_degree=2),
    Layout(dp_degree=4, ep_degree=2, zero_stage=3),
    Layout(pp_degree=2, dp_degree=2, schedule="dualpipe", zero_stage=2),
    Layout(dp_degree=2, tp_degree=2, ep_degree=4),
)


def config(layout: Layout, *, narrow: bool, muon: bool, split: bool) -> RunConfig:
    small = small_run(layers=3, rows=1, microbatches=8)
    precision = dataclasses.replace(small.precision, weights="bfloat16", matmul="bfloat16")
    name = "muon" if muon and layout.tp_degree == 1 else "adamw"
    optimizer = dataclasses.replace(
        small.optimizer, name=name, moment_dtype="bfloat16", store_param_remainders=split
    )
    return with_layout(
        dataclasses.replace(small, precision=precision if narrow else small.precision, optimizer=optimizer),
        layout,
    )


def kept(trainer: Trainer) -> dict[str, int]:
    """Bytes that the arrays of a trainer really have."""
    found = {"weights": 0, "masters": 0, "gradients": 0, "moments": 0}
    for bucket in trainer.buckets:
        weights = bucket._shard if bucket.zero_stage == 3 else bucket._flat
        found["weights"] += weights.nbytes
        found["masters"] += bucket.kept.nbytes if bucket.kept is not bucket._shard else 0
        found["gradients"] += bucket.prepare().nbytes if bucket.zero_stage == 1 else bucket._sum.nbytes
        for piece in bucket.pieces():
            found["moments"] += sum(m.nbytes for m in trainer.optimizer.moments(piece.name).values())
    return found


def compare(rank: int, data: str, layouts: tuple[Layout, ...]) -> None:
    for layout in layouts:
        for narrow, muon, split in ((True, False, False), (False, True, False), (True, True, True)):
            own = config(layout, narrow=narrow, muon=muon, split=split)
            trainer = trainer_of(own, Path(data), Mesh.of(layout, rank))
            said = footprints(own, table_of(own, rows_at(own, 0)))[trainer.mesh.place.pp]
            if said.rank != rank:
                continue
            held = sum(p.numel() for p in trainer.stages.named_parameters().values())
            assert said.parameters == held, layout
            assert {term: said.bytes[term] for term in kept(trainer)} == kept(trainer), layout


@pytest.mark.dist
def test_dry_run_counts_the_bytes_of_every_pipeline_rank_to_the_last(tmp_path: Path) -> None:
    spawn(compare, 4, str(write_documents(tmp_path / "data")), LAYOUTS)


def test_dry_run_counts_the_bytes_of_one_process_to_the_last(tmp_path: Path) -> None:
    compare(0, str(write_documents(tmp_path / "data")), (Layout(),))
