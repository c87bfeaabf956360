"""Decode and prefill on one, two or more GPUs, experts by width or whole, or engines that share experts.

Moonlight's shape. With tensor parallelism one engine has all sequences; with data parallelism ("own
requests") each rank is an engine with its share of them, and a batch is that of all ranks together.

Weights are random and the same whatever the number of ranks, so tokens are compared with those of the first
row too: in bfloat16 a sum over ranks is rounded otherwise, and near ties may fall differently. Every number
goes through `Engine.step`.

    python benchmarks/serve_ranks.py                 # 1 and 2 GPUs, about four minutes
    python benchmarks/serve_ranks.py --ranks 1 2 4 8 --data-ranks 2 4 8
    python benchmarks/serve_ranks.py --small         # on a CPU, tiny: a rehearsal
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from data_ranks import measure_data_ranks, own_options
from provenance import write_result
from serve_gpu import Sizes, decode, requests

from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions
from benthic.serve.spread import SpreadEngine
from benthic.spec import hf, presets


def main() -> None:
    """Measure every layout; write after each, so that a lost run keeps some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data-ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes.small(device) if arguments.small else Sizes(presets.get("moonlight-16b-a3b"), device)
    layouts = [(n, whole) for n in arguments.ranks for whole in ((False, True) if n > 1 else (False,))]
    rows: list[dict[str, Any]] = []
    expected: dict[int, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(hf.dumps(sizes.config))
        for ranks, whole in layouts:
            rows += measure(Path(folder), sizes, ranks, expected, whole=whole)
            path = write_result(
                "serve_ranks", rows, out=arguments.out, small=arguments.small, model=sizes.config.name
            )
        for ranks in arguments.data_ranks:
            rows += measure_together(Path(folder), sizes, ranks, expected)
            path = write_result(
                "serve_ranks", rows, out=arguments.out, small=arguments.small, model=sizes.config.name
            )
    print(table(rows))
    print(path)


def measure(
    folder: Path, sizes: Sizes, ranks: int, expected: dict[int, dict[str, list[int]]], *, whole: bool
) -> list[dict[str, Any]]:
    """One layout: a row for prefill, and one for each batch."""
    options = replace(options_of(sizes), tensor_parallel_size=ranks, enable_expert_parallel=whole)
    kind = SpreadEngine if ranks > 1 else Engine
    engine = kind.from_pretrained(folder, options)
    layout = {"ranks": ranks, "experts": "whole" if whole else "by width"}
    rows = [layout | prefill(engine, sizes)]
    print(rows[-1], flush=True)
    for batch in sizes.batches:
        seconds, tokens = decode(engine, sizes, batch)
        same = share_of(tokens, expected.setdefault(batch, tokens))
        rows.append(layout | {"what": "decode", "batch": batch, "step_ms": seconds * 1e3})
        rows[-1] |= {"tokens_per_second": batch / seconds, "tokens_of_first": same}
        print(rows[-1], flush=True)
    if isinstance(engine, SpreadEngine):
        engine.leave()
    del engine
    gc.collect()
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def options_of(sizes: Sizes) -> EngineOptions:
    """What all layouts have in common."""
    return EngineOptions(
        device=sizes.device,
        load_format="dummy",
        max_num_seqs=max(sizes.batches),
        max_num_batched_tokens=sizes.budget,
        enable_prefix_caching=False,
        cudagraph_capture_sizes=sizes.batches,
        async_scheduling=True,
        num_blocks=None if sizes.device == "cuda" else 512,
    )


def measure_together(
    folder: Path, sizes: Sizes, ranks: int, expected: dict[int, dict[str, list[int]]]
) -> list[dict[str, Any]]:
    """Engines that share experts: the same rows."""
    rows, tokens = measure_data_ranks(folder, sizes, own_options(options_of(sizes), ranks))
    rows = [{"ranks": ranks, "experts": "whole, own requests"} | row for row in rows]
    for row in rows:
        if row["what"] == "decode":
            own = tokens[row["batch"]]
            row["tokens_of_first"] = share_of(own, expected.setdefault(row["batch"], own))
        print(row, flush=True)
    return rows


def share_of(tokens: dict[str, list[int]], first: dict[str, list[int]]) -> float:
    """How many tokens are those of the first row."""
    pairs = [pair for name in tokens for pair in zip(tokens[name], first[name], strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs)


def prefill(engine: Engine, sizes: Sizes) -> dict[str, Any]:
    """Tokens a second of several long prompts, the second time."""
    count = sizes.prompts[-1]
    seconds = 0.0
    for turn in range(2):
        for each in requests(sizes, count, sizes.prompt, 1, seed=turn):
            engine.add(each)
        before = engine.stats().step_seconds
        while engine.has_work:
            engine.step()
        seconds = engine.stats().step_seconds - before
    return {
        "what": "prefill",
        "prompts": f"{count} x {sizes.prompt}",
        "tokens_per_second": count * sizes.prompt / seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line each, as Markdown."""
    lines = [
        "| ranks | experts | what | tokens/s | step, ms | tokens as in the first row |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = row.get("prompts", f"batch {row.get('batch')}")
        step = f"{row['step_ms']:.2f}" if "step_ms" in row else ""
        same = f"{row['tokens_of_first']:.1%}" if "tokens_of_first" in row else ""
        cells = [row["ranks"], row["experts"], f"{row['what']} {what}", f"{row['tokens_per_second']:,.0f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, step, same]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
