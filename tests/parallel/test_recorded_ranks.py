"""Steps over two ranks that are recorded and run again, against the same steps launched."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import trainer_of, with_layout
from replayed import Again
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train.recording import Direct, Recorded

LAYOUTS = (
    Layout(dp_degree=2),
    Layout(dp_degree=2, zero_stage=3),
    Layout(pp_degree=2, schedule="zb-h1"),
    Layout(tp_degree=2),
)


def steps(rank: int, data: Path, layout: Layout, *, recorded: bool) -> list[tuple[float, float]]:
    trainer = trainer_of(with_layout(small_run(steps=8), layout), data, Mesh.of(layout, rank))
    if recorded:
        direct = Direct(trainer.executor, trainer.buckets, trainer.mesh)
        trainer._computation = Recorded(direct, record=Again)
    found = [(each.loss, each.grad_norm) for each in (trainer.step() for _ in range(8))]
    if recorded:
        assert trainer._computation._tape.graph.runs >= 3  # documents grew more, and it was recorded anew
    return found


def on_two_ranks(rank: int, data: str) -> None:
    for layout in LAYOUTS:
        one, other = (steps(rank, Path(data), layout, recorded=way) for way in (True, False))
        for mine, theirs in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4), layout


@pytest.mark.dist
def test_recorded_steps_over_two_ranks_find_what_launched_ones_do(tmp_path: Path) -> None:
    spawn(on_two_ranks, 2, str(write_documents(tmp_path / "data")))
