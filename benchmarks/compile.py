"""Training with and without `torch.compile`: `python benchmarks/compile.py [--cpu]`.

The six-layer slice of Moonlight of `train_gpu.py` (four rows of 4,096 tokens), or `tiny` on a CPU. What is
compiled: nothing; the pieces between products, from their definitions (norms, SwiGLU, the balance loss); or
the four phases of every block, where the graph breaks at whatever the compiler cannot follow (sockets that
put weight gradients aside, exchanges). Every line is a process of its own; seconds are medians of the steps
after three, compile time is what the first step takes longer than that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from provenance import write_result
from stdlib_corpus import make_data
from train_gpu import ROWS, model_of

from benthic.cli.settings import apply
from benthic.kernels import ops
from benthic.kernels.reference import balance
from benthic.kernels.reference import norm as definitions
from benthic.model.norm import Norm
from benthic.spec import presets
from benthic.train.config import LogConfig, LoopConfig, RunConfig
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PHASES: Final = ("attention", "dispatch", "experts", "combine")


def main() -> None:
    """Each line in a process of its own, then the table."""
    words = parse()
    if words.one:
        print(json.dumps(line(words)))
        return
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, parts = (2048, ("json", "email")) if words.cpu else (32768, (".",))
        data = make_data(Path(folder), vocabulary, parts=parts)
        rows = [apart(name, data, words) for name in COMPILED]
    where = "cpu" if words.cpu else "gpu"
    write_result(f"compile_{where}", rows, out=words.out, steps=words.steps)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--cpu", action="store_true", help="`tiny` in float32 instead of the slice of Moonlight"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def apart(name: str, data: Path, words: argparse.Namespace) -> dict[str, Any]:
    """One line, printed; what failed is a line too."""
    command = [sys.executable, __file__, "--one", name, "--data", str(data), "--steps", str(words.steps)]
    command += ["--cpu"] if words.cpu else []
    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(data.parent / f"compiled-{name}")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        row = {"compiled": name, "failed": next(w for w in reversed(lines) if "Error" in w)[-300:]}
        print(f"{name:<10} failed: {row['failed']}", flush=True)
        return row
    row = json.loads(done.stdout.strip().splitlines()[-1])
    speed = f"{1e3 * row['seconds']:8.1f} ms a step  {row['tokens_per_second']:9,.0f} tokens/s"
    cost = f"{row['compile_seconds']:6.1f} s to compile {row['graphs']} graphs"
    print(f"{name:<10} loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}  {speed}  {cost}", flush=True)
    return row


def line(words: argparse.Namespace) -> dict[str, Any]:
    """Train, and say how fast."""
    config = run_of(words)
    meta = read_meta(words.data)
    resolved = resolve(config, detect(config.device), meta).config
    trainer = Trainer(resolved, TokenShards(words.data, meta, "train"))
    COMPILED[words.one](trainer)
    found, seconds = [], []
    for _ in range(words.steps):
        began = time.perf_counter()
        found.append(trainer.step().loss)  # reads the loss, so the device is done
        if not words.cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[3:])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: SLF001 (no public count)
    return {
        "compiled": words.one,
        "losses": found,
        "seconds": median,
        "tokens_per_second": ROWS * config.train.seq_len / median,
        "compile_seconds": max(0.0, sum(seconds[:3]) - 3 * median),
        "graphs": graphs,
        "peak_bytes": 0 if words.cpu else torch.cuda.max_memory_allocated(),
    }


def run_of(words: argparse.Namespace) -> RunConfig:
    """The slice in bfloat16, or `tiny` in float32."""
    tiny = dataclasses.replace(presets.get("tiny"), vocab_size=2048, bos_token_id=0, eos_token_id=1)
    loop = LoopConfig(
        steps=words.steps,
        seq_len=128 if words.cpu else 4096,
        local_batch_size=ROWS,
        global_batch_size=ROWS,
        lr=1e-4,
        schedule="constant",
    )
    config = RunConfig(
        model=tiny if words.cpu else model_of(argparse.Namespace(small=False)),
        train=loop,
        log=LogConfig(tensorboard=False, pictures=False),
        device="cpu" if words.cpu else "cuda",
    )
    return apply(
        config, ["optimizer.moment_dtype=bfloat16", "data.mask_documents=false", "train.cuda_graph=false"]
    )


def nothing(trainer: Trainer) -> None:
    """As it is."""


def pieces(trainer: Trainer) -> None:  # noqa: ARG001 (every network's)
    """Norms, SwiGLU and the balance loss, each from its definition."""
    norm, add_norm = torch.compile(definitions.rms_norm), torch.compile(definitions.add_rms_norm)

    def after_adding(self: Norm, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x_TD, residual_TD, self.weight, self.eps)

    setattr(Norm, "forward", lambda self, x: norm(x, self.weight, self.eps))  # noqa: B010
    setattr(Norm, "after_adding", after_adding)  # noqa: B010
    setattr(ops, "swiglu", torch.compile(definitions.swiglu))  # noqa: B010
    setattr(ops, "swiglu_gradient", torch.compile(definitions.swiglu_gradient))  # noqa: B010
    setattr(ops, "balance_loss", torch.compile(balance.balance_loss))  # noqa: B010


def blocks(trainer: Trainer) -> None:
    """The phases of every block."""
    for block in trainer.model.blocks:
        for phase in PHASES:
            setattr(block, phase, torch.compile(getattr(block, phase), dynamic=False))


COMPILED: Final[dict[str, Callable[[Trainer], None]]] = {
    "nothing": nothing,
    "pieces": pieces,
    "blocks": blocks,
}


if __name__ == "__main__":
    main()
