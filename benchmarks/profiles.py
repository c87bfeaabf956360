"""Writes the profiles that ship with the planner: `python benchmarks/profiles.py`.

`h200.json` holds our own kernels, from `benchmarks/results/kernels_h200.json` and the files of newer kernels
beside it (`NEWER`), with products and collectives of the libraries that we call (cuBLAS, block-scaled FP8,
NCCL; medians on two H200, torch 2.11, 2026-11-22), and what `benthic calibrate` measured on an H200
(`benchmarks/results/calibrate_h200.json`). What the host takes for an operator comes from the slots of one
training run, zb-h1 with short rows.
`h100.json` holds what `benthic calibrate` measured on an H100 (`benchmarks/results/calibrate_h100.json`), but
for calls that took longer there than others with more of the same work (three of 423).
`h800.json` holds what DeepSeek published of its kernels on H800; weight gradients are those of May 2025,
a fifth faster than the kernels before them (pull request 95 of DeepGEMM).
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benthic.plan import cost
from benthic.plan.cost.machine import Measured, Profile, read
from benthic.plan.cost.ops import (
    AllToAll,
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    MemoryBound,
    MlaDecode,
    Op,
    PointToPoint,
)
from benthic.plan.training import launches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RESULTS: Final = Path(__file__).parent / "results"
PROFILES: Final = Path(cost.__file__).parent / "profiles"
OURS: Final = {
    "cudnn", "triton", "gluon", "gluon_wide", "gluon_three", "gluon_split", "gluon_dozens",
    "grouped_mm_cuda", "chunked", "torch", "cublas",
}  # fmt: skip
NEWER: Final = {
    "kernels_fp8_h200": {"fp8_linear", "add_fp8_weight_gradient", "grouped_fp8_linear",
                         "add_grouped_fp8_weight_gradient"},
    "kernels_fused_h200": {"quantise_fp8_both", "quantise 1x128", "quantise 128x128", "adamw", "swiglu_fp8",
                           "swiglu_gradient_fp8_both", "weighted_swiglu_gradient_fp8_both", "spread_fp8"},
    "kernels_memory_bound_h200": {"rms_norm", "add_rms_norm", "swiglu", "rope"},
    "kernels_attention_h200": {"attention", "attention backward"},
    "experts_h200": {"grouped_linear"},
    "experts_counter_h200": {"grouped_linear"},
}  # fmt: skip
"""Ops of later files than `kernels_h200.json`, whose kernels took the place of those there."""
FORWARD_ALONE: Final = {"experts_counter_h200"}
"""Files that timed gradients of experts' rows and weights together, for which another has them apart."""
FEW_ROWS: Final = 64
"""Rows an expert below which `benthic calibrate` measured the kernels that decode, at more sizes."""
FEW_ROWS_KERNEL: Final = 32
"""Rows an expert above which `calibrate_h200.json` has torch's product, in whose place ours runs now."""
MANY_ROWS: Final = 1024
"""Rows an expert below which many experts' products were measured with rows as routing gives them alone.

With as many for each they take up to a sixth less: no tile is left half empty.
"""
AMOUNTS: Final = {
    Gemm: ("m",),
    GroupedGemm: ("rows",),
    MlaDecode: ("requests", "context"),
    Attention: ("rows", "seq_len"),
}
"""Fields that say how much an operation has to do."""
LABELS: Final = {
    "roof: copy": "copy",
    "permute (with sort)": "permute",
    "quantise_fp8_both": "quantise both",
}
LIBRARIES: Final = "cuBLAS, scaled_mm and NCCL 2.28.9 on two H200, medians, 2026-11-22"
DEEPGEMM: Final = "DeepGEMM README, February 2025, H800"
GRADIENTS: Final = "DeepGEMM pull request 95 and issue 107, May 2025, H800"
DEEPEP: Final = "DeepEP README, H800: 4096 tokens, hidden 7168, top-8 of 4 groups, FP8 out and BF16 home"
FLASHMLA: Final = "FlashMLA README, April 2025, H800"
SPANS: Final = "spans/zb-h1-short-rank-1.jsonl"
HOST: Final = f"host: {SPANS} and exchange.json"

# m, n, k and TFLOP/s
CUBLAS: Final = (
    (8192, 8192, 8192, 699), (4096, 7168, 2048, 712), (4096, 4096, 7168, 730), (4096, 24576, 1536, 648),
    (4096, 2112, 7168, 715), (128, 7168, 2048, 227), (64, 24576, 1536, 158),
)  # fmt: skip
BLOCK_FP8: Final = (
    (8192, 8192, 8192, 1150), (4096, 7168, 2048, 1085), (4096, 4096, 7168, 1161), (4096, 24576, 1536, 1028),
    (4096, 2112, 7168, 1063), (128, 7168, 2048, 287), (64, 24576, 1536, 226),
)  # fmt: skip
NCCL_ROWS: Final = ((1024, 72), (8192, 82), (32768, 255), (131072, 905))  # rows of 4096 bytes, microseconds
DEEPGEMM_DENSE: Final = {
    64: (206, 289, 219, 336, 287, 295),
    128: (352, 535, 358, 645, 533, 510),
    4096: (1058, 990, 590, 1358, 1304, 1025),
}
DEEPGEMM_NK: Final = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
DEEPGEMM_GROUPED: Final = (  # experts, rows each, n, k, TFLOP/s: contiguous, then masked
    (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099), (8, 4096, 4096, 7168, 1288),
    (8, 4096, 7168, 2048, 1093), (1, 1024, 4096, 7168, 1233), (1, 1024, 7168, 2048, 925),
    (2, 512, 4096, 7168, 1040), (2, 512, 7168, 2048, 916), (4, 256, 4096, 7168, 932),
    (4, 256, 7168, 2048, 815),
)  # fmt: skip
DEEPGEMM_GRADIENTS: Final = (  # n, k, rows and TFLOP/s of a weight gradient added to its FP32 sum
    (7168, 2112, 4096, 920), (1536, 24576, 4096, 986), (512, 32768, 4096, 878), (16384, 7168, 4096, 994),
    (7168, 4096, 4096, 942), (2048, 7168, 4096, 920), (7168, 2112, 8192, 1052), (1536, 24576, 8192, 1092),
    (512, 32768, 8192, 1014),
)  # fmt: skip
DEEPGEMM_EXPERTS_GRADIENTS: Final = (  # experts, rows each, n, k, TFLOP/s
    (4, 4096, 4096, 7168, 939), (4, 4096, 7168, 2048, 900), (4, 8192, 4096, 7168, 1044),
    (4, 8192, 7168, 2048, 1033), (8, 4096, 4096, 7168, 942),
)  # fmt: skip
DEEPEP_NORMAL: Final = ((8, 153, 158), (16, 43, 43), (32, 58, 57), (64, 51, 50))  # ranks, GB/s out and home


def main() -> None:
    """Write all three."""
    measured = RESULTS / "calibrate_h200.json"
    more = read(measured).points
    libraries = [*products(CUBLAS, "bf16", LIBRARIES), *links()]
    source = "benchmarks/results/kernels_h200.json; " + LIBRARIES
    write("h800", [*deepgemm(), *deepep(), *flashmla()], f"{DEEPGEMM}; {GRADIENTS}; {DEEPEP}; {FLASHMLA}", {})
    h100 = read(RESULTS / "calibrate_h100.json")
    write("h100", list(sound(h100.points)), h100.source, {})
    write(
        "h200",
        [*kernels(), *libraries, *(point for point in more if not replaced(point.op))],
        f"{source}; {HOST}",
        {**host_of_operators(), **host_of_collectives()},
    )


def sound(points: Sequence[Measured]) -> Iterator[Measured]:
    """The points that no call with as much or more of the same work beats by a fifth."""
    for one in points:
        if not any(other.seconds * 1.2 < one.seconds and covers(other.op, one.op) for other in points):
            yield one


def covers(more: Op, less: Op) -> bool:
    """Whether an operation is another one with as much or more to do."""
    amounts = AMOUNTS.get(type(less), ())
    if type(more) is not type(less) or not amounts:
        return False
    others = [field.name for field in fields(less) if field.name not in amounts]
    return all(getattr(more, name) == getattr(less, name) for name in others) and all(
        getattr(more, name) >= getattr(less, name) for name in amounts
    )


def even(op: Op) -> bool:
    """Whether it is of so many experts, with so few rows each, that it matters whether all have as many."""
    if not isinstance(op, GroupedGemm) or op.dtype == "fp8" or op.gradient:
        return False
    return op.experts >= 32 and FEW_ROWS <= op.rows / op.experts < MANY_ROWS


def replaced(op: Op) -> bool:
    """Whether `calibrate_h200.json` has it by a kernel that does not run for it any more."""
    if not isinstance(op, GroupedGemm) or op.dtype == "fp8" or op.gradient:
        return False
    return FEW_ROWS_KERNEL < op.rows / op.experts < FEW_ROWS


def write(name: str, points: list[Measured], source: str, overheads: dict[str, float]) -> Profile:
    """One profile."""
    path = PROFILES / f"{name}.json"
    profile = Profile(hardware=name, source=source, points=tuple(points), overheads=overheads)
    path.write_text(profile.as_json())
    print(f"wrote {path.name}: {len(points)} points, {len(overheads)} overheads")
    return profile


def host_of_operators() -> dict[str, float]:
    """What the host takes for a call, read from slots in which the GPU has next to nothing to do.

    zb-h1 on two ranks of `benchmarks/train_ranks.py` with rows of 256 tokens. The second rank, which holds
    two mixtures and the head, never waits for the first: its slots last as long as launching them. Those of
    weights alone add gradients of whole matrices, whatever the rows: a call of theirs is taken to be one of a
    backward to the input.
    """
    took: dict[str, list[float]] = defaultdict(list)
    for line in (RESULTS / SPANS).read_text().splitlines():
        span = json.loads(line)
        took[span["slot"][1]].append(span["end"] - span["start"])
    calls = launches.MIXTURE.plus(launches.MIXTURE).plus(launches.HEAD).plus(launches.STAGE)
    backward = statistics.median(took["I"]) / calls.input
    return {
        "host operator forward": statistics.median(took["F"]) / calls.forward,
        "host operator input": backward,
        "host operator weight": backward,
    }


def host_of_collectives() -> dict[str, float]:
    """One collective of a few bytes."""
    rows = json.loads((RESULTS / "exchange.json").read_text())["rows"]
    (few,) = (
        row["microseconds"] / 1e6
        for row in rows
        if (row["tokens"], row["wire"], row["exchange"], row["what"])
        == (128, "bf16", "all_to_all", "combine")
    )
    return {"host collective": few}


def kernels() -> Iterator[Measured]:
    """Our kernels, each as the fastest implementation that may be chosen, of the newest file that has it."""
    found: dict[Op, Measured] = {}
    for file in ("kernels_h200", *NEWER):
        found |= kernels_of(file)
    yield from found.values()


def kernels_of(file: str) -> dict[Op, Measured]:
    """Those that one file has the say about."""
    record = json.loads((RESULTS / f"{file}.json").read_text())
    rows = [row for row in record["rows"] if row["implementation"] in OURS and wanted(row["op"], file)]
    source = f"{file}.json, commit {record['commit']}"
    return {op: Measured(op, taken, source) for op, taken in fastest(rows).items()}


def wanted(op: str, file: str) -> bool:
    """Whether a file has the say about an op."""
    both = file not in FORWARD_ALONE
    return file not in NEWER or (op.removesuffix(" backward") if both else op) in NEWER[file]


def fastest(rows: list[dict[str, Any]]) -> dict[Op, float]:
    """Seconds of each operation by the implementation that takes the fewest."""
    best: dict[Op, float] = {}
    for row in rows:
        if (row["op"], row["implementation"]) == ("grouped_linear backward", "triton"):
            experts, each, k, n = (int(found) for found in re.findall(r"\d+", row["shape"]))
            op = GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, gradient=True)
            best[op] = row["microseconds"] / 1e6 / 2  # both gradients, about equal; it can add this one
        for op, part in operations(row):
            taken = row["microseconds"] / 1e6 * part
            best[op] = min(taken, best.get(op, taken))
    return best


def operations(row: dict[str, Any]) -> Iterator[tuple[Op, float]]:
    """The operation of one line, and the part of its time that one takes."""
    name, backward = row["op"].removesuffix(" backward"), row["op"].endswith(" backward")
    numbers = [int(n) for n in re.findall(r"\d+", row["shape"])]
    if row["op"] == "roof: product":
        yield Gemm(m=numbers[0], n=numbers[0], k=numbers[0]), 1.0
    elif name == "attention":
        yield from ((op, 1.0) for op in attention(row, numbers, backward=backward))
    elif name == "grouped_linear":
        yield from grouped(numbers, backward=backward, drawn=row["shape"].partition(")")[2] != "")
    elif "fp8" in name and row["unit"] == "TFLOP/s":
        yield from ((op, 1.0) for op in narrow_product(name, numbers))
    elif name == "mla_decode" and row["unit"] == "TB/s":
        requests, context, heads = numbers
        yield MlaDecode(requests=requests, context=requests * context, heads=heads), 1.0
    elif name == "linear_cross_entropy":
        tokens, width, vocabulary = numbers
        sizes = {"m": tokens, "n": vocabulary, "k": width}
        for side in ("input", "weight") if backward else ():  # the two gradients, about equal
            yield Gemm(name=f"cross entropy {side}", **sizes), 0.5
        if not backward:
            yield Gemm(name="cross entropy", **sizes), 1.0
    elif row["unit"] == "TB/s" and name != "mla_decode":
        moved = row["rate"] * row["microseconds"] * 1e6
        label = LABELS.get(name, name)
        yield MemoryBound(bytes=moved, name=f"{label}{' backward' if backward else ''}"), 1.0


def grouped(numbers: list[int], *, backward: bool, drawn: bool) -> Iterator[tuple[Op, float]]:
    """A product of experts; backward holds the input's and the weights' gradient, about equal."""
    experts, each, k, n = numbers
    sides = (k, n) if backward else (n, k)
    op = GroupedGemm(rows=experts * each, experts=experts, n=sides[0], k=sides[1])
    if each >= FEW_ROWS and (drawn or not even(op)):
        yield op, 0.5 if backward else 1.0


def narrow_product(name: str, numbers: list[int]) -> Iterator[Op]:
    """A product in FP8, or a weight gradient of FP8 tiles that is added to an FP32 sum."""
    *rows, k, n = numbers
    gradient = name.endswith("weight_gradient")
    if "grouped" not in name:
        (m,) = rows
        sizes = {"m": n, "n": k, "k": m, "name": "gradient"} if gradient else {"m": m, "n": n, "k": k}
        yield Gemm(dtype="fp8", **sizes)
    elif rows[1] >= FEW_ROWS:
        experts, each = rows
        yield GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, dtype="fp8", gradient=gradient)


def attention(row: dict[str, Any], numbers: list[int], *, backward: bool) -> Iterator[Attention]:
    """Rows of one length as they run alone, by cuDNN or Gluon; packs as Gluon runs them, of any lengths."""
    if row["implementation"] == "triton":  # no GPU of a profile chooses it
        return
    ragged = row["shape"].startswith("ragged")
    rows, seq_len, heads, qk_dim, v_dim = (1, *numbers) if ragged else numbers
    whole = Attention(
        rows=rows,
        heads=heads,
        seq_len=seq_len,
        qk_dim=qk_dim,
        v_dim=v_dim,
        causal="causal" in row["shape"],
        backward=backward,
    )
    done = row["rate"] * row["microseconds"] * 1e6
    kept = done / whole.flops if ragged else 1.0
    if not ragged:
        yield whole
    if row["implementation"] == "gluon":
        yield replace(whole, packed=True, kept=kept)


def products(rows: tuple[tuple[int, ...], ...], dtype: Any, source: str) -> Iterator[Measured]:
    """Dense products."""
    for m, n, k, rate in rows:
        yield Measured(Gemm(m=m, n=n, k=k, dtype=dtype), 2 * m * n * k / (rate * 1e12), source)


def links() -> Iterator[Measured]:
    """Two H200 over NVLink."""
    for rows, microseconds in NCCL_ROWS:
        yield Measured(AllToAll(nvlink=rows * 4096 / 2, ranks=2), microseconds / 1e6, LIBRARIES)
    half = 2.0**30
    rates: tuple[tuple[Callable[[], Op], float], ...] = (
        (lambda: Collective(name="all-gather", bytes=2 * half, ranks=2, per_node=2), 285e9),
        (lambda: Collective(name="reduce-scatter", bytes=2 * half, ranks=2, per_node=2), 289e9),
        (lambda: PointToPoint(bytes=half, tier="nvlink"), 359e9),
    )
    for op, rate in rates:
        yield Measured(op(), half / rate, LIBRARIES)


def deepgemm() -> Iterator[Measured]:
    """DeepSeek's FP8 products."""
    for m, rates in DEEPGEMM_DENSE.items():
        rows = tuple((m, n, k, rate) for (n, k), rate in zip(DEEPGEMM_NK, rates, strict=True))
        yield from products(rows, "fp8", DEEPGEMM)
    for experts, each, n, k, rate in DEEPGEMM_GROUPED:
        op = GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, dtype="fp8")
        yield Measured(op, op.flops / (rate * 1e12), DEEPGEMM)
    for n, k, tokens, rate in DEEPGEMM_GRADIENTS:
        for sides in ((n, k), (k, n)):  # either operand may come first
            product = Gemm(m=sides[0], n=sides[1], k=tokens, dtype="fp8", name="gradient")
            yield Measured(product, product.flops / (rate * 1e12), GRADIENTS)
    for experts, each, n, k, rate in DEEPGEMM_EXPERTS_GRADIENTS:
        op = GroupedGemm(rows=experts * each, experts=experts, n=n, k=k, dtype="fp8", gradient=True)
        yield Measured(op, op.flops / (rate * 1e12), GRADIENTS)


def deepep() -> Iterator[Measured]:
    """DeepSeek's exchange. Rates count the local node's share, and NVLink's where there is one node."""
    tokens, top_k, experts = 4096, 8, 256
    for ranks, *rates in DEEPEP_NORMAL:
        nodes = ranks // 8
        reached = min(4, nodes)
        here = experts // ranks
        chosen = experts // 2 if nodes == 8 else experts  # 4 of 8 groups, a group a node
        spread = ranks // 2 if nodes == 8 else ranks
        miss = 1.0
        for picked in range(top_k):
            miss *= (chosen - here - picked) / (chosen - picked)
        copies = spread * (1 - miss)
        for rate, width in zip(rates, (7392, 14336), strict=True):
            counted = tokens * (copies if nodes == 1 else reached) * width
            network = tokens * reached * width * (nodes - 1) / nodes
            nvlink = tokens * copies * width * 7 / 8
            op = AllToAll(nvlink=nvlink, network=network, ranks=ranks)
            yield Measured(op, counted / (rate * 1e9), DEEPEP)


def flashmla() -> Iterator[Measured]:
    """DeepSeek's decoding attention: bound by memory with 16 heads, by products with 128."""
    thin = MlaDecode(requests=128, context=128 * 4096, heads=16)
    wide = MlaDecode(requests=128, context=128 * 4096, heads=128)
    yield Measured(thin, thin.bytes / 3000e9, FLASHMLA)
    yield Measured(wide, wide.flops / 660e12, FLASHMLA)


if __name__ == "__main__":
    main()
