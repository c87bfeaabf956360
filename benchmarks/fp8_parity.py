"""FP8 against bfloat16 training: pairs of runs of one mixture-of-experts model on real text.

    python benchmarks/fp8_parity.py [--data DIR] [--steps 1000] [--seeds 4] [--set train.lr=1e-3 ...]
    python benchmarks/fp8_parity.py --smoke        # small sizes on a CPU, to see that the script works

Both runs of a pair have the same rows, settings and initial weights (up to the rounding of bfloat16 weights);
moments are bfloat16 in both, so that only the numbers of the linear layers differ. After some hundred steps
one pair's difference is chance, since any rounding sends a run elsewhere, so the difference is read from
several seeds: its mean with a 95 % interval (Student's t over seeds), beside how far bfloat16 runs of two
seeds are apart. The DeepSeek-V3 report (section 3.3) gives less than 0.25 % of relative loss error.
Writes benchmarks/results/fp8_parity.json and docs/pictures/fp8_parity.svg|png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from interval import STUDENT, mean_over_seeds
from provenance import ROOT, write_result
from stdlib_corpus import make_data

from benthic.cli.settings import apply
from benthic.kernels import ops
from benthic.spec.model import ModelConfig
from benthic.train.config import EvaluateConfig, LogConfig, LoopConfig, LossConfig, RunConfig
from benthic.train.curve import Curve
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.evaluate import evaluate
from benthic.train.hardware import detect
from benthic.train.memory import measure
from benthic.train.pictures import new_figure, save, smooth, tidy
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benthic.train.hardware import HardwareFacts

BLUE, ORANGE, GREY = "#1f6fb2", "#d9822b", "#8a8f98"
PACKAGES = ("torch", "numpy", "transformers")
"""Beside the standard library, whose 3 M tokens a thousand steps would read almost three times."""
MEASURES = {
    "whole_run": lambda row: statistics.mean(row["loss_by_step"]),
    "last_fifth": lambda row: statistics.mean(row["loss_by_step"][-max(1, len(row["loss_by_step"]) // 5) :]),
    "held_out": lambda row: row["held_out"]["loss"],
}
"""Losses that are compared, in nats per token."""
BFLOAT16 = ("precision.weights=bfloat16", "precision.matmul=bfloat16")
FP8 = ("precision.weights=fp8", "precision.matmul=fp8")

MODEL = ModelConfig(
    name="parity-118m",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.0,
    max_position_embeddings=1024,
    num_nextn_predict_layers=1,
    initializer_range=0.02,
)
SMALL = replace(
    MODEL,
    name="parity-smoke",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    n_group=1,
    topk_group=1,
)


@dataclass(frozen=True)
class Case:
    """One of the runs that are compared."""

    name: str
    settings: tuple[str, ...]
    seed: int


def main() -> None:
    """Make the data unless given, run all cases, print, write, draw."""
    words = parse()
    config = configured(words)
    facts = detect("cpu" if words.smoke else "auto")
    kinds = (("bfloat16", BFLOAT16), ("fp8", FP8))
    cases = [Case(*kind, seed) for seed in range(words.seeds) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        parts = ("json", "email") if words.smoke else (".",)
        data = words.data or make_data(
            Path(folder), config.model.vocab_size, parts=parts, packages=() if words.smoke else PACKAGES
        )
        rows = side_by_side(cases, data, config, facts)
    found = summary(rows)
    for row in rows:
        print(line(row))
    for name, words_of in found.items():
        print(f"{name}: {words_of}")
    out = Path(tempfile.gettempdir()) if words.smoke else None
    path = write_result(
        "fp8_parity",
        {"summary": found, "runs": rows},
        out=out and out / "fp8_parity.json",
        steps=words.steps,
        seeds=words.seeds,
        overrides=words.set,
    )
    stem = (out or ROOT / "docs" / "pictures") / "fp8_parity"
    print(f"wrote {path} and {', '.join(map(str, draw(rows, stem)))}")


def side_by_side(
    cases: list[Case], data: Path, config: RunConfig, facts: HardwareFacts
) -> list[dict[str, Any]]:
    """Every case in a process of its own at the same time, dealt to the GPUs: a small model leaves room."""
    if facts.device == "cpu":
        return [run(case, data, config, facts) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(cases), mp_context=context) as pool:
        began = [pool.submit(run, case, data, config, facts, i) for i, case in enumerate(cases)]
        return [future.result() for future in began]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="dataset folder (default: made from the standard library)")
    parser.add_argument("--steps", type=int, default=None, help="default: 1000, with --smoke 4")
    parser.add_argument("--seeds", type=int, default=4, choices=(1, *STUDENT), help="pairs of runs")
    parser.add_argument("--smoke", action="store_true", help="small model, few steps, CPU, results to /tmp")
    parser.add_argument("--set", action="append", default=[], help="override of the config")
    words = parser.parse_args()
    words.steps = words.steps or (4 if words.smoke else 1000)
    return words


def configured(words: argparse.Namespace) -> RunConfig:
    """What all runs share."""
    rows, seq_len = (2, 64) if words.smoke else (8, 1024)
    config = RunConfig(
        model=SMALL if words.smoke else MODEL,
        train=LoopConfig(
            steps=words.steps,
            seq_len=seq_len,
            local_batch_size=rows,
            global_batch_size=rows,
            lr=1e-3,
            final_lr=0.1,
            warmup_steps=words.steps // 20,
        ),
        loss=LossConfig(mtp_weight=Curve.constant(0.1), bias_update_speed=Curve.constant(1e-3)),
        evaluate=EvaluateConfig(max_tokens=512 if words.smoke else 100_000),
        log=LogConfig(tensorboard=False, pictures=False),
    )
    return apply(config, ["optimizer.moment_dtype=bfloat16", *words.set])


def run(case: Case, data: Path, config: RunConfig, facts: HardwareFacts, number: int = 0) -> dict[str, Any]:
    """Train one case and measure."""
    if facts.device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    meta = read_meta(data)
    settings = [*case.settings, f"train.seed={case.seed}"]
    resolved = resolve(apply(config, settings), facts, meta).config
    trainer = Trainer(resolved, TokenShards(data, meta, "train"))
    if facts.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    results, seconds = [], []
    for _ in range(config.train.steps):
        start = time.perf_counter()
        results.append(trainer.step())  # waits for the device: the loss is read
        seconds.append(time.perf_counter() - start)
        if results[-1].step % 100 == 0:
            print(f"  {case.name}, seed {case.seed}: step {results[-1].step} loss {results[-1].loss:.4f}")
    held_out = evaluate(
        trainer.executor.score,
        TokenShards(data, meta, "held_out"),
        seq_len=int(resolved.train.seq_len),
        rows=8,
        max_tokens=config.evaluate.max_tokens,
        mask_documents=True,
        mtp_depth=config.model.num_nextn_predict_layers,
    )
    kept = measure(trainer)
    steady = float(np.median(seconds[len(seconds) // 4 :]))
    return {
        "name": case.name,
        "seed": case.seed,
        "parameters": kept.parameters,
        "tokens": results[-1].tokens,
        "loss_by_step": [round(r.loss, 6) for r in results],
        "grad_norm_by_step": [round(r.grad_norm, 5) for r in results],
        "held_out": asdict(held_out),
        "seconds": sum(seconds),
        "tokens_per_second": results[-1].step_tokens / steady,
        "bytes_per_parameter": kept.per_parameter,
        "kept_bytes": kept.terms,
        "peak_memory": torch.cuda.max_memory_allocated() if facts.device == "cuda" else None,
        "products": products(facts.device) if case.settings == FP8 else {},
    }


def products(device: str) -> dict[str, str]:
    """What the op table chooses for FP8 here."""
    return {c.op: c.implementation for c in ops.explain(device, torch.bfloat16) if "fp8" in c.op}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative differences of the loss: FP8 from bfloat16 by seed and on average; bfloat16 from its mean."""
    exact, narrow = ([r for r in rows if r["name"] == name] for name in ("bfloat16", "fp8"))
    found: dict[str, Any] = {}
    for key, of in MEASURES.items():
        pairs = [of(two) / of(one) - 1.0 for one, two in zip(exact, narrow, strict=True)]
        losses = [of(row) for row in exact]
        found[key] = {
            "fp8_against_bfloat16": [round(pair, 6) for pair in pairs],
            **mean_over_seeds(pairs, 6),
            "bfloat16_across_seeds": round((max(losses) - min(losses)) / statistics.mean(losses), 6),
        }
    return found


def line(row: dict[str, Any]) -> str:
    """One run in words."""
    return (
        f"{row['name']:<9} seed {row['seed']} {row['parameters'] / 1e6:.1f} M parameters  "
        f"last fifth {MEASURES['last_fifth'](row):.4f}  held-out {row['held_out']['loss']:.4f}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  {row['bytes_per_parameter']:.2f} B/parameter"
    )


def draw(rows: list[dict[str, Any]], stem: Path) -> list[Path]:
    """Left: smoothed loss of every run. Right: relative differences of pairs and of bfloat16 seeds."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(10.5, 4.0)
    curve, apart = figure.subplots(1, 2)
    exact, narrow = (
        [smooth(r["loss_by_step"]) for r in rows if r["name"] == name] for name in ("bfloat16", "fp8")
    )
    pairs = [100 * (two / one - 1.0) for one, two in zip(exact, narrow, strict=True)]
    seeds = [100 * (other / exact[0] - 1.0) for other in exact[1:]]
    bundle(curve, exact, BLUE, "bfloat16")
    bundle(curve, narrow, ORANGE, "FP8")
    bundle(apart, seeds, GREY, "two seeds of bfloat16")
    bundle(apart, pairs, ORANGE, "FP8 and bfloat16 of one seed")
    bundle(apart, [np.mean(pairs, axis=0)], "black", f"mean of {len(pairs)} seeds")
    apart.axhspan(-0.25, 0.25, color="black", alpha=0.06, linewidth=0)
    apart.axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    tidy(curve, "step", "loss (nats per token)")
    tidy(apart, "step", "smoothed loss against bfloat16's, %")
    for axes in (curve, apart):
        axes.legend(frameon=False)
    return save(figure, stem)


def bundle(axes: Axes, curves: list[np.ndarray], colour: str, name: str) -> None:
    """Curves of one kind under one name."""
    for i, values in enumerate(curves):
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.1, label=None if i else name)


if __name__ == "__main__":
    main()
