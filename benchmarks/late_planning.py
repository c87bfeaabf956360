"""What planning late is worth, simulated: latencies of two instances that do both, planned at once and late.

The fleets, rates and prices of `plan_fleets.py`; the server's own scheduler and its own guess of when a step
ends (`benthic.sched.tempo`). Every step takes up to `--jitter` more or less than priced, so that guesses are
wrong as they are on a machine, and the host takes `--host-ms` to plan and launch one. Nothing here ran on a
GPU.

    python benchmarks/late_planning.py
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parent))

from plan_fleets import WORKLOADS, link, specs
from provenance import write_result
from rich.console import Console
from rich.table import Table

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines
from benthic.plan.serving.cluster import Cluster
from benthic.plan.serving.demand import Fixed, drawn
from benthic.plan.serving.goodput import Targets, Trial, trial_of
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benthic.plan.serving.group import GroupSpec
    from benthic.plan.serving.steps import StepLoad, StepTime

MARGINS_MS: Final = (None, 1.0, 2.0, 4.0)
SHARES: Final = (0.3, 0.6, 0.9)
"""Rates, as shares of the highest that `disaggregate.py` asks for."""


@dataclass(frozen=True)
class Uneven:
    """Steps that take up to `jitter` more or less than `even` says."""

    even: StepTime
    jitter: float
    draws: random.Random

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds."""
        return self.even(loads) * self.draws.uniform(1 - self.jitter, 1 + self.jitter)


def main() -> None:
    """All workloads, rates and margins, printed and written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--engine", default="benthic", help="a name or a file")
    parser.add_argument("--host-ms", type=float, default=1.0)
    parser.add_argument("--jitter", type=float, default=0.03)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = [row for name in WORKLOADS for row in workload(name, words)]
    Console().print(table(rows))
    settings = {key: value for key, value in vars(words).items() if key != "out"}
    print(write_result("late_planning", rows, out=words.out, **settings))


def workload(name: str, words: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every rate and margin of one workload."""
    work = WORKLOADS[name]
    for share in SHARES:
        rate = round(share * max(work.rates), 1)
        for margin in MARGINS_MS:
            found = trial(name, rate, margin, words)
            yield {
                "workload": name,
                "rate": rate,
                "late_planning_ms": margin,
                "attainment": round(found.attainment, 3),
                "ttft_p50_ms": round(1e3 * found.ttft_p50_s, 1),
                "ttft_p90_ms": round(1e3 * found.ttft_p90_s, 1),
                "tpot_p50_ms": round(1e3 * found.tpot_p50_s, 2),
                "tpot_p90_ms": round(1e3 * found.tpot_p90_s, 2),
            }


def trial(name: str, rate: float, margin_ms: float | None, words: argparse.Namespace) -> Trial:
    """One rate, as many requests as arrive in `--seconds`."""
    work, machine, engine = WORKLOADS[name], machines.get(words.hardware), engines.get(words.engine)
    late_s = None if margin_ms is None else margin_ms / 1e3
    fleet = [
        late(spec, late_s, index, words)
        for index, spec in enumerate(specs("2 colocated", engine, machine, 512))
    ]
    lengths = Fixed(prompt_tokens=work.prompt, output_tokens=work.output)
    demand = drawn(lengths, round(rate * words.seconds), rate=rate, seed=0)
    cluster = Cluster(fleet, link=link(machine), front=engine.front, fronts=4)
    objectives = Objectives(ttft_s=work.ttft / 1e3, tpot_s=work.tpot / 1e3)
    return trial_of(rate, cluster.play(demand), Targets(objectives=objectives))


def late(spec: GroupSpec, late_s: float | None, seed: int, words: argparse.Namespace) -> GroupSpec:
    """An instance with a host, uneven steps and a margin."""
    step = Uneven(spec.step, words.jitter, random.Random(seed))  # noqa: S311 (no secret)
    return replace(spec, step=step, host_s=words.host_ms / 1e3, late_s=late_s)


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a row."""
    drawn_table = Table(*rows[0])
    for row in rows:
        drawn_table.add_row(*("at once" if value is None else str(value) for value in row.values()))
    return drawn_table


if __name__ == "__main__":
    main()
