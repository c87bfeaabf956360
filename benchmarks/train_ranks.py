"""Trains one slice of a model on several layouts and compares losses and speed with one rank alone.

    torchrun --nproc-per-node 2 benchmarks/train_ranks.py [--small] [--full] [--layouts pp2 ep2 ...]

A slice of Moonlight's shape (one dense and three mixture layers of full width, vocabulary 32,768) in bfloat16
with float32 masters, on the Python standard library's sources. Every layout trains the same rows from the
same weights. One rank alone goes first; a layout agrees when every loss is within 1 %. Times are medians of
all steps but the first six (of few steps the last three). `--layouts` alone trains one rank. With
`--spans DIR` the slots that ranks measured are written for `benthic draw`.
`--full` trains all 27 layers, which no rank can hold alone,
so its losses are compared with nothing. `--small` rehearses on gloo.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from moonlight_slices import LAYOUTS, moonlight, moonlight_slice, steady, timed
from provenance import write_result
from stdlib_corpus import make_data

from benthic.cli import calibration_host
from benthic.cli.settings import apply
from benthic.parallel.exchange_choice import spots_of
from benthic.parallel.mesh import Mesh
from benthic.parallel.stopwatch import Stopwatch
from benthic.sched.pipeline.spans import write_spans
from benthic.spec import flops, presets
from benthic.spec.layout import Layout
from benthic.train.config import LogConfig, LoopConfig, RunConfig
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from benthic.sched.pipeline.spans import Span
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True)
class Found:
    """What one layout came to on rank 0.

    `retries`: how often no memory was left and the allocator gave back what it kept, which waits for the GPU.
    `loads`: of each mixture, the rows of the busiest expert over the mean, and experts without; both
    are means of the steps that are timed. `host`: seconds of the host for a call, just before, if it launches
    kernels; `cuda_graph`: it does not.
    """

    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    retries: int
    spans: list[Span]
    loads: list[tuple[float, float]]
    host: dict[str, float]
    cuda_graph: bool


def main() -> None:
    """One rank alone, then every layout."""
    words = parse(__doc__ or "")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = "cpu" if words.small else "cuda"
    here = None if words.small else torch.device("cuda", rank)
    if here is not None:
        torch.cuda.set_device(here)
    # with a device groups connect when they are made, as in `benthic train`: after a step memory may be full
    dist.init_process_group("gloo" if words.small else "nccl", device_id=here)
    with tempfile.TemporaryDirectory() as folder:
        data = shared_data(Path(folder), rank, small=words.small)
        config = configured(words, device)
        alone = None
        if rank == 0 and not words.full:
            alone = train(config, Layout(), data, Mesh.of(Layout(), 0), words.steps)
        dist.barrier()
        rows = [row("1 rank", config, 1, alone, alone)] if alone else []
        if rows:
            write(rows, words, config)
        for name in words.layouts:
            layout = LAYOUTS[name]
            found = train(config, layout, data, Mesh.of(layout, rank), words.steps, spans=bool(words.spans))
            if words.spans:
                words.spans.mkdir(parents=True, exist_ok=True)
                (words.spans / f"{name}-rank-{rank}.jsonl").write_text(write_spans(found.spans))
            if rank == 0:  # after each layout, so that one that fails costs only itself
                rows.append(row(name, config, ranks, found, alone or found))
                write(rows, words, config)
    dist.destroy_process_group()


def write(rows: list[dict[str, Any]], words: argparse.Namespace, config: RunConfig) -> None:
    """What is known so far."""
    about = "train_full" if words.full else "train_ranks"
    said = {"steps": words.steps, "config": config.model.name, "set": words.set}
    write_result(about, rows, out=words.out, **said)


def parse(about: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--set", action="append", default=[], help="a config field, as `benthic train` takes")
    parser.add_argument("--spans", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def shared_data(folder: Path, rank: int, *, small: bool) -> Path:
    """Built by rank 0, found by all."""
    where: list[Any] = [None]
    if rank == 0:
        where[0] = make_data(folder, 512 if small else 4096, parts=("json", "email") if small else (".",))
    dist.broadcast_object_list(where)
    return Path(where[0])


def configured(words: argparse.Namespace, device: str) -> RunConfig:
    """The model and its steps."""
    rows, seq_len = (2, 32) if words.small else (1, 4096)
    config = RunConfig(
        model=model_of(words),
        train=LoopConfig(
            steps=words.steps, seq_len=seq_len, local_batch_size=rows, global_batch_size=8 * rows, lr=3e-4
        ),
        log=LogConfig(tensorboard=False, pictures=False),
        device=device,
        recompute=("attention", "experts") if words.full else (),
    )
    return apply(config, ["optimizer.moment_dtype=bfloat16", "train.warmup_steps=2", *words.set])


def model_of(words: argparse.Namespace) -> ModelConfig:
    """All of Moonlight, its slice, or something small; with the token ids of the tokenizer."""
    if words.small:
        return dataclasses.replace(presets.get("nano"), num_hidden_layers=4, vocab_size=512)
    return moonlight() if words.full else moonlight_slice()


def resolved(config: RunConfig, layout: Layout, data: Path) -> RunConfig:
    """On a layout, whose ranks all call this."""
    config = dataclasses.replace(config, layout=layout)
    spots = spots_of(None, torch.device(config.device)) if layout.ranks > 1 else None
    return resolve(config, detect(config.device), read_meta(data), ranks=layout.ranks, spots=spots).config


def trainer_of(config: RunConfig, layout: Layout, data: Path, mesh: Mesh) -> Trainer:
    """Of one rank of a layout."""
    shards = TokenShards(data, read_meta(data), "train")
    return Trainer(resolved(config, layout, data), shards, mesh)


def train(
    config: RunConfig, layout: Layout, data: Path, mesh: Mesh, steps: int, *, spans: bool = False
) -> Found:
    """Some steps on one layout; what its host takes for a call is measured before, if it launches kernels."""
    launched = spans or not resolved(config, layout, data).train.cuda_graph
    host = calibration_host.overheads(config.device) if launched and config.device == "cuda" else {}
    free()
    trainer = trainer_of(config, layout, data, mesh)
    trainer.executor.pipeline.stopwatch = Stopwatch(trainer.device) if spans else None
    losses, seconds, counts = [], [], []
    before = torch.cuda.memory_stats().get("num_alloc_retries", 0) if config.device == "cuda" else 0
    for _ in range(steps):
        began = time.perf_counter()
        result = trainer.step()
        losses.append(result.loss)
        seconds.append(time.perf_counter() - began)
        counts.append(list(result.counts.values()))
    measured = trainer.executor.pipeline.spans(steps)
    peak, retries = 0, 0
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        retries = torch.cuda.memory_stats()["num_alloc_retries"] - before
    graph = trainer.recorded and not spans
    trainer.close()
    del trainer
    free()
    loads = [load(torch.stack(of_steps).float()) for of_steps in zip(*counts[timed(steps)], strict=True)]
    return Found(losses, seconds, peak, retries, measured, loads, host, graph)


def free() -> None:
    """What an earlier model has held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load(rows_SE: torch.Tensor) -> tuple[float, float]:
    """The busiest expert's rows over the mean, and experts without, of some steps."""
    busiest_S = rows_SE.amax(1) / rows_SE.mean(1)
    return busiest_S.mean().item(), (rows_SE == 0).sum(1).float().mean().item()


def row(name: str, config: RunConfig, ranks: int, found: Found, alone: Found) -> dict[str, Any]:
    """One line of the table."""
    tokens = int(config.train.global_batch_size) * int(config.train.seq_len)
    step = steady(found.seconds)
    rate = flops.training(config.model, int(config.train.seq_len)).value * tokens / step / ranks
    off = max(abs(a / b - 1.0) for a, b in zip(found.losses, alone.losses, strict=True))
    print(
        f"{name:<14} loss {found.losses[0]:.4f} -> {found.losses[-1]:.4f} (off by {100 * off:.3f} %)  "
        f"{tokens / step:9,.0f} tokens/s  {rate / 1e12:6.1f} TFLOP/s/GPU  "
        f"{found.peak_bytes / 2**30:5.1f} GiB",
        flush=True,
    )
    return {
        "layout": name,
        "ranks": ranks,
        "losses": found.losses,
        "largest_relative_difference": off,
        "step_seconds": step,
        "seconds": found.seconds,
        "tokens_per_second": tokens / step,
        "flops_per_second_per_gpu": rate,
        "peak_bytes": found.peak_bytes,
        "allocation_retries": found.retries,
        "busiest_and_empty_experts": found.loads,
        "host": found.host,
        "cuda_graph": found.cuda_graph,
    }


if __name__ == "__main__":
    main()
