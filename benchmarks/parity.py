"""How far training on many ranks is from training on one: every schedule, every mixture, on gloo, in float32.

    python benchmarks/parity.py [--steps 20] [--ranks 2 4 8]

Each layout trains the same small model on the same rows as one process does. Compared on every rank: all
losses of every step, all gradients of the first and the last step, and bit for bit the tokens of every expert
and the routers' biases. Fails at the first layout beyond 1e-6 of a loss or 1e-5 of a gradient, relative;
writes the largest errors to benchmarks/results/parity.json. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from provenance import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests" / "parallel"))

from layouts import run_layouts, save, train, trainer_of
from parity_layouts import MIXED, SCHEDULES, config_for
from small_runs import write_documents
from spawn import spawn

from benthic.spec.layout import Layout

TOLERANCE = (1e-6, 1e-5)


def main() -> None:
    """Run all layouts, smallest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="pipeline ranks of schedules")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    pipelines = [Layout(pp_degree=ranks, schedule=name) for ranks in words.ranks for name in SCHEDULES]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_documents(Path(folder) / "data")
        for number, (ranks, found) in enumerate(together([*pipelines, *MIXED])):
            rows += compare(found, ranks, data, Path(folder) / str(number), words.steps)
    path = write_result("parity", rows, out=words.out, steps=words.steps, tolerance=TOLERANCE)
    print(f"{len(rows)} layouts; written to {path}")


def together(layouts: list[Layout]) -> list[tuple[int, list[Layout]]]:
    """Layouts that one model and one launch can serve: equal ranks and pipeline ranks."""

    def key(layout: Layout) -> tuple[int, int, int]:
        return layout.ranks, layout.pp_degree, layout.dp_degree

    return [(k[0], list(found)) for k, found in groupby(sorted(layouts, key=key), key)]


def compare(layouts: list[Layout], ranks: int, data: Path, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Train in one process, then on each layout; the largest errors over all ranks of each."""
    folder.mkdir()
    config = config_for(layouts, steps=steps)
    serial = save(train(trainer_of(config, data), steps, keep=(1, steps)), folder / "serial.pt")
    arguments = (config, layouts, str(data), str(serial), TOLERANCE, str(folder))
    spawn(run_layouts, ranks, *arguments, seconds=1200)
    lines = [[json.loads(line) for line in path.open()] for path in sorted(folder.glob("rank-*.jsonl"))]
    rows = []
    for every_rank in zip(*lines, strict=True):
        worst = max(every_rank, key=lambda line: line["gradient"])
        row = worst | {"loss": max(line["loss"] for line in every_rank), "ranks": ranks}
        del row["rank"]
        rows.append(row)
        shown = " ".join(
            f"{k.removesuffix('_degree')}{row[k]}" for k in row if k.endswith("_degree") and row[k] > 1
        )
        print(
            f"{row['schedule']:<12} {shown:<20} zero {row['zero_stage']}  loss {row['loss']:.1e}  "
            f"gradient {row['gradient']:.1e}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
