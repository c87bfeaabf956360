"""What a scheduling decision costs: microseconds per sequence and step, and an hour of requests.

    python benchmarks/scheduler.py [--quick] [--trace AzureLLMInferenceTrace2023_conv.csv]

steady   sequences that only decode: `plan` and `commit`, with token ids (live) and without (simulated)
hour     requests of one hour with a clock that jumps; step times are linear in tokens, sequences and context

The hour is drawn with the means of the Azure conversation trace of 2023 (Splitwise, ISCA'24: 19,366 requests,
1,155 prompt and 211 output tokens) unless `--trace` names a file with that trace's columns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import random
import time
from datetime import datetime
from pathlib import Path

from provenance import write_result

from benthic.sched.batching import BatchingConfig, Request, Scheduler, StepPlan

Arrival = tuple[float, int, int]
"""Seconds since the start, prompt tokens, output tokens."""


def steady(num_seqs: int, steps: int, *, counted: bool) -> dict[str, float | int | str]:
    """Time `plan` and `commit` of `num_seqs` decoding sequences, their block growth included."""
    length = 64 + steps + 8
    config = BatchingConfig(
        num_blocks=num_seqs * (length // 64 + 2),
        max_model_len=length,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8192, 65 * num_seqs),
        counted=counted,
    )
    scheduler = Scheduler(config)
    for i in range(num_seqs):
        prompt = None if counted else tuple(range(i, i + 64))
        scheduler.add(Request(request_id=f"r{i}", prompt=prompt, prompt_len=64, max_tokens=steps + 4), 0.0)
    _commit(scheduler, scheduler.plan(0.0))
    spent = [0.0, 0.0]
    for step in range(steps):
        began = time.perf_counter()
        plan = scheduler.plan(float(step))
        planned = time.perf_counter()
        rows = [(7,)] * num_seqs
        ready = time.perf_counter()
        if counted:
            scheduler.commit_counts(plan, float(step))
        else:
            scheduler.commit(plan, rows, float(step))
        spent[0] += planned - began
        spent[1] += time.perf_counter() - ready
    scale = 1e6 / (steps * num_seqs)
    return {
        "case": "steady, " + ("counted" if counted else "token ids"),
        "sequences": num_seqs,
        "steps": steps,
        "plan_us_per_seq_step": round(spent[0] * scale, 4),
        "commit_us_per_seq_step": round(spent[1] * scale, 4),
        "total_us_per_seq_step": round(sum(spent) * scale, 4),
    }


def hour(arrivals: list[Arrival], *, num_blocks: int, name: str) -> dict[str, float | int | str]:
    """Serve every request on one instance; the clock jumps from step to step."""
    config = BatchingConfig(num_blocks=num_blocks, max_model_len=1 << 17, counted=True)
    scheduler = Scheduler(config)
    now, next_up, seq_steps = 0.0, 0, 0
    began = time.perf_counter()
    while next_up < len(arrivals) or scheduler.has_work:
        while next_up < len(arrivals) and arrivals[next_up][0] <= now:
            at, prompt_len, max_tokens = arrivals[next_up]
            scheduler.add(Request(request_id=str(next_up), prompt_len=prompt_len, max_tokens=max_tokens), at)
            next_up += 1
        plan = scheduler.plan(now)
        if not plan.num_tokens:
            now = arrivals[next_up][0]
            continue
        seq_steps += len(plan.decode_ids)
        now += 0.020 + 6e-5 * plan.num_tokens + 5e-8 * sum(plan.decode_positions)
        scheduler.commit_counts(plan, now)
    wall = time.perf_counter() - began
    totals = scheduler.totals
    return {
        "case": name,
        "requests": totals.requests,
        "generated_tokens": totals.generated_tokens,
        "steps": totals.steps,
        "preemptions": totals.preemptions,
        "recomputed_tokens": totals.recomputed,
        "mean_decodes_per_step": round(seq_steps / totals.steps, 1),
        "simulated_s": round(now, 1),
        "wall_s": round(wall, 2),
        "times_real_time": round(now / wall),
        "total_us_per_seq_step": round(1e6 * wall / seq_steps, 4),
    }


def drawn(num_requests: int, seed: int = 0) -> list[Arrival]:
    """An hour's worth of Poisson arrivals with log-normal prompts and outputs of the trace's means."""
    rng = random.Random(seed)  # noqa: S311 (a workload, not a secret)
    now, arrivals = 0.0, []
    for _ in range(num_requests):
        now += rng.expovariate(19366 / 3600)
        prompt = min(14000, 1 + int(1155 * rng.lognormvariate(-0.5, 1.0)))
        output = min(1000, 1 + int(211 * rng.lognormvariate(-0.18, 0.6)))
        arrivals.append((now, prompt, output))
    return arrivals


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals of an Azure LLM inference trace (columns TIMESTAMP, ContextTokens, GeneratedTokens)."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    seconds = [(at - times[0]).total_seconds() for at in times]
    prompts = [max(1, int(row["ContextTokens"])) for row in rows]
    outputs = [max(1, int(row["GeneratedTokens"])) for row in rows]
    return list(zip(seconds, prompts, outputs, strict=True))


def _commit(scheduler: Scheduler, plan: StepPlan) -> None:
    if scheduler.config.counted:
        scheduler.commit_counts(plan, 0.0)
    else:
        scheduler.commit(plan, [(7,)] * len(plan.sampled_ids), 0.0)


def main() -> None:
    """Print a table and write `results/scheduler.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--trace", type=Path, help="an Azure trace to replay instead of a drawn hour")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    steps, requests = (200, 2000) if args.quick else (2000, 19366)
    gc.freeze()
    rows = [steady(n, steps, counted=counted) for counted in (False, True) for n in (1, 32, 256)]
    arrivals = read_trace(args.trace) if args.trace else drawn(requests)
    source = args.trace.name if args.trace else "drawn hour"
    rows += [
        hour(arrivals, num_blocks=20000, name=f"{source}, ample blocks"),
        hour(arrivals, num_blocks=600, name=f"{source}, scarce blocks"),
    ]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"wrote {write_result('scheduler', rows, out=args.out, quick=args.quick, source=source)}")


if __name__ == "__main__":
    main()
