"""Pieces that are computed again, and activations on the host, where a layer is spread over ranks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from layouts import alone, run_layouts, save, train
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

PIPELINES = [
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, schedule="dualpipe"),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, schedule="zb-h1"),
]
OTHERS = [Layout(dp_degree=4, ep_degree=4, zero_stage=3), Layout(tp_degree=2, cp_degree=2)]


@pytest.mark.dist
def test_recomputed_pieces_and_offloading_give_serial_gradients_on_every_layout(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "data")
    for name, layouts, plain in (
        ("pipelines", PIPELINES, small_run(layers=2, rows=1, microbatches=8)),
        ("others", OTHERS, small_run(layers=2, rows=2, microbatches=4)),
    ):
        serial = save(train(alone(plain, data), 2, keep=(1, 2)), tmp_path / f"{name}.pt")
        pieces = dataclasses.replace(
            plain, recompute=("deepseek-v3", "expert_inputs"), offload=("attention", "experts")
        )
        spawn(run_layouts, 4, pieces, layouts, str(data), str(serial), (1e-6, 1e-5), seconds=240)
