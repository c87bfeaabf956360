"""Latencies and goodput of one server or fleet under load, foretold beside what `served_alone.py` measured.

The same requests, drawn alike, meet simulated instances at the rates that were served: the live scheduler's
own decisions, the engine that ships or one that `benthic plan engine` fitted to steps of that machine, and
nothing fitted to the runs. The foretold goodput comes from a walk of its own over the rates, by the rules of
`served_alone.py`, which knows none of the runs. Errors are medians over the rates that kept their targets and
whose client was in time, all workloads together; the goal for each is beside it.

    python benchmarks/plan_alone.py
    python benchmarks/plan_alone.py --served a.json --engine engine.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))

import plan_fleets
import served_alone
from disaggregate import ATTAINMENT, goodput
from plan_fleets import Fleet, beside, errors
from provenance import RESULTS, write_result
from served_alone import FLEET

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines

Row = dict[str, Any]

GOALS: Final = {
    "ttft_p50_ms": 0.15,
    "ttft_p90_ms": 0.25,
    "tpot_p50_ms": 0.06,
    "tpot_p90_ms": 0.06,
    "goodput": 0.10,
}
"""Largest median size of an error."""


def main() -> None:
    """Every rate, every workload's goodput, and how far off each figure is; printed and written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--served", type=Path, default=RESULTS / "served_alone.json")
    parser.add_argument("--engine", default="benthic", help="a name or a file")
    parser.add_argument("--hardware", help="instead of the GPU that was served on")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    record = json.loads(words.served.read_text())
    hardware = words.hardware or plan_fleets.kind_of(record["hardware"]["gpus"][0])
    rows = all_rows(record, fleet_of(record, words.engine, hardware))
    for row in rows:
        print(sentence(row))
    asked = {"engine": words.engine, "machine": hardware, "served": words.served.name}
    print(write_result("plan_alone", rows, out=words.out, served_commit=record["commit"], **asked))


def fleet_of(record: Row, engine: str, hardware: str) -> Fleet:
    """The instances that a record's settings describe."""
    settings = record["settings"]
    return Fleet(
        settings.get("fleet", FLEET),
        engines.get(engine),
        machines.get(hardware),
        float(settings["seconds"]),
        int(settings["max_num_seqs"]),
        int(settings["fronts"]),
    )


def all_rows(record: Row, fleet: Fleet) -> list[Row]:
    """Every run beside its simulation, goodput of every workload, and the errors' medians beside goals."""
    small, seeds = record["settings"]["small"], int(record["settings"]["seeds"])
    rows: list[Row] = []
    for work in served_alone.works_of(small=small):
        runs = [run for run in record["rows"]["runs"] if run["workload"] == work.name]
        rows += [
            beside(work.name, fleet.name, run, fleet.trial(work.name, run["rate"], run["seed"]))
            for run in runs
        ]
        if runs:
            first = served_alone.starts(work, fleet.name, small=small)
            told = foretold(fleet, work.name, first, seeds)
            rows.append(goodputs(work.name, told, runs))
    return [*rows, *summary(fleet.name, rows)]


def foretold(fleet: Fleet, name: str, first: tuple[float, float], seeds: int) -> list[Row]:
    """Simulated runs of a walk over rates, as `served_alone.py` offers them."""

    def offer(rate: float) -> list[Row]:
        return [
            {"rate": rate, "seed": seed, "attainment": fleet.trial(name, rate, seed).attainment}
            for seed in range(seeds)
        ]

    return served_alone.walk(first, offer)


def goodputs(name: str, told: list[Row], seen: list[Row]) -> Row:
    """Goodput of a workload, foretold and measured.

    The error is left out where a side met its targets at every rate that it was offered, which bounds it from
    below only, or where the client was late.
    """
    sides = [goodput(merged(runs)) for runs in (told, seen)]
    bounds = [min(row["attainment"] for row in merged(runs)) >= ATTAINMENT for runs in (told, seen)]
    late = any(run.get("client_limited") for run in seen)
    known = sides[1] > 0.0 and not late and not any(bounds)
    return {
        "workload": name,
        "goodput": [round(each, 3) for each in sides],
        "lower_bounds": bounds,
        "client_limited": late,
        "error": round(sides[0] / sides[1] - 1, 4) if known else None,
    }


def merged(runs: list[Row]) -> list[Row]:
    """Attainment by rate, the mean of its seeds."""
    return [{"rate": rate, "attainment": share} for rate, share in plan_fleets.by_rate(runs)]


def summary(fleet: str, rows: list[Row]) -> list[Row]:
    """Median errors of latencies and of goodput, each with its goal and whether it is met."""
    found = [{**row, "of": row["rates"]} for row in errors(fleet, rows)]
    off = [row["error"] for row in rows if row.get("error") is not None]
    found.append(
        {
            "what": "goodput",
            "of": len(off),
            "median_error": round(median(off), 4) if off else None,
            "median_size": round(median(map(abs, off)), 4) if off else None,
            "largest_size": max(map(abs, off)) if off else None,
        }
    )
    kept = ("what", "of", "median_error", "median_size", "largest_size")
    return [judged({name: row[name] for name in kept if name in row}) for row in found]


def judged(row: Row) -> Row:
    """With its goal; `met` is None where nothing was compared."""
    goal, size = GOALS[row["what"]], row["median_size"]
    return row | {"goal": goal, "met": None if size is None else size <= goal}


def sentence(row: Row) -> str:
    """A row for people: foretold / measured."""
    if "what" in row:
        known = row["median_size"] is not None
        off = f"{row['median_error']:+.1%}, in size {row['median_size']:.1%}" if known else "nothing compared"
        return f"{row['what']:<12} median error of {row['of']}: {off}, goal {row['goal']:.0%}: {row['met']}"
    if "goodput" in row:
        told, seen = row["goodput"]
        error = "" if row["error"] is None else f" {row['error']:+.1%}"
        return f"{row['workload']:<14} goodput {told:.2f} / {seen:.2f}{error}"
    pairs = [
        f"{told:.4g} / {seen or 0.0:.4g}" for told, seen in (row[name] for name in ("attainment", *LATENCIES))
    ]
    return f"{row['workload']:<14} {row['rate']:5.1f}/s: " + "  ".join(pairs)


LATENCIES: Final = tuple(name for name in GOALS if name.endswith("_ms"))


if __name__ == "__main__":
    main()
