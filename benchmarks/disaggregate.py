"""Prefill and decode on one GPU each beside two GPUs that do both: goodput of the same requests; who wins.

Both fleets run `benthic serve` with random weights at the shape of Moonlight-16B and are loaded by `benthic
bench serve` with a prefill-heavy, a balanced and a decode-heavy workload. A request counts when it meets both
targets; goodput is the highest offered rate (interpolated) that 90 % of requests meet. Rates climb until one
fails, then the gap is halved twice; every rate is offered once with each seed (of prompts and arrivals), and
a side wins where its worst seed is better than the other's best. Every run also says how many requests met
their time to first token and each of several times a token, so that goodput is there under other targets
too. `--clients` processes load a fleet: one is late at 40,000 tokens a second.

    python benchmarks/disaggregate.py            # pairs of GPUs: two, or more to measure side by side
    python benchmarks/disaggregate.py --small    # tiny, on a CPU: a rehearsal
    python benchmarks/disaggregate.py --fleets 1P1D --out a.json  # where time comes in pieces: every run is
    python benchmarks/disaggregate.py --out a.json                # kept, and none repeated on the same commit
    python benchmarks/disaggregate.py --record steps  # every scheduler's calls too, for live_steps.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from provenance import provenance, write_result
from random_checkpoint import DUMMY, QUIET, make_folder, shape

from benthic.bench.served import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FLEETS = {"1P1D": ("1", "1"), "2 colocated": ("0", "2")}
ATTAINMENT = 0.9
HALVINGS = 2
TPOTS = (10.0, 12.5, 15.0, 20.0, 25.0, 30.0, 40.0)
"""Targets in ms a token under which each run is counted, beside the one that it climbs by."""
SEQUENCES = 512
DETAILS = ("due", "input_lens", "output_lens", "ttfts", "itls", "e2els", "request_errors")
SHOWN = ("attainment", "completed", "median_ttft_ms", "p90_ttft_ms", "median_tpot_ms", "p90_tpot_ms")

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, targets in ms, rates in requests a second for the two GPUs.

    Arrivals last `spans` times as long as the command line says, for requests that live as long as a run.
    """

    name: str
    prompt: int
    output: int
    ttft: int
    tpot: int
    rates: tuple[float, ...]
    spans: int = 1


WORKLOADS = (
    Workload("prefill-heavy", 4096, 64, 1000, 30, (10.0, 20.0, 30.0, 40.0)),
    Workload("balanced", 2048, 256, 600, 30, (20.0, 40.0, 60.0, 80.0)),
    Workload("decode-heavy", 512, 512, 300, 30, (30.0, 60.0, 100.0, 140.0), spans=2),
)
SMALL = tuple(
    replace(work, prompt=work.prompt // 64, output=8, ttft=2000, tpot=500, rates=(2.0, 4.0), spans=1)
    for work in WORKLOADS
)


def main() -> None:
    """Each fleet is started once and meets every workload; side by side where there are two pairs of GPUs."""
    words = parse()
    works = [
        replace(work, rates=tuple(words.rates or work.rates))
        for work in (SMALL if words.small else WORKLOADS)
        if work.name in words.workloads
    ]
    pairs = torch.cuda.device_count() // 2
    free: queue.Queue[str] = queue.Queue()
    for pair in range(max(1, pairs)):
        free.put(f"{2 * pair},{2 * pair + 1}")
    settings = {"small": words.small, "seconds": words.seconds, "seeds": words.seeds, "pairs": pairs}
    settings |= {"max_num_seqs": SEQUENCES, "prefix_caching": False, "fronts": words.fronts}
    settings |= {"late_planning_ms": words.late_planning_ms, "clients": words.clients}
    found = Found.at(words.out, settings)
    with tempfile.TemporaryDirectory() as temporary:
        model = make_folder(Path(temporary) / "model", shape(small=words.small))

        def job(fleet: str) -> None:
            gpus = free.get()
            try:
                serve_all(fleet, works, model, gpus, words, found)
            finally:
                free.put(gpus)

        with ThreadPoolExecutor(max(1, pairs)) as pool:
            list(pool.map(job, words.fleets))


@dataclass
class Found:
    """What all fleets showed so far; written after every run, lest a call cut short shows nothing.

    `finished` holds which fleet has been offered all that it should be of which workload; `name` is that of
    the benchmark.
    """

    out: Path | None
    settings: Row
    runs: list[Row] = field(default_factory=list)
    finished: list[list[str]] = field(default_factory=list)
    name: str = "disaggregate"
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def at(cls, out: Path | None, settings: Row, name: str = "disaggregate") -> Found:
        """With what an earlier call left in `out`.

        Raises: ValueError where that is of another commit or of other settings.
        """
        if out is None or not out.exists():
            return cls(out, settings, name=name)
        record = json.loads(out.read_text())
        before = {"commit": record["commit"], **record["settings"]}
        now = {"commit": provenance()["commit"], **settings}
        differing = [
            f"{name} {before.get(name)}, now {value}"
            for name, value in now.items()
            if before.get(name) != value
        ]
        if differing:
            message = f"{out} is of {'; '.join(differing)}: use another --out"
            raise ValueError(message)
        return cls(out, settings, record["rows"]["runs"], record["rows"]["finished"], name)

    def run(self, fleet: str, work: str, rate: float, seed: int) -> Row | None:
        """That run, if it is here."""
        asked = fleet, work, rate, seed
        named = ("fleet", "workload", "rate", "seed")
        return next((run for run in self.runs if tuple(run[name] for name in named) == asked), None)

    def add(self, run: Row) -> Row:
        """One more run."""
        with self.lock:
            self.runs.append(run)
            self._write()
        return run

    def finish(self, fleet: str, work: str) -> None:
        """All runs of a fleet under a workload are here; the second fleet's decide who wins."""
        with self.lock:
            self.finished += [] if [fleet, work] in self.finished else [[fleet, work]]
            if work in self.summary():
                print(self.summary()[work]["verdict"], flush=True)
            print(self._write(), flush=True)

    def summary(self) -> dict[str, Any]:
        """Who wins each workload that both fleets have finished."""
        works = dict.fromkeys(work for _, work in self.finished)
        both = [work for work in works if all([fleet, work] in self.finished for fleet in FLEETS)]
        return {work: summarised(work, self.runs) for work in both}

    def _write(self) -> Path:
        shown = {"summary": self.summary(), "finished": self.finished, "runs": self.runs}
        return write_result(self.name, shown, out=self.out, **self.settings)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0, help="arrivals of one run last so long")
    parser.add_argument("--seeds", type=int, default=2, help="runs at every rate")
    names = [work.name for work in WORKLOADS]
    parser.add_argument("--fronts", type=int, default=4, help="processes that answer HTTP, of each fleet")
    parser.add_argument("--clients", type=int, help="processes that load a fleet; 4, --small 1")
    parser.add_argument("--late-planning-ms", type=float, help="of every instance; at once without it")
    parser.add_argument("--fleets", nargs="+", choices=list(FLEETS), default=list(FLEETS))
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--rates", type=float, nargs="+", help="to climb, instead of a workload's own")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path, help="folder for every scheduler's calls, by fleet")
    words = parser.parse_args()
    words.clients = words.clients or (1 if words.small else 4)
    return words


def serve_all(
    fleet: str, works: list[Workload], model: Path, gpus: str, words: argparse.Namespace, found: Found
) -> None:
    """Start a fleet on these GPUs and offer it each workload that it has not finished."""
    works = [work for work in works if [fleet, work.name] not in found.finished]
    if not works:
        return
    prefill, decode = FLEETS[fleet]
    serve = server_words(model, small=words.small, fronts=words.fronts) + fleet_words(fleet)
    if words.late_planning_ms is not None:
        serve += ["--late-planning-ms", str(words.late_planning_ms)]
    if words.record is not None:
        serve += ["--record", str(words.record / f"{prefill}P{decode}D")]
    log = model.parent / f"{prefill}-{decode}.log"
    with serving(serve, log, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}) as server:
        for work in works:

            def offer(rate: float, work: Workload = work) -> list[Row]:
                return [
                    found.run(fleet, work.name, rate, seed)
                    or found.add(loaded(fleet, server.port, work, rate, seed, words))
                    for seed in range(words.seeds)
                ]

            climb(work.rates, offer)
            found.finish(fleet, work.name)
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
    print(f"{fleet}: {len(warnings)} warnings", *warnings[:5], sep="\n  ", flush=True)


def server_words(model: Path, *, small: bool, fronts: int) -> list[str]:
    """What every server is started with: no prefix hits, for every rate draws the same prompts."""
    words = [str(model), *DUMMY, *QUIET, "--no-enable-prefix-caching", "--api-server-count", str(fronts)]
    words += ["--max-num-seqs", "8" if small else str(SEQUENCES), "--gpu-memory-utilization", "0.85"]
    return [*words, "--max-num-batched-tokens", "256" if small else "4096"]


def fleet_words(fleet: str) -> list[str]:
    """How many instances of each kind; nothing for a single server, which is no fleet."""
    if fleet not in FLEETS:
        return []
    prefill, decode = FLEETS[fleet]
    return ["--prefill", prefill, "--decode", decode]


def climb(rates: Sequence[float], offer: Callable[[float], list[Row]]) -> list[Row]:
    """Offer rising rates until one fails, then halve the gap below it; all runs, by rate."""
    rows: list[Row] = []
    met, failed = 0.0, 0.0
    for rate in rates:
        rows += offer(rate)
        if attained(rows, rate) < ATTAINMENT:
            failed = rate
            break
        met = rate
    for _ in range(HALVINGS if failed else 0):
        middle = (met + failed) / 2
        rows += offer(middle)
        met, failed = (middle, failed) if attained(rows, middle) >= ATTAINMENT else (met, middle)
    return sorted(rows, key=lambda row: (row["rate"], row["seed"]))


def attained(rows: Sequence[Row], rate: float) -> float:
    """Share of requests that met both targets at a rate, over all seeds."""
    return mean(row["attainment"] or 0.0 for row in rows if row["rate"] == rate)


def loaded(fleet: str, port: int, work: Workload, rate: float, seed: int, words: argparse.Namespace) -> Row:
    """One run at a rate. Raises: RuntimeError in the client's words when it wrote nothing."""
    requests = max(4, round(rate * words.seconds * work.spans))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "benthic", "bench", "serve", "--port", str(port), "--ignore-eos"),
            *("--random-input-len", str(work.prompt), "--random-output-len", str(work.output)),
            *("--vocab-size", str(shape(small=words.small).vocab_size), "--seed", str(seed)),
            *("--num-prompts", str(requests), "--request-rate", str(rate)),
            *("--num-clients", str(words.clients)),
            *("--num-warmups", "4", "--result", str(result), "--max-client-lag", "100"),
            "--save-detailed",
            *("--goodput", f"ttft:{work.ttft}", f"tpot:{work.tpot}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not result.exists():
            message = f"{fleet}, {work.name} at {rate}/s: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            raise RuntimeError(message)
        run = counted(json.loads(result.read_text())["runs"][0], work.ttft)
    print(fleet, work.name, rate, f"seed {seed}", {key: run.get(key) for key in SHOWN}, flush=True)
    return {"fleet": fleet, "workload": work.name, "rate": rate, "seed": seed, **run}


def counted(run: Row, ttft: float) -> Row:
    """A run without the times of its requests: `attained_at` has the share that met each of `TPOTS`."""
    names = ("ttfts", "e2els", "output_lens")
    first, last, tokens = ([each or 0.0 for each in run[name]] for name in names)
    in_time = [
        1e3 * (end - start) / max(1, count - 1) if 0.0 < start <= ttft / 1e3 else math.inf
        for start, end, count in zip(first, last, tokens, strict=True)
    ]
    attained_at = {str(tpot): sum(each <= tpot for each in in_time) / len(in_time) for tpot in TPOTS}
    kept = {name: value for name, value in run.items() if name not in DETAILS}
    return kept | {"attained_at": attained_at}


def summarised(work: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Goodput in requests a second and GPU of each fleet, by seed, and who wins.

    A fleet that met its targets at every rate has a lower bound. The ratio is that of the means over seeds,
    and left out where a side is a lower bound or zero.
    """
    runs = {fleet: [r for r in rows if (r["workload"], r["fleet"]) == (work, fleet)] for fleet in FLEETS}
    by_seed = {
        fleet: [goodput([r for r in each if r["seed"] == seed]) / 2 for seed in seeds(each)]
        for fleet, each in runs.items()
    }
    bounds = [
        fleet
        for fleet, each in runs.items()
        if min(attained(each, rate) for rate in {row["rate"] for row in each}) >= ATTAINMENT
    ]
    apart, together = (mean(by_seed[fleet]) for fleet in FLEETS)
    return {
        "requests_per_second_per_gpu": {fleet: mean(each) for fleet, each in by_seed.items()},
        "by_seed": by_seed,
        "lower_bounds": bounds,
        "ratio": apart / together if together and not bounds else None,
        "by_tpot_ms": {
            str(tpot): {fleet: under(each, tpot) for fleet, each in runs.items()}
            for tpot in (TPOTS if all("attained_at" in run for run in rows) else ())
        },
        "winner": winner(by_seed, bounds),
        "verdict": verdict(work, by_seed, bounds),
    }


def under(rows: Sequence[Row], tpot: float) -> float:
    """Requests a second and GPU of runs at rising rates, all seeds together, with another target a token."""
    rates = sorted({row["rate"] for row in rows})
    shares = {
        rate: mean(row["attained_at"][str(tpot)] for row in rows if row["rate"] == rate) for rate in rates
    }
    return goodput([{"rate": rate, "attainment": share} for rate, share in shares.items()]) / 2


def seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds of these runs."""
    return sorted({row["seed"] for row in rows})


def winner(by_seed: dict[str, list[float]], bounds: Sequence[str]) -> str | None:
    """The fleet whose worst seed is above the other's best; None when neither, or when nothing bounds it."""
    for mine, other in (tuple(FLEETS), tuple(FLEETS)[::-1]):
        if other not in bounds and min(by_seed[mine]) > max(by_seed[other]):
            return mine
    return None


def verdict(work: str, by_seed: dict[str, list[float]], bounds: Sequence[str]) -> str:
    """One line for people."""
    sides = [
        f"{fleet} {'>= ' if fleet in bounds else ''}{mean(each):.2f} ({min(each):.2f} to {max(each):.2f})"
        for fleet, each in by_seed.items()
    ]
    best = winner(by_seed, bounds)
    says = f"{best} wins" if best else "neither wins beyond its seeds and rates"
    return f"{work}: {says}: {', '.join(sides)} requests/s per GPU"


def goodput(rows: Sequence[Row]) -> float:
    """The highest rate up to which `ATTAINMENT` holds, interpolated to where the line crosses it."""
    best, before = 0.0, (0.0, 1.0)
    for row in sorted(rows, key=lambda row: row["rate"]):
        here = (row["rate"], row["attainment"] or 0.0)
        if here[1] < ATTAINMENT:
            share = (before[1] - ATTAINMENT) / (before[1] - here[1])
            return before[0] + share * (here[0] - before[0])
        best, before = here[0], here
    return best


if __name__ == "__main__":
    main()
