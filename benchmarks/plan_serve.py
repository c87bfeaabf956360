"""How far serving predictions are from what was measured, and how fast the simulation is.

    python benchmarks/plan_serve.py --measured serve_gpu.json --trace AzureLLMInferenceTrace2023_conv.csv

steps      steps of our engine on one GPU (a result of `benchmarks/serve_gpu.py`): priced from operations
           alone, by the engine that ships, and with numbers fitted on the *other* rows (leave one out)
alone      requests one at a time over HTTP on one GPU (`transfer.json`): TTFT and TPOT
fleets     two fleets of two GPUs (`disaggregate.json`, see `plan_fleets.py`): goodput, and how far TTFT and
           TPOT are off where the targets were kept
deepseek   what DeepSeek published of its deployment
distserve  OPT-13B on A100 by its published fit: goodput a GPU, mean of five seeds
trace      one instance that serves a whole recorded trace, step by step, with the live scheduler
plan       `benthic plan serve deepseek-v3` on 64 H200
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plan_fleets
from provenance import RESULTS, write_result

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines
from benthic.plan.serving.demand import SHAREGPT, Fixed
from benthic.plan.serving.distserve import Degrees, Study
from benthic.plan.serving.engine_fit import left_out, replace_engine
from benthic.plan.serving.examples import serving_examples
from benthic.plan.serving.goodput import Targets
from benthic.plan.serving.layout import ServingLayout
from benthic.plan.serving.measured import read_measured
from benthic.plan.serving.options import Question
from benthic.plan.serving.priced import PricedStep
from benthic.plan.serving.recordings import play_recording, read_trace
from benthic.plan.serving.search import plan_serving
from benthic.plan.serving.steps import StepLoad
from benthic.spec import presets
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine

Row = dict[str, Any]


def step_rows(path: Path) -> list[Row]:
    """Errors of steps priced from operations alone, by our engine as shipped, and fitted leaving each out.

    The shipped engine was fitted to the rows in BF16: those in FP8 are its blind test.
    """
    rows = []
    machine = machine_of(json.loads(path.read_text()))
    for weights in ("bf16", "fp8"):
        layout = ServingLayout(weights=weights, cache=weights)
        plain = PricedStep(presets.get("moonlight-16b-a3b"), layout, machine)
        shipped = replace_engine(plain, engines.get("benthic"))
        steps = read_measured(path, weights, graph_rows=shipped.engine.graph_rows)
        for each, error in zip(steps, left_out("benthic", plain, steps), strict=True):
            rows.append(
                {
                    "case": "step",
                    "weights": weights,
                    "decodes": each.load.decodes,
                    "prefill_tokens": each.load.prefill_tokens,
                    "recorded": each.recorded or not each.load.prefill_tokens,
                    "measured_ms": round(1e3 * each.seconds, 3),
                    "priced_error": round(plain([each.load]) / each.seconds - 1, 4),
                    "shipped_error": round(shipped([each.load]) / each.seconds - 1, 4),
                    "fitted_error": round(error, 4),
                }
            )
    for name in ("priced_error", "shipped_error", "fitted_error"):
        for weights in ("bf16", "fp8"):
            own = [row for row in rows if row.get("weights") == weights]
            kinds = {
                "decode steps": [row for row in own if not row["prefill_tokens"]],
                "recorded steps with prompts": [r for r in own if r["recorded"] and r["prefill_tokens"]],
            }
            for kind, some in kinds.items():
                errors = [abs(row[name]) for row in some]
                case = f"{kind} in {weights}, median |{name}|"
                rows += [{"case": case, "value": round(statistics.median(errors), 4)}] if errors else []
    return rows


def machine_of(record: Row) -> Machine:
    """The GPUs that a result was measured on."""
    return machines.get(plan_fleets.kind_of(record["hardware"]["gpus"][0]))


def alone_rows() -> list[Row]:
    """A prompt of 4,096 tokens and the tokens behind it, which nothing was fitted to."""
    record = json.loads((RESULTS / "transfer.json").read_text())
    sizes, times = record["settings"]["sizes"], record["rows"]["first_tokens"]["one server"]
    prompt, tokens = sizes["sent"], sizes["tokens"]
    engine = engines.get("benthic")
    step = PricedStep(presets.get("moonlight-16b-a3b"), ServingLayout(), machine_of(record), engine)
    first, second, last = (times[name]["median"] for name in ("first_ms", "second_ms", "last_ms"))
    measured = {"ttft_ms": first, "tpot_ms": (last - second) / (tokens - 2)}
    pairs = prompt * (prompt + 1) // 2
    computed = step([StepLoad(0, 0, 0, prompt, pairs, prompt, 1)])
    foretold = {
        "ttft_ms": 1e3 * (computed + engine.front.seconds(prompt, 1)),
        "tpot_ms": 1e3 * step([StepLoad(1, 1, prompt + tokens // 2, 0, 0, 0, 1)]),
    }
    return [
        {
            "case": f"alone, {name}",
            "foretold": round(foretold[name], 3),
            "measured": round(measured[name], 3),
            "error": round(foretold[name] / measured[name] - 1, 4),
        }
        for name in measured
    ]


def fleet_rows() -> list[Row]:
    """Goodput of both fleets under each workload, and errors of their latencies."""
    rows, machine = plan_fleets.all_rows("benthic")
    kept = [row for row in rows if "foretold" in row or "served" in row]
    return [{"case": f"fleets on two {machine.name}", **row} for row in kept]


def published_rows() -> list[Row]:
    """What was published, as `benthic.plan.serving.examples` works it out."""
    return [
        {"case": worked.title, "value": worked.value, "published": worked.published, "error": worked.error}
        for worked in serving_examples()
        if worked.unit == "tokens/s/GPU"
    ]


def distserve_row() -> Row:
    """Goodput a GPU of prefill TP2 and decode TP1 at 200 and 100 ms for 90 %, 300 requests."""
    targets = Targets(objectives=Objectives(ttft_s=0.2, tpot_s=0.1))
    found = [
        Study(model="opt-13b", lengths=SHAREGPT, targets=targets, seed=seed)
        .joint_goodput(Degrees(2, 1), Degrees(1, 1))
        .rate
        / 3
        for seed in range(5)
    ]
    mean = statistics.mean(found)
    return {"case": "DistServe OPT-13B", "per_gpu": mean, "published": 1.5625, "error": mean / 1.5625 - 1}


def trace_row(path: Path) -> Row:
    """An hour of requests on one H200."""
    began = time.process_time()
    found = play_recording(
        presets.get("moonlight-16b-a3b"),
        machines.get("h200"),
        read_trace(path),
        tp_degree=1,
        dp_degree=1,
        weights="bf16",
        cache="bf16",
        speed=1.0,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        objectives=Objectives(),
    )
    took = time.process_time() - began
    return {
        "case": path.name,
        "cpu_s": round(took, 2),
        "times_real_time": round(found["seconds"] / took),
        **found,
    }


def plan_row() -> Row:
    """Processor seconds of the whole question, those of its workers too; seconds; and its answer."""
    began, started = os.times(), time.perf_counter()
    plan = plan_serving(
        Question(
            model=presets.get("deepseek-v3"),
            machine=machines.get("h200"),
            gpus=64,
            lengths=Fixed(prompt_tokens=4000, output_tokens=500),
            targets=Targets(objectives=Objectives(ttft_s=2.0, tpot_s=0.03)),
        ),
        workers=os.cpu_count() or 1,
    )
    ended = os.times()
    cpu = sum(ended[:4]) - sum(began[:4])
    return {
        "case": "plan serve deepseek-v3, 64 h200",
        "cpu_s": round(cpu, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "screened": plan.screened,
        "best": plan.best.candidate.name,
        "output_tokens_per_gpu": round(plan.best.output_per_gpu, 1),
        "estimates": {a.candidate.name: round(a.candidate.rate / max(a.rate, 1e-9), 3) for a in plan.answers},
    }


def main() -> None:
    """Print the rows and write `results/plan_serve.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="a result of benchmarks/serve_gpu.py on one H200")
    parser.add_argument("--trace", type=Path, help="an Azure trace")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = step_rows(arguments.measured) if arguments.measured else []
    rows += [*alone_rows(), *fleet_rows(), *published_rows(), distserve_row(), plan_row()]
    if arguments.trace:
        rows.append(trace_row(arguments.trace))
    for row in rows:
        print(row)
    print(write_result("plan_serve", rows, out=arguments.out))


if __name__ == "__main__":
    main()
