"""Prefill and decode on one GPU each beside two GPUs that do both: goodput curves of the same requests.

Both fleets run `benthic serve` with random weights at the shape of Moonlight-16B and are loaded by `benthic
bench serve` at the same rates: a prefill-heavy, a balanced and a decode-heavy workload. A request counts when
it meets both targets; goodput is the highest offered rate (interpolated) that 90 % of requests meet.

    python benchmarks/disaggregate.py            # two GPUs, or four to measure both fleets at once
    python benchmarks/disaggregate.py --small    # tiny, on a CPU: a rehearsal
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from provenance import write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benthic.spec import hf, presets

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

FLEETS = {"1P1D": ("1", "1"), "2 colocated": ("0", "2")}
ATTAINMENT = 0.9


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, targets in ms, rates in requests a second for the two GPUs."""

    name: str
    prompt: int
    output: int
    ttft: int
    tpot: int
    rates: tuple[float, ...]


WORKLOADS = (
    Workload("prefill-heavy", 4096, 64, 1000, 30, (8.0, 14.0, 20.0, 26.0)),
    Workload("balanced", 2048, 256, 600, 30, (10.0, 18.0, 26.0, 34.0)),
    Workload("decode-heavy", 512, 512, 300, 30, (8.0, 16.0, 24.0, 32.0)),
)
SMALL = tuple(
    replace(work, prompt=work.prompt // 64, output=8, ttft=2000, tpot=500, rates=(2.0, 4.0))
    for work in WORKLOADS
)


def main() -> None:
    """Both fleets, side by side where there are four GPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=12.0, help="arrivals of one run last so long")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    gpus = torch.cuda.device_count()
    apart = gpus >= 4
    with tempfile.TemporaryDirectory() as temporary:
        model = model_folder(Path(temporary) / "model", small=words.small)
        jobs = [
            (name, model, ",".join(map(str, range(2 * i, 2 * i + 2))) if apart else "0,1", words)
            for i, name in enumerate(FLEETS)
        ]
        with ThreadPoolExecutor(2 if apart else 1) as pool:
            measured = list(pool.map(lambda job: fleet_rows(*job), jobs))
    rows = [row for found in measured for row in found]
    summary = summarised(rows)
    print(json.dumps(summary, indent=1))
    settings = {"small": words.small, "seconds": words.seconds, "gpus_apart": apart}
    print(write_result("disaggregate", {"summary": summary, "runs": rows}, out=words.out, **settings))


def shape(*, small: bool) -> ModelConfig:
    """The model that is served."""
    return replace(presets.get("nano" if small else "moonlight-16b-a3b"), max_position_embeddings=8192)


def model_folder(folder: Path, *, small: bool) -> Path:
    """A config and a tokenizer with a word for every token of the model."""
    folder.mkdir(parents=True)
    config = shape(small=small)
    (folder / "config.json").write_text(hf.dumps(config))
    words = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))  # noqa: S106 (a word, not a secret)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def fleet_rows(name: str, model: Path, gpus: str, words: argparse.Namespace) -> list[dict[str, Any]]:
    """Start one fleet, load it with every workload, stop it."""
    port = free_port()
    prefill, decode = FLEETS[name]
    sizes = ["--max-num-seqs", "8"] if words.small else ["--max-num-seqs", "256"]
    command = [
        *(
            sys.executable,
            "-m",
            "benthic",
            "serve",
            str(model),
            "--load-format",
            "dummy",
            "--port",
            str(port),
        ),
        *("--prefill", prefill, "--decode", decode, "--disable-log-requests", "--disable-uvicorn-access-log"),
        *(*sizes, "--max-num-batched-tokens", "256" if words.small else "4096"),
        *("--gpu-memory-utilization", "0.85", "--served-model-name", "m"),
    ]
    log = model.parent / f"{prefill}-{decode}.log"
    with log.open("w") as printed:
        server = subprocess.Popen(
            command, stdout=printed, stderr=printed, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
        )
        try:
            wait_ready(port, server, log)
            return [
                row
                for work in (SMALL if words.small else WORKLOADS)
                for row in loaded(name, port, work, words)
            ]
        finally:
            server.terminate()
            server.wait(60)
            metrics = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
            print(f"{name}: {len(metrics)} warnings", *metrics[:5], sep="\n  ")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_ready(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for /health. Raises: RuntimeError with what the server printed when it ends before."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    message = f"the server did not come up:\n{log.read_text()[-4000:]}"
    raise RuntimeError(message)


def loaded(name: str, port: int, work: Workload, words: argparse.Namespace) -> list[dict[str, Any]]:
    """One run a rate."""
    rows = []
    for rate in work.rates:
        result = Path(tempfile.mkdtemp()) / "result.json"
        count = max(4, round(rate * words.seconds))
        command = [
            *(sys.executable, "-m", "benthic", "bench", "serve", "--port", str(port), "--ignore-eos"),
            *("--random-input-len", str(work.prompt), "--random-output-len", str(work.output)),
            *("--vocab-size", str(shape(small=words.small).vocab_size), "--num-prompts", str(count)),
            *("--request-rate", str(rate), "--num-warmups", "4", "--result", str(result)),
            *("--goodput", f"ttft:{work.ttft}", f"tpot:{work.tpot}", "--max-client-lag", "100"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not result.exists():
            message = f"{name}, {work.name} at {rate}/s: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            raise RuntimeError(message)
        run = json.loads(result.read_text())["runs"][0]
        rows.append({"fleet": name, "workload": work.name, "rate": rate, **run})
        print(name, work.name, rate, {key: run.get(key) for key in SHOWN}, flush=True)
    return rows


SHOWN = ("attainment", "completed", "median_ttft_ms", "p90_ttft_ms", "median_tpot_ms", "p90_tpot_ms")


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Goodput in requests a second and GPU by workload and fleet, and the ratio.

    A fleet that met its targets at every rate has a lower bound; its ratio says so by being left out.
    """
    found: dict[str, Any] = {}
    for work in dict.fromkeys(row["workload"] for row in rows):
        runs = {f: [r for r in rows if (r["workload"], r["fleet"]) == (work, f)] for f in FLEETS}
        mine = {fleet: goodput(each) / 2 for fleet, each in runs.items()}
        unbounded = [f for f, each in runs.items() if min(row["attainment"] for row in each) >= ATTAINMENT]
        ratio = mine["1P1D"] / mine["2 colocated"] if mine["2 colocated"] and not unbounded else None
        found[work] = {
            "requests_per_second_per_gpu": mine,
            "lower_bounds": unbounded,
            "ratio": ratio,
        }
    return found


def goodput(rows: list[dict[str, Any]]) -> float:
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
