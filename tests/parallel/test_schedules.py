"""Every schedule, and mixtures of all kinds of parallelism, against one process: losses, gradients, counts.

Run here for a few steps; `benchmarks/parity.py` runs the same layouts for twenty and writes what it found.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from layouts import alone, run_layouts, save, train
from parity_layouts import MIXED, SCHEDULES, SPLIT, config_for
from small_runs import write_documents
from spawn import spawn

from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.config import RunConfig

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 2
TOLERANCE = (1e-6, 1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_has_the_losses_and_gradients_of_one_process(ranks: int, tmp_path: Path) -> None:
    """Schedules that cut the model into two stages a rank need twice the layers of the others."""
    groups = defaultdict(list)
    for name in SCHEDULES:
        groups[name in SPLIT].append(Layout(pp_degree=ranks, schedule=name))
    for split, layouts in groups.items():
        compare(layouts, tmp_path / f"split-{split}", ranks=ranks)


def test_dualpipe_has_the_losses_and_gradients_of_one_process_on_eight_ranks(tmp_path: Path) -> None:
    compare([Layout(pp_degree=8, schedule="dualpipe")], tmp_path, ranks=8)


@pytest.mark.parametrize("ranks", sorted({layout.ranks for layout in MIXED}))
def test_mixed_layouts_have_the_losses_and_gradients_of_one_process(ranks: int, tmp_path: Path) -> None:
    """Layouts that need the same rows and layers run on the same ones."""
    groups = defaultdict(list)
    for layout in MIXED:
        if layout.ranks == ranks:
            groups[layout.pp_degree, layout.pp_degree * layout.dp_degree].append(layout)
    for number, layouts in enumerate(groups.values()):
        compare(layouts, tmp_path / str(number), ranks=ranks)


def compare(layouts: list[Layout], folder: Path, *, ranks: int) -> None:
    data = write_documents(folder / "data")
    config = rows_enough(layouts, config_for(layouts, steps=STEPS))
    serial = save(train(alone(config, data), STEPS, keep=(1, STEPS)), folder / "serial.pt")
    spawn(run_layouts, ranks, config, layouts, str(data), str(serial), TOLERANCE, seconds=240)


def rows_enough(layouts: list[Layout], config: RunConfig) -> RunConfig:
    """A step of no more rows than the most demanding layout needs: two a pipeline rank on each data rank."""
    rows = max(2 * layout.pp_degree * layout.dp_degree for layout in layouts)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=rows))
