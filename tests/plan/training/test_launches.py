"""What the planner takes the host to call for a block is what the trainer dispatches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benthic.parallel.parts import parts_of
from benthic.plan.cost import machine as machines
from benthic.plan.training import launches
from benthic.plan.training.candidate import Candidate, Rows
from benthic.plan.training.stage import Kind, shape_of

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import launches as counts
from provenance import RESULTS
from stdlib_corpus import make_data

ROWS = json.loads((RESULTS / "launches.json").read_text())["rows"]
SLOTS = {"F": ("forward",), "I": ("input",), "W": ("weight",), "B": ("input", "weight")}


def foretold(run: counts.Run, row) -> tuple[int, int]:
    rows = Rows(seq_len=32, local_batch_size=2)
    one = Candidate(model=run.model, layout=run.layout, train=rows, rows=16, recompute=run.recompute)
    shape = shape_of(one, machines.get("h200"))
    part = parts_of(run.model, run.layout, run.layout.pp_degree)[row["stage"]]
    kind = Kind.of(run.model, part)
    found = launches.Calls()
    zero = launches.of_zero(run.layout.zero_stage if run.layout.dp_degree > 1 else 1)
    for moe, count in ((True, kind.mixed), (False, kind.dense)):
        for _ in range(count):
            found = found.plus(launches.of_block(shape, moe=moe)).plus(zero)
    for name, count in (("head", kind.heads), ("projection", kind.projections)):
        for _ in range(count):
            found = found.plus(launches.of_end(name))
    fields = SLOTS[row["kind"]]
    collectives = sum(getattr(found, f"{name}_collectives", 0) for name in fields)
    return sum(getattr(found, name) for name in fields), collectives


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['run']} {row['stage']}{row['kind']}")
def test_calls_of_blocks_add_up_to_what_was_counted(row):
    operators, collectives = foretold(counts.RUNS[row["run"]], row)
    assert operators == pytest.approx(row["operators"], rel=0.03)
    assert collectives == pytest.approx(row["collectives"], abs=2)


def test_a_step_of_the_trainer_dispatches_as_much_as_was_counted(tmp_path):
    data = make_data(tmp_path, 512, parts=("json", "email"))
    found = {row["kind"]: row["operators"] for row in counts.counted(counts.RUNS["1 rank"], data, 0)}
    for row in ROWS:
        if row["run"] == "1 rank":
            assert found[row["kind"]] == pytest.approx(row["operators"], rel=0.05)
