"""What batch invariance costs: products and attention by row beside the library's, at Moonlight's sizes.

Every line is timed twice in one process, by row and the way an ordinary engine takes; `speed` is the ordinary
time divided by ours. The end says whether decode (up to 64 rows) stays within 15 % and prefill (from 1,024
rows) above 60 %, each as the sum over one token's layers. `--sweep` times every tiling of every product: all
give the same bits, so `triton_by_row.TILINGS` may take the fastest.

    python benchmarks/invariant.py                    # on a GPU
    python benchmarks/invariant.py --sweep
    python benchmarks/invariant.py --small            # a rehearsal on a CPU
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from provenance import write_result
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.bench.timing import Bench, relative

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIDDEN, HEADS, NOPE, ROPE, LATENT, EXPERTS, TOP_K, WIDTH = 2048, 16, 128, 64, 512, 64, 6, 1408
LAYERS = 27
DENSE = {
    "q": (HEADS * (NOPE + ROPE), HIDDEN, LAYERS),
    "kv_a": (LATENT + ROPE, HIDDEN, LAYERS),
    "o": (HIDDEN, HEADS * NOPE, LAYERS),
    "shared gate_up": (4 * WIDTH, HIDDEN, LAYERS - 1),
    "shared down": (HIDDEN, 2 * WIDTH, LAYERS - 1),
    "head": (163840, HIDDEN, 1),
}
"""Out and in features of each dense product, and how often a token meets it."""


@dataclass(frozen=True)
class Pair:
    """A product by row and as an ordinary engine takes it; `times` is how often a token meets it."""

    name: str
    rows: int
    times: int
    flops: float
    moved: float
    by_row: Callable[..., Any]
    ordinary: Callable[..., Any]
    make: Callable[[int], Any]


def main() -> None:
    """Parse, time, judge, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 256, 1024, 2048])
    parser.add_argument("--sweep", action="store_true", help="time every tiling")
    parser.add_argument("--small", action="store_true", help="a rehearsal: figures mean nothing")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bench = Bench(device, dtype, words.small or device == "cpu", [])
    rows = [2] if bench.small else words.rows
    with torch.inference_mode():
        found = [measure(bench, pair) for count in rows for pair in pairs(bench, count)]
        if words.sweep:
            sweep(bench, rows)
    verdicts = judge(found)
    settings = {"small": bench.small, "dtype": str(dtype), "row_counts": rows, "sweep": words.sweep}
    record = {"speeds": found, "verdicts": verdicts, "lines": [asdict(line) for line in bench.lines]}
    print(write_result("invariant", record, out=words.out, **settings))


def pairs(bench: Bench, rows: int) -> Iterator[Pair]:
    """Everything of a step with so many rows whose kernel this mode replaces."""
    for name, (outer, inner, times) in DENSE.items():
        if name == "head" and rows > 64:
            continue  # only the last row of a prompt has logits
        yield dense(bench, name, rows, 256 if bench.small and name == "head" else outer, inner, times)
    yield gate(bench, rows)
    for name, outer, inner in (("experts gate_up", 2 * WIDTH, HIDDEN), ("experts down", HIDDEN, WIDTH)):
        yield grouped(bench, name, rows, outer, inner)
    yield from absorbed(bench, rows)
    yield attention(bench, rows, 256 if bench.small else 1024 if rows < 1024 else rows)
    if not bench.small and rows <= 64:
        yield attention(bench, rows, 8192)


def dense(bench: Bench, name: str, rows: int, outer: int, inner: int, times: int) -> Pair:
    """A product of the `linear` socket."""
    size = bench.dtype.itemsize
    return Pair(
        name, rows, times, 2 * rows * outer * inner, size * outer * inner,
        ops.linear_by_row, F.linear,
        lambda seed: (bench.random(rows, inner, seed=seed), bench.random(outer, inner, seed=seed + 50)),
    )  # fmt: skip


def gate(bench: Bench, rows: int) -> Pair:
    """The gate's product, which leaves in float32."""
    return Pair(
        "gate", rows, LAYERS - 1, 2 * rows * EXPERTS * HIDDEN, bench.dtype.itemsize * EXPERTS * HIDDEN,
        lambda x, w: ops.linear_by_row(x, w, dtype=torch.float32), ops.gate_logits,
        lambda seed: (bench.random(rows, HIDDEN, seed=seed), bench.random(EXPERTS, HIDDEN, seed=seed + 50)),
    )  # fmt: skip


def grouped(bench: Bench, name: str, rows: int, outer: int, inner: int) -> Pair:
    """A product of routed experts, `TOP_K` of them a row."""
    experts = 4 if bench.small else EXPERTS
    chosen = torch.rand(rows, experts, generator=torch.Generator().manual_seed(rows)).topk(
        min(TOP_K, experts)
    )
    counts = torch.bincount(chosen.indices.flatten(), minlength=experts)
    ends = counts.cumsum(0).to(bench.device, torch.int32)
    copies, busy = rows * min(TOP_K, experts), int((counts > 0).sum())

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        return (
            bench.random(copies, inner, seed=seed),
            bench.random(experts, outer, inner, seed=seed + 50),
            ends,
        )

    return Pair(
        name, rows, LAYERS - 1, 2 * copies * outer * inner, bench.dtype.itemsize * busy * outer * inner,
        ops.grouped_linear_by_row, ops.grouped_linear, make,
    )  # fmt: skip


def absorbed(bench: Bench, rows: int) -> Iterator[Pair]:
    """Queries into the latent space and outputs out of it; an ordinary engine does so for decodes alone."""
    for name, across in (("absorbed queries", True), ("absorbed values", False)):
        outer, inner = (LATENT, NOPE) if across else (NOPE, LATENT)

        def ordinary(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return (x.transpose(0, 1) @ w.transpose(1, 2)).transpose(0, 1)

        def make(seed: int, across: bool = across, inner: int = inner) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: FBT001
            weight = bench.random(HEADS, NOPE, LATENT, seed=seed + 50)
            return bench.random(rows, HEADS, inner, seed=seed), weight.transpose(1, 2) if across else weight

        yield Pair(
            name, rows, LAYERS, 2 * rows * HEADS * outer * inner,
            bench.dtype.itemsize * HEADS * NOPE * LATENT,
            ops.heads_linear_by_row, ordinary, make,
        )  # fmt: skip


def attention(bench: Bench, rows: int, context: int) -> Pair:
    """Attention of decodes over `context` tokens each; from 1,024 rows on, of one prompt of so many tokens.

    An ordinary engine attends from a prompt over expanded keys and values, which it has to expand first.
    """
    prompt, sequences = rows >= 1024, 1 if rows >= 1024 else rows
    pages = -(-context // 64)
    table = torch.randperm(sequences * pages, device=bench.device).view(sequences, pages).to(torch.int32)
    row = torch.arange(rows, device=bench.device, dtype=torch.int32)
    sequence, seen = (row * 0, row + 1) if prompt else (row, torch.full_like(row, context))
    bounds = torch.tensor([0, rows], dtype=torch.int32, device=bench.device)
    up = bench.random(HEADS * 2 * NOPE, LATENT, seed=7)

    def by_row(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return ops.mla_by_row(q[..., :LATENT], q[..., LATENT:], cache, table, sequence, seen, scale=0.07)

    def decode(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        q = q.unsqueeze(1)
        out = ops.mla_decode(q[..., :LATENT], q[..., LATENT:], cache, table, seen, scale=0.07)
        return out.squeeze(1)

    def expanded(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        latent = cache.flatten(0, 1)[:rows]
        kv = F.linear(latent[:, :LATENT], up).unflatten(1, (HEADS, -1))
        key = torch.cat((kv[..., :NOPE], latent[:, None, LATENT:].expand(-1, HEADS, -1)), dim=-1)
        return ops.attention(
            q[..., : NOPE + ROPE].contiguous(), key, kv[..., NOPE:], bounds, bounds,
            max_seqlen_q=rows, max_seqlen_k=rows, scale=0.07,
        )  # fmt: skip

    pairs = rows * (rows + 1) / 2 if prompt else rows * context
    return Pair(
        f"attention over {context}", rows, LAYERS, 2 * pairs * HEADS * (2 * LATENT + ROPE),
        bench.dtype.itemsize * sequences * context * (LATENT + ROPE), by_row, expanded if prompt else decode,
        lambda seed: (bench.random(rows, HEADS, LATENT + ROPE, seed=seed),
                      bench.random(sequences * pages, 64, LATENT + ROPE, seed=seed + 50)),
    )  # fmt: skip


def measure(bench: Bench, pair: Pair) -> dict[str, Any]:
    """Check one against the other where both compute the same, then time both."""
    operands, shape = pair.make(0), f"{pair.rows} rows"
    ours, theirs = pair.by_row(*operands), pair.ordinary(*operands)
    error = relative(ours, theirs) if ours.shape == theirs.shape else None
    sets = bench.sets(pair.make, sum(x.nbytes for x in operands))
    work, unit = (pair.flops, "TFLOP/s") if pair.rows >= 256 else (pair.moved, "TB/s")
    seconds = {}
    for name, call in (("by row", pair.by_row), ("ordinary", pair.ordinary)):
        seconds[name] = bench.time(call, sets)
        bench.add(pair.name, shape, name, seconds[name], work, unit, error)
    return {
        "product": pair.name,
        "rows": pair.rows,
        "times": pair.times,
        "by_row_us": seconds["by row"] * 1e6,
        "ordinary_us": seconds["ordinary"] * 1e6,
        "speed": seconds["ordinary"] / seconds["by row"],
    }


def judge(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Products and attention of a whole step, summed over layers, beside what was aimed for.

    Moving queries into the latent space counts as attention; an ordinary engine does not for prompts.
    """
    verdicts = []
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if row["product"] != "attention over 8192":
            latent = row["product"].startswith(("attention", "absorbed"))
            groups[row["rows"], "attention" if latent else "products"].append(row)
    for (rows, what), some in sorted(groups.items()):
        theirs = [row for row in some if rows < 1024 or not row["product"].startswith("absorbed")]
        ours_ms = sum(row["by_row_us"] * row["times"] for row in some) / 1e3
        theirs_ms = sum(row["ordinary_us"] * row["times"] for row in theirs) / 1e3
        aim = {"products": 0.85 if rows <= 64 else 0.6 if rows >= 1024 else None}.get(what)
        speed = theirs_ms / ours_ms
        reached = None if aim is None else speed >= aim
        verdicts.append({"rows": rows, "what": what, "speed": speed, "aim": aim, "reached": reached})
        print(
            f"{rows:5} rows, {what:9}: {ours_ms:8.2f} ms by row, {theirs_ms:8.2f} ms ordinary, "
            f"speed {speed:.2f}, aimed for {aim}: {reached}"
        )
    return verdicts


def sweep(bench: Bench, rows: list[int]) -> None:
    """Every product under every tiling."""
    from benthic.kernels import triton_by_row

    usual = triton_by_row.tiles
    for count in rows:
        for pair in pairs(bench, count):
            if "attention" in pair.name or bench.device == "cpu":
                continue
            sets = bench.sets(pair.make, sum(x.nbytes for x in pair.make(0)))
            for tiling in triton_by_row.TILINGS:
                triton_by_row.tiles = lambda *_, tiling=tiling: tiling
                seconds = bench.time(pair.by_row, sets)
                bench.add(pair.name, f"{count} rows", str(tiling), seconds, pair.flops, "TFLOP/s", None)
            triton_by_row.tiles = usual


if __name__ == "__main__":
    main()
