"""How long `benthic serve` takes from its start to a first token: with nothing compiled, then with all of it.

A checkpoint of random weights in Moonlight's shape is saved once (`--folder`, 32 GB; one in memory stands for
files that were read before). Every run starts the server as a process of its own, waits until it is healthy
and asks for one token of a short prompt. The first run has an empty folder for compiled kernels, the others
what it left.

    python benchmarks/start.py --folder /dev/shm/moonlight
    python benchmarks/start.py --words --quantization fp8      # more words for `benthic serve`
    python benchmarks/start.py --small                         # a rehearsal on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from random_checkpoint import NAME, QUIET, make_folder, shape

from benthic.bench.served import Server, serving
from benthic.model.checkpoint import save_pretrained
from benthic.model.dummy import random_weights

PROMPT = [1 + i % 97 for i in range(64)]


def main() -> None:
    """Save once, start several times; one line a start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the checkpoint, kept and used again")
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="for `benthic serve`")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch) / "model"
        if not folder.exists():
            save(folder, small=asked.small)
        rows = []
        for run in range(asked.runs):
            rows.append({"run": run, **started(folder, Path(scratch), asked.words)})
            print(rows[-1], flush=True)
    print(write_result("start", rows, out=asked.out, small=asked.small, words=asked.words))


def save(folder: Path, *, small: bool) -> None:
    """Weights in bfloat16 (float32 where it is small), with a config and a tokenizer."""
    config = shape(small=small)
    dtype = torch.float32 if small else torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (make_folder(folder, config) / "config.json").unlink()  # what is saved brings its own
    save_pretrained(random_weights(config, device, dtype, seed=0), folder, dtype=dtype)


def started(folder: Path, scratch: Path, words: list[str]) -> dict[str, Any]:
    """Seconds from the start of the process until it is healthy, and until a first token came."""
    env = os.environ | {"TRITON_CACHE_DIR": str(scratch / "compiled")}
    command = [str(folder), "--served-model-name", NAME, *QUIET, *words]
    began = time.perf_counter()
    with serving(command, scratch / "log", env=env, start_s=600) as server:
        healthy = time.perf_counter() - began
        ask(server)
        return {"healthy_s": healthy, "first_token_s": time.perf_counter() - began}


def ask(server: Server) -> None:
    """One token. Raises: HTTPError when the server refuses."""
    body = json.dumps({"model": NAME, "prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(  # noqa: S310 (a server of our own)
        f"{server.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        answer.read()


if __name__ == "__main__":
    main()
