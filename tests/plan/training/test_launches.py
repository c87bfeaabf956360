"""What the planner takes the host to call for a stage is what the trainer calls with the choices of a GPU."""

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
from allocations import write_documents
from provenance import RESULTS

ROWS = json.loads((RESULTS / "launches.json").read_text())["rows"]
SLOTS = {"F": ("forward",), "I": ("input",), "W": ("weight",), "B": ("input", "weight")}


def foretold(run: counts.Run, row) -> tuple[int, int]:
    one = Candidate(
        model=run.model,
        layout=run.layout,
        train=Rows(),
        rows=run.rows,
        recompute=run.recompute,
        precision=run.precision,
    )
    shape = shape_of(one, machines.get("h200"))
    part = parts_of(run.model, run.layout, one.table().stages)[row["stage"]]
    kind = Kind.of(run.model, part)
    found = launches.of_stage(0)
    zero = launches.of_zero(run.layout.zero_stage if run.layout.dp_degree > 1 else 1)
    for moe, count in ((True, kind.mixed), (False, kind.dense)):
        for _ in range(count):
            found = found.plus(launches.of_block(shape, moe=moe)).plus(zero)
    ends = {"embedding": kind.embeddings, "head": kind.heads, "projection": kind.projections}
    for name, count in ends.items():
        for _ in range(count):
            found = found.plus(launches.of_end(name))
    fields = SLOTS[row["kind"]]
    collectives = sum(getattr(found, f"{name}_collectives", 0) for name in fields)
    return sum(getattr(found, name) for name in fields), collectives


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['run']} {row['stage']}{row['kind']}")
def test_calls_of_blocks_add_up_to_what_was_counted(row):
    calls, collectives = foretold(counts.RUNS[row["run"]], row)
    again = launches.CUT.input * (row["phases"] - 1) if row["kind"] in {"I", "B"} else 0
    assert calls == pytest.approx(row["calls"] + again, rel=0.03), (
        "runs of autograd, which torch does not count"
    )
    assert collectives == pytest.approx(row["collectives"], abs=2)


def test_a_step_of_the_trainer_calls_as_much_as_was_counted(tmp_path):
    data = write_documents(tmp_path / "data")
    for name in ("1 rank", "dualpipev-ep2"):
        found = {
            (row["kind"], row["stage"]): (row["calls"], row["phases"])
            for row in counts.counted(counts.RUNS[name], data)
        }
        for row in ROWS:
            if row["run"] == name:
                calls, phases = found[row["kind"], row["stage"]]
                assert calls == pytest.approx(row["calls"], rel=0.02)
                assert phases == row["phases"]
