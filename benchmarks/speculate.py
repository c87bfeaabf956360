"""Speculation on a trained model: acceptance, tokens/s with and without, and that no greedy token changes.

The model is a checkpoint with prediction modules (`--checkpoint`), or the `tiny` recipe trained here on the
standard library (`--recipe` and `--set` change that: `--set device=cuda`). Prompts are pieces of the
standard library's source. Tokens/s count whole runs of `--tokens` greedy tokens at each batch, prefills
included, through `Engine.step`, over `--groups` batches of different prompts one after another; the best of
`--repeats`.

    python benchmarks/speculate.py                    # trains tiny, then measures
    python benchmarks/speculate.py --checkpoint runs/x/hf --device cuda
    python benchmarks/speculate.py --batch-invariant  # the same tokens in bfloat16 too
    python benchmarks/speculate.py --small            # a rehearsal on a CPU
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import write_result
from stdlib_corpus import make_data
from tokenizers import Tokenizer

from benthic.cli.settings import apply
from benthic.serve.engine import Engine
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.serve.speculative import Speculative
from benthic.train import recipes


def main() -> None:
    """Train unless a checkpoint is given, then run every drafter at every batch."""
    words = parse()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = words.checkpoint or train(words.folder or Path(folder), words)
        rows = measure(checkpoint, words)
    settings = {
        name: getattr(words, name)
        for name in (
            "small",
            "device",
            "dtype",
            "recipe",
            "set",
            "drafts",
            "always",
            "batch_invariant",
            "tokens",
            "repeats",
        )
    }
    print(write_result("speculate", rows, out=words.out, **settings))


def parse() -> argparse.Namespace:
    """Read the command line; `--small` shrinks what was left at its default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, help="where data and run stay (default: nowhere)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--recipe", default="tiny_cpu", help="what to train without a checkpoint")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe")
    parser.add_argument(
        "--always", action="store_true", help="draft in every step, also where it does not pay"
    )
    parser.add_argument(
        "--batch-invariant", action="store_true", help="scores that do not depend on the number of rows"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--drafters", nargs="*", choices=["mtp", "ngram"], default=["mtp", "ngram"])
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--groups", type=int, default=16, help="batches of different prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    if words.small:
        words.set += ["train.steps=60", "evaluate.every=0", "log.pictures=false"]
        words.batches, words.tokens, words.prompts, words.repeats, words.groups = [1, 4], 32, 12, 1, 2
    return words


def train(folder: Path, words: argparse.Namespace) -> Path:
    """Data, a run of the recipe, its exported checkpoint."""
    parts = ("json", "email") if words.small else (".",)
    config = apply(recipes.get(words.recipe), words.set)
    data = make_data(folder, config.model.vocab_size, parts=parts)
    overrides = [word for each in words.set for word in ("--set", each)]
    command = ["train", words.recipe, "--data", str(data), "--run", str(folder / "run"), *overrides]
    subprocess.run([sys.executable, "-m", "benthic", *command], check=True)
    return folder / "run" / "hf"


def measure(checkpoint: Path, words: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each drafter and batch, and one that compares greedy outputs."""
    prompts = make_prompts(checkpoint, words.prompts)
    chosen: dict[str, Speculative | None] = {"none": None}
    for name in words.drafters:
        chosen[name] = Speculative(
            method=name, num_speculative_tokens=words.drafts, adaptive=not words.always
        )
    rows, outputs = [], {}
    for name, speculative in chosen.items():
        engine = make_engine(checkpoint, words, speculative)
        outputs[name] = generate(engine, prompts, words.tokens)[0]
        for batch in words.batches:
            groups = [prompts[at : at + batch] for at in range(0, len(prompts) - batch + 1, batch)]
            found = speed(engine, groups[: words.groups], words)
            rows.append({"drafter": name, "batch": batch, **found})
            print(rows[-1], flush=True)
        del engine  # before the next one asks how much memory is free
        gc.collect()
        torch.cuda.empty_cache()
    plain = {row["batch"]: row["tokens_per_second"] for row in rows if row["drafter"] == "none"}
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / plain[row["batch"]]
    same = {
        name: sum(a == b for a, b in zip(outputs["none"], own, strict=True)) for name, own in outputs.items()
    }
    rows.append({"what": "identical greedy outputs", "prompts": len(prompts), **same})
    print(rows[-1], flush=True)
    return rows


def make_engine(checkpoint: Path, words: argparse.Namespace, speculative: Speculative | None) -> Engine:
    """An engine that differs from the others in its drafter alone."""
    options = EngineOptions(
        device=words.device,
        dtype=words.dtype,
        max_model_len=512,
        max_num_seqs=max(words.batches),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.25,
        cudagraph_capture_sizes=tuple(words.batches),
        speculative=speculative,
        batch_invariant=words.batch_invariant,
    )
    return Engine.from_pretrained(checkpoint, options)


def make_prompts(checkpoint: Path, count: int, length: int = 64) -> list[tuple[int, ...]]:
    """Beginnings of pieces of the standard library's source, in order."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files[:60])
    ids = tokenizer.encode(text).ids
    pieces = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
    return [tuple(piece) for piece in pieces[:: max(1, len(pieces) // count)][:count]]


def generate(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> tuple[list[list[int]], float]:
    """Greedy outputs of all prompts, and the seconds they took together."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    found: dict[str, list[int]] = {}
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(Generate(request_id=str(i), prompt=prompt, params=params))
        found[str(i)] = []
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id].extend(delta.tokens)
    return list(found.values()), time.perf_counter() - began


def speed(engine: Engine, groups: list[list[tuple[int, ...]]], words: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of the best repeat after one to warm up, and what became of the drafts meanwhile."""

    def run() -> float:
        return sum(generate(engine, prompts, words.tokens)[1] for prompts in groups)

    run()
    before, tokens = engine.stats(), sum(map(len, groups)) * words.tokens
    seconds = min(run() for _ in range(words.repeats))
    after = engine.stats()
    drafts, given = after.drafts - before.drafts, after.draft_tokens - before.draft_tokens
    places = zip(after.accepted_at, before.accepted_at, strict=True)
    return {
        "groups": len(groups),
        "tokens_per_second": tokens / seconds,
        "tokens_a_step": words.repeats * tokens / (after.steps - before.steps),
        "rows_with_drafts": drafts,
        "acceptance": (after.accepted_tokens - before.accepted_tokens) / given if given else None,
        "acceptance_by_place": [(a - b) / drafts for a, b in places] if drafts else [],
    }


if __name__ == "__main__":
    main()
