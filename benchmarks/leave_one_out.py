"""How well the planner interpolates measured tables: `python benchmarks/leave_one_out.py TABLES`.

TABLES is a folder of operator times measured on H200: aiconfigurator's `gemm`, `mla`, `moe` and `comm`, as
Parquet. Points drawn at random are left out one by one and foretold from all others of their table.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from provenance import write_result

from benthic.plan.cost.ops import (
    AllToAll,
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    MlaDecode,
    Op,
)
from benthic.plan.cost.points import Points
from benthic.plan.cost.roofline import ideal
from benthic.spec import hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DRAWN: Final = 400
DTYPES: Final = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8"}
Row = dict[str, Any]
Keyed = tuple[str, Op, float]


def main() -> None:
    """Every table of every kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    readers: dict[str, Callable[[Row], Iterator[Keyed]]] = {
        "gemm/*/*/gemm_perf.parquet": gemm,
        "mla/*/*/context_mla_perf.parquet": context,
        "mla/*/*/generation_mla_perf.parquet": generation,
        "moe/*/*/moe_perf.parquet": moe,
        "comm/nccl/*/nccl_perf.parquet": collective,
    }
    lines = [
        line
        for pattern, reader in readers.items()
        for path in sorted(words.tables.glob(pattern))
        for line in errors(path, words.tables, reader)
    ]
    middle = statistics.median(line["median"] for line in lines)
    print(f"median of {len(lines)} tables' medians: {100 * middle:.2f} %")
    write_result("leave_one_out", lines, out=words.out, drawn=DRAWN)


def errors(path: Path, root: Path, reader: Callable[[Row], Iterator[Keyed]]) -> Iterator[Row]:
    """One line for each kind of operation in a file."""
    import pyarrow.parquet

    gpu = hardware.get("h200")
    tables: dict[str, dict[tuple[float, ...], float]] = defaultdict(dict)
    for row in pyarrow.parquet.read_table(path).to_pylist():
        for key, op, seconds in reader(row):
            tables[key][op.at] = ideal(op, gpu) / seconds
    for key, shares in sorted(tables.items()):
        points = Points(list(shares.items()))
        drawn = random.Random(0).sample(sorted(shares.items()), min(DRAWN, len(shares)))  # noqa: S311
        off = []
        for at, share in drawn:
            found = points.find(at, without=at)
            if found is not None:
                off.append(abs(share / found.utilisation - 1))
        if len(shares) < 20 or not off:
            continue
        median, worst = statistics.median(off), statistics.quantiles(off, n=10)[-1]
        name = f"{path.relative_to(root).parent} {key}"
        print(f"{name:<64} {len(shares):7,} points  median {100 * median:5.2f} %  P90 {100 * worst:6.2f} %")
        yield {"table": name, "points": len(shares), "median": median, "p90": worst}


def gemm(row: Row) -> Iterator[Keyed]:
    """Dense products."""
    dtype: Any = DTYPES.get(row["gemm_dtype"])
    if dtype:
        op = Gemm(m=row["m"], n=row["n"], k=row["k"], dtype=dtype)
        yield f"{row['gemm_dtype']}, {row['kernel_source']}", op, row["latency"] / 1e3


def context(row: Row) -> Iterator[Keyed]:
    """Expanded attention of prompts."""
    op = Attention(rows=row["batch_size"], heads=row["num_heads"], seq_len=row["isl"], qk_dim=192, v_dim=128)
    yield f"{row['mla_dtype']}, {row['kv_cache_dtype']}", op, row["latency"] / 1e3


def generation(row: Row) -> Iterator[Keyed]:
    """Absorbed attention of decoding."""
    tokens = row["batch_size"] * (row["isl"] + row["step"])
    op = MlaDecode(requests=row["batch_size"], context=tokens, heads=row["num_heads"])
    yield f"{row['mla_dtype']}, {row['kv_cache_dtype']}", op, row["latency"] / 1e3


def moe(row: Row) -> Iterator[Keyed]:
    """Expert networks, told apart by their routing; three products counted as one of thrice the width."""
    dtype: Any = DTYPES.get(row["moe_dtype"])
    if dtype and row["moe_tp_size"] == 1:
        experts = row["num_experts"] / row["moe_ep_size"]
        rows = row["num_tokens"] * row["topk"] / row["moe_ep_size"]
        op = GroupedGemm(
            rows=rows, experts=experts, n=3 * row["inter_size"], k=row["hidden_size"], dtype=dtype
        )
        key = f"{row['moe_dtype']}, {row['distribution']}, top {row['topk']}, {row['kernel_source']}"
        yield key, op, row["latency"] / 1e3


def collective(row: Row) -> Iterator[Keyed]:
    """NCCL inside a node."""
    ranks, size = row["num_gpus"], row["message_size"] * 2.0
    name = row["op_name"].replace("_", "-")
    seconds = row["latency"] / 1e3
    if name == "alltoall":
        yield name, AllToAll(nvlink=size * (ranks - 1) / ranks, ranks=ranks), seconds
    elif name in {"all-gather", "reduce-scatter", "all-reduce"}:
        yield name, Collective(name=name, bytes=size, ranks=ranks, per_node=ranks), seconds


if __name__ == "__main__":
    main()
