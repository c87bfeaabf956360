"""torch's own pipeline runtime, given our tables, computes what one process computes."""

from __future__ import annotations

import json
import multiprocessing
from typing import TYPE_CHECKING

import pytest

from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.table_csv import torch_csv, write_table

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch.distributed.pipelining.schedules")
from torch_worker import run_tables

NAMES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev"]


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 6), (4, 8)])
def test_torch_runs_our_tables_to_the_serial_loss_and_gradients(ranks, microbatches, tmp_path):
    for name in NAMES:
        table = build(name, ranks, microbatches)
        (tmp_path / f"{name}.table").write_text(write_table(table))
        (tmp_path / f"{name}.csv").write_text(torch_csv(table))
    assert run(ranks, tmp_path) == [0] * ranks
    far = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    assert all(of_rank.keys() == set(NAMES) for of_rank in far)
    assert max(difference for of_rank in far for difference in of_rank.values()) < 1e-12


def run(ranks: int, folder: Path) -> list[int | None]:
    """Exit codes of one process a rank; all fork from a server that imports torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.pipelining.schedules"])
    workers = [context.Process(target=run_tables, args=(rank, ranks, folder)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers]
