"""Loss-free balancing on and off: pairs of runs from one seed on the Python standard library's sources.

    python benchmarks/balance.py [--seeds 1] [--data DIR] [--speed 0.003] [--set train.steps=400 ...]

The runs of a pair have the same weights, rows and settings and no balance loss (alpha = 0); only gamma
differs. Two runs that differ in nothing but the rounding of sums end 0.01 nats apart, so what balancing costs
or gains is read from several seeds: the mean difference with its 95 % interval (Student's t over seeds).
On a GPU (`--set device=cuda`) all runs go side by side. MaxVio
is max(load) / mean(load) - 1 of a layer (Wang et al., 2024): "global" from the loads summed over the last
quarter of the run, "batch" the mean over that quarter's steps of each step's own; both averaged over layers.
The picture is of the first seed.
Writes benchmarks/results/balance.json and docs/pictures/balance.svg|png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from interval import STUDENT, mean_over_seeds
from provenance import ROOT, write_result
from stdlib_corpus import make_data

from benthic.cli.settings import apply
from benthic.train import recipes
from benthic.train.balance import max_vio
from benthic.train.data.shards import Meta, TokenShards, read_meta
from benthic.train.evaluate import evaluate
from benthic.train.hardware import detect
from benthic.train.pictures import new_figure, save, smooth, tidy
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from benthic.train.config import RunConfig

BLUE, ORANGE = "#1f6fb2", "#d9822b"


def main() -> None:
    """Make the data unless given, run all, print, write, draw."""
    words = parse()
    cases = [(seed, speed) for seed in range(words.seeds) for speed in (0.0, words.speed)]
    with tempfile.TemporaryDirectory() as folder:
        data = words.data or make_data(Path(folder), recipes.tiny_cpu().model.vocab_size)
        rows = all_of(cases, data, words)
    for row in rows:
        print(
            f"seed {row['seed']} gamma {row['speed']:<6} MaxVio global {row['max_vio_global']:.3f}  "
            f"batch {row['max_vio_batch']:.3f}  held-out loss {row['held_out']['loss']:.4f}  "
            f"{row['seconds']:.0f} s"
        )
    summary = summarised(rows[::2], rows[1::2])
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    path = write_result("balance", rows, out=words.out, summary=summary, overrides=words.set)
    pictures = draw(rows[0], rows[1], (words.out.parent if words.out else ROOT / "docs/pictures") / "balance")
    print(f"wrote {path} and {', '.join(map(str, pictures))}")


def all_of(cases: list[tuple[int, float]], data: Path, words: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case: one after the other on a CPU, side by side on a GPU, which a small model does not fill."""
    if apply(recipes.tiny_cpu(), words.set).device == "cpu":
        return [run(data, words, *case) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(cases), mp_context=context) as pool:
        began = [pool.submit(run, data, words, *case) for case in cases]
        return [future.result() for future in began]


def summarised(off: list[dict[str, Any]], on: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of MaxVio by seed, and how much more held-out loss there is with the bias on."""
    pairs = list(zip(off, on, strict=True))
    more = [b["held_out"]["loss"] - a["held_out"]["loss"] for a, b in pairs]
    return {
        **{
            f"{kind}_on_over_off": [round(b[kind] / a[kind], 4) for a, b in pairs]
            for kind in ("max_vio_global", "max_vio_batch")
        },
        "held_out_loss_on_minus_off": [round(each, 5) for each in more],
        **mean_over_seeds(more, 5),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="dataset folder (default: made from the standard library)")
    parser.add_argument("--seeds", type=int, default=1, choices=(1, *STUDENT), help="pairs of runs")
    parser.add_argument("--speed", type=float, default=0.003, help="gamma of the runs with the bias on")
    parser.add_argument("--set", action="append", default=[], help="override of the tiny_cpu recipe")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run(data: Path, words: argparse.Namespace, seed: int, speed: float) -> dict[str, Any]:
    """Train with one speed of the bias and measure."""
    start, meta = time.perf_counter(), read_meta(data)
    config = config_of(words, meta, seed, speed)
    trainer = Trainer(config, TokenShards(data, meta, "train"))
    counts: list[dict[int, torch.Tensor]] = []
    losses: list[float] = []
    for _ in range(config.train.steps):
        result = trainer.step()
        counts.append(result.counts)
        losses.append(result.loss)
        if result.step % 100 == 0:
            vio = batch_vio(result.counts)
            print(
                f"  seed {seed} gamma {speed}: step {result.step} loss {result.loss:.4f} MaxVio {vio:.3f}",
                flush=True,
            )
    last = counts[-max(1, config.train.steps // 4) :]
    held_out = evaluate(
        trainer.executor.score,
        TokenShards(data, meta, "held_out"),
        seq_len=int(config.train.seq_len),
        rows=8,
        max_tokens=0,
        mask_documents=config.data.mask_documents,
        mtp_depth=config.model.num_nextn_predict_layers,
    )
    return {
        "seed": seed,
        "speed": speed,
        "max_vio_global": float(np.mean(list(global_vio(last).values()))),
        "max_vio_batch": float(np.mean([batch_vio(count) for count in last])),
        "max_vio_global_by_layer": global_vio(last),
        "max_vio_by_step": [round(batch_vio(count), 4) for count in counts],
        "loss_by_step": [round(loss, 5) for loss in losses],
        "load_last_quarter": {layer: summed(last, layer).tolist() for layer in last[0]},
        "held_out": asdict(held_out),
        "seconds": time.perf_counter() - start,
    }


def config_of(words: argparse.Namespace, meta: Meta, seed: int, speed: float) -> RunConfig:
    """The tiny_cpu recipe without a balance loss."""
    settings = [
        *words.set,
        f"train.seed={seed}",
        "loss.balance_alpha=0",
        f"loss.bias_update_speed={speed}",
    ]
    config = apply(recipes.tiny_cpu(), settings)
    return resolve(config, detect(config.device), meta).config


def summed(counts: list[dict[int, torch.Tensor]], layer: int) -> torch.Tensor:
    """Loads of a layer over several steps."""
    return torch.stack([count[layer] for count in counts]).sum(0)


def global_vio(counts: list[dict[int, torch.Tensor]]) -> dict[int, float]:
    """MaxVio of the loads summed over several steps, by layer."""
    return {layer: max_vio(summed(counts, layer)) for layer in counts[0]}


def batch_vio(counts: dict[int, torch.Tensor]) -> float:
    """MaxVio of one step, averaged over the layers."""
    return float(np.mean([max_vio(count) for count in counts.values()]))


def draw(off: dict[str, Any], on: dict[str, Any], stem: Path) -> list[Path]:
    """Left: MaxVio of every step. Right: load of each expert over the mean, last quarter of the run."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(10.5, 4.0)
    curve, bars = figure.subplots(1, 2)
    for row, colour, name in ((off, ORANGE, "without"), (on, BLUE, f"with (gamma = {on['speed']})")):
        values = row["max_vio_by_step"]
        steps = range(1, len(values) + 1)
        curve.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        curve.plot(steps, smooth(values), color=colour, linewidth=1.8, label=f"{name} bias update")
        loads = np.array(list(row["load_last_quarter"].values()), float)
        share = np.sort(loads / loads.mean(1, keepdims=True), axis=1)[:, ::-1]
        ranks = np.arange(1, share.shape[1] + 1)
        bars.plot(ranks, share.T, color=colour, alpha=0.35, linewidth=1.0)
        loss = row["held_out"]["loss"]
        label = f"{name}: MaxVio {row['max_vio_global']:.2f}, held-out loss {loss:.3f}"
        bars.plot(ranks, share.mean(0), color=colour, linewidth=2.2, label=label)
    curve.axvspan(0.75 * len(steps), len(steps), color="black", alpha=0.05, linewidth=0)
    curve.set_ylim(bottom=0.0)
    tidy(curve, "step", "MaxVio of one step, mean of the layers")
    tidy(bars, "expert, fullest first", "load / mean, last quarter of the run")
    bars.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    for axes in (curve, bars):
        axes.legend(frameon=False)
    return save(figure, stem)


if __name__ == "__main__":
    main()
