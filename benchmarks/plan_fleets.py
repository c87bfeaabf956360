"""Which of two fleets the planner prefers, and by how much, beside what was measured.

`disaggregate.json` holds two GPUs with a prefill and a decode instance, and two that do both, under three
workloads. Here the same fleets are simulated at the same rates, on GPUs of the kind that they ran on: every
request drawn alike, the live scheduler's own decisions, the engine that ships (fitted to steps of one H200 in
BF16 and to what one front took, so that nothing is fitted to these runs), blocks at the speed of
`transfer.json`. The foretold goodput comes from a climb of its own, by the rules and seeds of
`disaggregate.py`, and knows none of the runs.

    python benchmarks/plan_fleets.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parent))

import disaggregate
import served_alone
from disaggregate import ATTAINMENT, HALVINGS, TPOTS
from provenance import RESULTS, write_result

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines
from benthic.plan.serving.cluster import Cluster, Link
from benthic.plan.serving.demand import Fixed, drawn
from benthic.plan.serving.goodput import Targets, Trial, trial_of
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.layout import ServingLayout, memory_of
from benthic.plan.serving.priced import PricedStep
from benthic.sched.plans import BatchingConfig
from benthic.spec import hardware as gpus
from benthic.spec import presets
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.cost.machine import Machine
    from benthic.plan.serving.outcome import Outcome
    from benthic.plan.serving.priced import Engine

Row = dict[str, Any]

WORKLOADS: Final = {work.name: work for work in disaggregate.WORKLOADS}
FLEETS: Final = {"1P1D": ("prefill", "decode"), "2 colocated": ("decode", "decode")}
ROLES: Final = FLEETS | {served_alone.FLEET: ("decode",)}
AHEAD: Final = 1.05
PARTS: Final = (0.5, 0.75, 1.0)
"""Of a workload's rates, at which its goodput is foretold under other targets a token."""
SEEDS: Final = 2
BLOCK: Final = 64


def main() -> None:
    """All workloads and fleets, printed and written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="benthic", help="a name or a file")
    parser.add_argument("--hardware", help="instead of the GPUs that the fleets ran on")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows, machine = all_rows(words.engine, words.hardware)
    for row in rows:
        print(row)
    for row in rows:
        if "foretold" in row:
            print(sentence(row))
        elif "foretold_by_tpot_ms" in row:
            for side in ("foretold", "measured"):
                ratios = {tpot: round(ratio(each), 2) for tpot, each in row[f"{side}_by_tpot_ms"].items()}
                print(f"  {side} 1P1D over 2 colocated by ms a token:", ratios)
    print(write_result("plan_fleets", rows, out=words.out, engine=words.engine, machine=machine.name))


def all_rows(engine: str, hardware: str | None = None) -> tuple[list[Row], Machine]:
    """Every rate, every workload's verdict, how far off latencies are; and on what the fleets ran."""
    found = json.loads((RESULTS / "disaggregate.json").read_text())
    runs = found["rows"]["runs"]
    machine = machines.get(hardware or kind_of(found["hardware"]["gpus"][0]))
    sequences = int(found["settings"].get("max_num_seqs", 256))
    fronts = int(found["settings"].get("fronts", 1))
    seconds = float(found["settings"]["seconds"])
    fleets = {
        fleet: Fleet(fleet, engines.get(engine), machine, seconds, sequences, fronts) for fleet in FLEETS
    }
    seen = {name: each["by_tpot_ms"] for name, each in found["rows"]["summary"].items()}
    rows = [row for name in WORKLOADS for row in compared(name, runs, fleets, seen[name])]
    return [*rows, *(row for fleet in FLEETS for row in errors(fleet, rows)), by_targets(rows)], machine


def by_targets(rows: list[Row]) -> Row:
    """Over workloads and targets a token: how often the winner is the same, and how often the other one."""
    pairs = [
        [winner(row[f"{side}_by_tpot_ms"][tpot]) for side in ("foretold", "measured")]
        for row in rows
        if "measured_by_tpot_ms" in row
        for tpot in row["measured_by_tpot_ms"]
    ]
    return {
        "what": "winners under other targets a token",
        "of": len(pairs),
        "agree": sum(told == seen for told, seen in pairs),
        "opposite": sum({told, seen} == set(FLEETS) for told, seen in pairs),
    }


def errors(fleet: str, rows: list[Row]) -> Iterator[Row]:
    """Median error of each latency over the rates that kept their targets, where the client was in time."""
    own = [row for row in rows if row.get("fleet") == fleet and not row["client_limited"]]
    kept = [row for row in own if row["attainment"][1] >= ATTAINMENT]
    for name in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "tpot_p90_ms"):
        off = [told / seen - 1 for told, seen in (row[name] for row in kept)]
        yield {
            "served": fleet,
            "what": name,
            "rates": len(off),
            "median_error": round(median(off), 4) if off else None,
            "median_size": round(median(map(abs, off)), 4) if off else None,
        }


def kind_of(gpu: str) -> str:
    """Such as "h100" of "NVIDIA H100 80GB HBM3"."""
    return next(name for name in gpus.names() if name in gpu.lower().split())


def sentence(row: Row) -> str:
    """Who wins a workload, and by what ratio of goodputs, foretold and measured."""
    told, seen = (ratio(row[side]) for side in ("foretold", "measured"))
    late = ", by a client that was late" if row["client_limited"] else ""
    return (
        f"{row['workload']:<14} 1P1D over 2 colocated: foretold {told:5.2f} ({row['foretold_winner']}), "
        f"measured {seen:5.2f} ({row['measured_winner']}){late}"
    )


def ratio(found: dict[str, float]) -> float:
    """Of goodputs, 1P1D's over that of two colocated instances."""
    return found["1P1D"] / max(found["2 colocated"], 1e-9)


def compared(
    name: str, record: list[Row], fleets: dict[str, Fleet], seen_by_tpot: dict[str, dict[str, float]]
) -> list[Row]:
    """Every measured rate of a workload, and then which fleet wins, also under other targets a token."""
    rows: list[Row] = []
    foretold, seen = {}, {}
    for fleet, one in fleets.items():
        runs = [r for r in record if (r["workload"], r["fleet"]) == (name, fleet)]
        rows += [beside(name, fleet, run, one.trial(name, run["rate"], 0)) for run in runs]
        foretold[fleet] = goodput(one.climb(name, max(run["rate"] for run in runs)))
        seen[fleet] = goodput(by_rate(runs))
    late = any(row["client_limited"] for row in rows)
    found = {"workload": name, "foretold": foretold, "measured": seen, "client_limited": late}
    by_tpot = {fleet: one.by_tpot(name) for fleet, one in fleets.items()}
    each = {str(tpot): {fleet: by_tpot[fleet][tpot] for fleet in fleets} for tpot in TPOTS}
    both = {"foretold_by_tpot_ms": each, "measured_by_tpot_ms": seen_by_tpot}
    return [*rows, found | verdict(foretold, seen), {"workload": name, **both}]


def by_rate(runs: list[Row]) -> list[tuple[float, float]]:
    """Attainment at each rate, the mean of its seeds."""
    return [
        (rate, mean(run["attainment"] or 0.0 for run in runs if run["rate"] == rate))
        for rate in sorted({run["rate"] for run in runs})
    ]


def verdict(foretold: dict[str, float], seen: dict[str, float]) -> Row:
    """Whether the same fleet is ahead."""
    ahead = [winner(found) for found in (foretold, seen)]
    return {"foretold_winner": ahead[0], "measured_winner": ahead[1], "agree": ahead[0] == ahead[1]}


def winner(found: dict[str, float]) -> str:
    """The fleet with the higher goodput, if that is `AHEAD` times the other's."""
    first, second = sorted(found, key=lambda fleet: -found[fleet])
    return first if found[first] > AHEAD * found[second] else "neither"


@dataclass(frozen=True)
class Fleet:
    """Instances of one engine, and what becomes of requests that come to them in some seconds."""

    name: str
    engine: Engine
    machine: Machine
    seconds: float
    sequences: int = 256
    fronts: int = 1

    def climb(self, name: str, most: float) -> list[tuple[float, float]]:
        """Attainment at rising rates past the most that was offered, or to a failure; then halved gaps."""
        found: list[tuple[float, float]] = []
        met, failed = 0.0, 0.0
        for rate in WORKLOADS[name].rates:
            if met >= most:
                break
            found.append((rate, self.attained(name, rate)))
            if found[-1][1] < ATTAINMENT:
                failed = rate
                break
            met = rate
        for _ in range(HALVINGS if failed else 0):
            middle = (met + failed) / 2
            found.append((middle, self.attained(name, middle)))
            met, failed = (middle, failed) if found[-1][1] >= ATTAINMENT else (met, middle)
        return found

    def attained(self, name: str, rate: float) -> float:
        """Share of requests that meet both targets, over all seeds."""
        return mean(self.trial(name, rate, seed).attainment for seed in range(SEEDS))

    def by_tpot(self, name: str) -> dict[float, float]:
        """Goodput under each of `TPOTS` beside the workload's target of the first token."""
        work, shares = WORKLOADS[name], {tpot: list[tuple[float, float]]() for tpot in TPOTS}
        for rate in sorted({part * rate for rate in work.rates for part in PARTS}):
            played = self.played(name, rate, 0)
            for tpot, found in shares.items():
                objectives = Objectives(ttft_s=work.ttft / 1e3, tpot_s=tpot / 1e3)
                found.append((rate, played.attainment(objectives)))
        return {tpot: round(goodput(found), 2) for tpot, found in shares.items()}

    def trial(self, name: str, rate: float, seed: int) -> Trial:
        """One rate, as many requests as were offered."""
        work = WORKLOADS[name]
        objectives = Objectives(ttft_s=work.ttft / 1e3, tpot_s=work.tpot / 1e3)
        targets = Targets(objectives=objectives, attainment=ATTAINMENT)
        return trial_of(rate, self.played(name, rate, seed), targets)

    def played(self, name: str, rate: float, seed: int) -> Outcome:
        """What becomes of these requests."""
        work = WORKLOADS[name]
        seconds = self.seconds * work.spans
        lengths = Fixed(prompt_tokens=work.prompt, output_tokens=work.output)
        demand = drawn(lengths, round(rate * seconds), rate=rate, seed=seed)
        cluster = Cluster(
            specs(self.name, self.engine, self.machine, self.sequences),
            link=link(self.machine),
            front=self.engine.front,
            fronts=self.fronts,
        )
        return cluster.play(demand)


def specs(fleet: str, engine: Engine, machine: Machine, sequences: int) -> list[GroupSpec]:
    """The instances, each on one GPU."""
    model, layout = presets.get("moonlight-16b-a3b"), ServingLayout()
    memory = memory_of(model, layout, machine.hardware, utilisation=0.85)
    batching = BatchingConfig(
        num_blocks=memory.blocks(BLOCK),
        block_size=BLOCK,
        max_model_len=8192,
        max_num_seqs=sequences,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        counted=True,
    )
    step = PricedStep(model, layout, machine, engine)
    host_s = engine.prompt_host_s
    return [
        GroupSpec(role=role, batching=batching, step=step, prompt_host_s=host_s)  # type: ignore[arg-type]
        for role in ROLES[fleet]
    ]


def link(machine: Machine) -> Link:
    """Blocks of latents as `transfer.json` pulled them: a line through its shortest and its longest pull."""
    pulls = json.loads((RESULTS / "transfer.json").read_text())["rows"]["bandwidth"]
    few, many = (pick(pulls, key=lambda pull: pull["bytes"]) for pick in (min, max))
    rate = (many["bytes"] - few["bytes"]) / (many["pull_us"] - few["pull_us"]) * 1e6
    memory = memory_of(presets.get("moonlight-16b-a3b"), ServingLayout(), machine.hardware)
    return Link(
        block_bytes=BLOCK * memory.token_bytes,
        bytes_per_second=rate,
        latency_s=max(0.0, few["pull_us"] / 1e6 - few["bytes"] / rate),
    )


def beside(name: str, fleet: str, run: Row, trial: Trial) -> Row:
    """One rate, foretold and measured."""
    return {
        "workload": name,
        "fleet": fleet,
        "rate": run["rate"],
        "seed": run.get("seed", 0),
        "client_limited": bool(run.get("client_limited")),
        "attainment": [round(trial.attainment, 3), run["attainment"]],
        "ttft_p50_ms": [round(1e3 * trial.ttft_p50_s, 1), run["median_ttft_ms"]],
        "ttft_p90_ms": [round(1e3 * trial.ttft_p90_s, 1), run["p90_ttft_ms"]],
        "tpot_p50_ms": [round(1e3 * trial.tpot_p50_s, 2), run["median_tpot_ms"]],
        "tpot_p90_ms": [round(1e3 * trial.tpot_p90_s, 2), run["p90_tpot_ms"]],
    }


def goodput(rates: list[tuple[float, float]]) -> float:
    """Requests a second and GPU up to which `ATTAINMENT` holds, interpolated where the line crosses it."""
    before = (0.0, 1.0)
    for rate, share in sorted(rates):
        if share < ATTAINMENT:
            part = (before[1] - ATTAINMENT) / (before[1] - share)
            return (before[0] + part * (rate - before[0])) / 2
        before = (rate, share)
    return before[0] / 2


if __name__ == "__main__":
    main()
