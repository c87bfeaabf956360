"""Predicted beside measured: training steps and peaks. `python benchmarks/plan_accuracy.py`.

DeepSeek-V3's published run on 2,048 H800, its hours and its step breakdown (DeepSeek-V3 report, table 1;
Insights into DeepSeek-V3, table 4): its trace taught that an exchange holds its SMs for a whole pair, so its
1F1B is no test; hours and the other parts are fitted to nothing. Kernels are those of that time: DeepEP as it
was published in February 2025, weight gradients as before DeepGEMM's pull request 95, which made them 1.2
times as fast. 1B is input backward time and 1W weight backward time (section 5.1.2), so a full backward is
divided between them.

Our own runs on H200, from `train_ranks.json`, `train_ranks_4_rows.json`, `train_full.json`,
`train_full_fp8.json`, `train_full_fp8_4_rows.json` and `train_gpu.json`: nothing is fitted to them, but the
form of the model was chosen with older runs of all of them in view. Where steps are not CUDA graphs, one row
a microbatch waits for its host, and hosts differ: there is a second file, of a quicker one.
Experts that no row came to were counted in each run. Steps are medians of those in which nothing is met for
the first time (`moonlight_slices.steady`). What the host takes for a call was read from a run of its own, of
rows too short for a GPU (`profiles.py`), but where `train_ranks.py` measured it before its steps. No peak was
fitted to: what phases need was read from what the trainer allocates without a GPU (`peaks.py`); the reserve
was there before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parent))

from moonlight_slices import KEPT_PAIRS, LAYOUTS, moonlight, moonlight_slice, steady
from provenance import RESULTS, write_result

from benthic.plan.cost import machine as machines
from benthic.plan.cost.ops import AllToAll
from benthic.plan.training.candidate import PRECISIONS, Candidate, Numbers, Rows, Updates
from benthic.plan.training.memory import memory
from benthic.plan.training.step import Step, step
from benthic.spec import presets
from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine, Measured
    from benthic.spec.model import ModelConfig

FASTER_GRADIENTS: Final = 1.2
"""DeepGEMM's pull request 95: its weight gradients over those before it."""
FASTER_EXCHANGE: Final = (64, 51 / 46, 50 / 45)
"""Ranks, and how much faster DeepEP of April 2025 brings tokens out and home than that of February."""
HOME: Final = 150e6
"""Bytes over the network between those of DeepEP's two measurements, 106 MB out and 206 MB home."""
QUICKER: Final = "_quicker_host"
"""Of the file whose runs wait for the host, that of an older program on a host that launched faster."""
Line = dict[str, Any]

RECORDED: Final = {
    "train_ranks": ("ep2", "dualpipe", "dualpipev-ep2"),
    "train_ranks_4_rows": ("ep2", "zero3", "dualpipe", "zb-h1", "dualpipev-ep2"),
}
"""Layouts whose steps were CUDA graphs, of files that do not say so."""


def main() -> None:
    """All comparisons, printed and written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows = [*published(), *ranks(), *whole(), *one_gpu()]
    for row in rows:
        off = 100 * (row["predicted"] / row["measured"] - 1)
        figures = f"{row['predicted']:12.5g} {row['measured']:12.5g}"
        blind = "" if row["blind"] else "   (not blind)"
        print(f"{row['run']:<32} {row['what']:<18} {figures} {off:+7.1f} %{blind}")
    found = summary(rows)
    print(found)
    write_result("plan_accuracy", rows, out=words.out, summary=found)


def published() -> list[Line]:
    """DeepSeek-V3: hours of pre-training, and the parts of a step, medians over the pipeline ranks."""
    candidate = Candidate(
        model=presets.get("deepseek-v3"),
        layout=Layout(pp_degree=16, dp_degree=128, ep_degree=64, schedule="dualpipe"),
        train=Rows(),
        rows=15360,
        precision=PRECISIONS["fp8"],
        recompute=("deepseek-v3",),
    )
    found = step(candidate, of_the_run(machines.get("h800")))
    hours = found.seconds * 14.8e12 / candidate.step_tokens * 2048 / 3600
    parts = breakdown(found)
    run = "DeepSeek-V3, 2048 H800"
    return [
        line(run, "GPU hours, 14.8 T", hours, 2664e3),
        line(run, "step, seconds", found.seconds, 19.926),
        line(run, "1F", parts["F"], 1.13),
        line(run, "1B", parts["B"], 1.99),
        line(run, "1W", parts["W"], 0.48),
        line(run, "1F1B", parts["FB"], 13.95, blind=False),
        line(run, "bubble", parts["bubble"], 2.06),
        line(run, "optimizer", found.update.end.seconds, 0.29),
    ]


def of_the_run(machine: Machine) -> Machine:
    """The machine with weight gradients and exchange at the rates that DeepSeek had while it trained."""

    def then(one: Measured) -> Measured:
        op = one.op
        if "gradient" in op.kind:
            return dataclasses.replace(one, seconds=one.seconds * FASTER_GRADIENTS)
        if isinstance(op, AllToAll) and op.ranks == FASTER_EXCHANGE[0]:
            out, home = FASTER_EXCHANGE[1:]
            return dataclasses.replace(one, seconds=one.seconds * (home if op.network > HOME else out))
        return one

    own, *others = machine.profiles
    own = dataclasses.replace(own, points=tuple(map(then, own.points)))
    return dataclasses.replace(machine, profiles=(own, *others))


def breakdown(found: Step) -> dict[str, float]:
    """Seconds by kind of slot, a full backward divided by what its parts take: medians over ranks."""
    by_rank: list[dict[str, float]] = []
    for rank, slots in enumerate(found.timeline.slots):
        times: dict[str, float] = defaultdict(float)
        for timed in slots:
            kind, seconds = timed.slot.first.kind, timed.end - timed.start
            if timed.slot.second:
                times["FB"] += seconds
            elif kind == "B":
                weights = found.prices.work[timed.slot.first.stage].weight.seconds
                times["B"] += seconds - weights
                times["W"] += weights
            else:
                times[{"I": "B"}.get(kind, kind)] += seconds
        times["bubble"] = found.timeline.bubble(rank)
        by_rank.append(times)
    return {
        key: statistics.median(times[key] for times in by_rank) for key in ("F", "B", "W", "FB", "bubble")
    }


def ranks() -> list[Line]:
    """The slice of Moonlight on one and two GPUs, with one and with four rows a microbatch."""
    model, layouts = moonlight_slice(), {"1 rank": Layout(), **LAYOUTS}
    rows: list[Line] = []
    files = (
        ("train_ranks", 1, 8, ""),
        (f"train_ranks{QUICKER}", 1, 8, ", quicker host"),
        ("train_ranks_4_rows", 4, 32, ", 4 rows"),
    )
    for file, many, step_rows, words in files:
        for row in results(file):
            graph = recorded(file, row)
            train = Rows(local_batch_size=many, kept_pairs=KEPT_PAIRS, cuda_graph=graph)
            one = Candidate(
                model=model, layout=layouts[row["layout"]], train=train, rows=step_rows, idle=idle(row, model)
            )
            run = f"slice, {row['layout']}{words}{', one graph' if graph else ''}"
            rows += both(run, one, steady(row["seconds"]), row["peak_bytes"], host(file, row))
    return rows


def idle(row: dict[str, Any], model: ModelConfig) -> float:
    """The share of experts without rows, of which a run says how many each mixture had in a step."""
    empty = statistics.mean(without for _, without in row["busiest_and_empty_experts"])
    return empty / model.n_routed_experts


def whole() -> list[Line]:
    """All of Moonlight on two GPUs, in bfloat16 and in FP8."""
    rows: list[Line] = []
    for file, words, numbers in (
        ("train_full", "", Numbers()),
        ("train_full_fp8", ", FP8", PRECISIONS["fp8"]),
        ("train_full_fp8_4_rows", ", FP8, 4 rows", PRECISIONS["fp8"]),
    ):
        settings = dict(word.split("=") for word in record(file)["settings"]["set"])
        (row,) = results(file)
        one = Candidate(
            model=moonlight(),
            layout=LAYOUTS["ep2"],
            train=Rows(
                local_batch_size=int(settings["train.local_batch_size"]),
                kept_pairs=KEPT_PAIRS,
                cuda_graph=recorded(file, row),
            ),
            rows=int(settings["train.global_batch_size"]),
            recompute=tuple(settings.get("recompute", "attention,experts").split(",")),
            optimizer=Updates(
                store_param_remainders=settings.get("optimizer.store_param_remainders") == "true",
            ),
            precision=numbers,
            idle=idle(row, moonlight()),
        )
        rows += both(
            f"Moonlight, ep2{words}", one, steady(row["seconds"]), row["peak_bytes"], host(file, row)
        )
    return rows


def one_gpu() -> list[Line]:
    """Six layers of Moonlight on one GPU."""
    model = dataclasses.replace(moonlight(), num_hidden_layers=6)
    settings = {
        "benthic bf16": (4, Numbers()),
        "benthic bf16, rows one by one": (1, Numbers()),
        "benthic fp8": (4, Numbers(weights="fp8", matmul="fp8")),
    }
    rows: list[Line] = []
    for row in results("train_gpu"):
        if row["who"] in settings:
            count, numbers = settings[row["who"]]
            train = Rows(local_batch_size=count, cuda_graph=recorded("train_gpu", row))
            one = Candidate(model=model, layout=Layout(), train=train, rows=4, precision=numbers)
            seconds = one.step_tokens / row["tokens_per_second"]
            run = f"6 layers, {row['who'].removeprefix('benthic ')}"
            rows += both(run, one, seconds, row["peak_bytes"], {})
    return rows


def both(run: str, one: Candidate, seconds: float, peak: float, calls: dict[str, float]) -> list[Line]:
    """Step and peak of the first rank, which measured both; `calls`: what the run's host takes for them."""
    found = step(one, machine_of(calls))
    first = memory(one, found.timeline.table)[0]
    size = first.total - first.terms["exchange"]  # which torch does not count
    return [
        line(run, "step, seconds", found.seconds, seconds),
        line(run, "peak, bytes", size, peak),
    ]


def recorded(file: str, row: Line) -> bool:
    """Whether a run's steps were CUDA graphs."""
    found: bool = row.get("cuda_graph", row.get("layout") in RECORDED.get(file, ()))
    return found


def host(file: str, row: Line) -> dict[str, float]:
    """Seconds of a call, if they were measured before the run's steps; `{}` otherwise."""
    found: dict[str, float] = row.get("host") or record(file)["settings"].get("host", {})
    return found


def machine_of(calls: dict[str, float]) -> Machine:
    """H200s; with what a host takes for a call where it is known."""
    machine = machines.get("h200")
    own, *others = machine.profiles
    own = dataclasses.replace(own, overheads={**own.overheads, **calls})
    return dataclasses.replace(machine, profiles=(own, *others))


def line(run: str, what: str, predicted: float, measured: float, *, blind: bool = True) -> Line:
    """One comparison; `blind` where nothing was fitted to it."""
    return {"run": run, "what": what, "predicted": predicted, "measured": measured, "blind": blind}


def summary(rows: list[Line]) -> Line:
    """The blind steps of our own runs: how many, the median error, and how many are within 10 %."""
    off = [
        abs(row["predicted"] / row["measured"] - 1)
        for row in rows
        if row["blind"] and row["what"] == "step, seconds" and "DeepSeek" not in row["run"]
    ]
    return {
        "blind": len(off),
        "median": statistics.median(off),
        "within_10_percent": sum(e <= 0.1 for e in off),
    }


def results(name: str) -> list[Line]:
    """The rows of a committed result."""
    rows: list[Line] = record(name)["rows"]
    return rows


def record(name: str) -> Line:
    """A committed result."""
    found: Line = json.loads((RESULTS / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    main()
