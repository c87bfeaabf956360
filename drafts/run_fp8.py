"""FP8 products in tiles of 128 x 192 on a Hopper GPU: right first, then timed beside what runs today.

    PYTHONPATH=src python3 drafts/run_fp8.py [checks] [dense] [experts]

Times are medians of CUDA graphs of some launches over rotating operands, all ways in turn, a launch.
"""

import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import old_gluon_fp8

from benthic.kernels import fp8_waves, gluon_fp8, ops
from benthic.kernels.triton_tiles import multiprocessors

BEGAN, LIMIT = time.time(), 57
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
DEEPGEMM = [1177, 1174, 973, 1253, 1266, 1208]
EXPERTS = [
    (32, 256, 4096, 7168, 1080), (32, 256, 7168, 2048, 989), (32, -256, 4096, 7168, 0), (32, -256, 7168, 2048, 0),
    (64, 384, 2816, 2048, 0), (32, 768, 4096, 7168, 0), (8, 4096, 7168, 2048, 0), (64, 24, 2816, 2048, 0),
]  # fmt: skip
"""Experts, rows of each (negative: on average, at random), outputs, inputs, DeepGEMM's figure."""
ODD = [(1000, 2032, 3001), (2113, 2048, 1500), (4100, 1040, 1600), (2050, 1040, 1750)]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PROCESSORS = multiprocessors(DEVICE)
CUT, WHOLE = gluon_fp8.tail, lambda tiles, *_: (tiles, 0)


def new(x, weight, ends=None, dtype=torch.bfloat16):
    gluon_fp8.tail = CUT
    return gluon_fp8.linear(x, weight, ends, dtype=dtype)


def whole(x, weight, ends=None, dtype=torch.bfloat16):
    gluon_fp8.tail = WHOLE
    return gluon_fp8.linear(x, weight, ends, dtype=dtype)


def old(x, weight, ends=None, dtype=torch.bfloat16):
    return old_gluon_fp8.linear(x, weight, ends, dtype=dtype)


def by(impl):
    return lambda x, weight, ends=None, dtype=torch.bfloat16: ops.fp8_linear(
        x, weight, ends, dtype=dtype, impl=impl
    )


WAYS = {"cublas": by("cublas"), "three": by("gluon_three"), "old": old, "whole": whole, "new": new}


def rows_of(rows, k, seed):
    torch.manual_seed(seed)
    return ops.Fp8(*ops.quantise_fp8_rows(torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)))


def weight_of(*dims, seed):
    torch.manual_seed(seed)
    return ops.quantise_fp8_weight(
        torch.randn(*dims, device=DEVICE, dtype=torch.bfloat16) * dims[-1] ** -0.5
    )


def ends_of(count, rows, seed=0):
    """Ends of experts with equal rows, or of as many on average if `rows` is negative."""
    if rows >= 0:
        return torch.arange(1, count + 1, device=DEVICE, dtype=torch.int32) * rows
    torch.manual_seed(seed)
    drawn = torch.randint(count, (-rows * count,), device=DEVICE)
    return torch.bincount(drawn, minlength=count).cumsum(0).to(torch.int32)


def compile_forms():
    """Compile all forms in processes side by side; what is compiled stays on disk."""
    forms = [f"{kind}{i}" for kind, of in (("d", SHAPES), ("e", EXPERTS), ("o", ODD)) for i in range(len(of))]
    for process in [subprocess.Popen([sys.executable, __file__, "compile", form]) for form in forms]:
        assert process.wait() == 0, "does not compile"
    print(f"compiled, {time.time() - BEGAN:.0f} s", flush=True)


def compile_form(form):
    kind, place = form[0], int(form[1])
    if kind == "e":
        count, _, n, k, _ = EXPERTS[place]
        for name in ("three", "old", "new"):
            WAYS[name](rows_of(count * 8, k, 0), weight_of(count, n, k, seed=1), ends_of(count, 8))
    elif kind == "d":
        n, k = SHAPES[place]
        for name in WAYS:
            WAYS[name](rows_of(4096, k, 0), weight_of(n, k, seed=1))
    else:
        n, k, rows = ODD[place]
        x, weight, each = rows_of(rows, k, 0), weight_of(n, k, seed=1), weight_of(2, n, k, seed=1)
        for way, dtype in itertools.product((new, whole), (torch.bfloat16, torch.float32)):
            way(x, weight, dtype=dtype)
        new(x, each, ends_of(2, rows // 2))
    torch.cuda.synchronize()


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def check(name, x, weight, ends=None, dtype=torch.bfloat16, *, beside=False):
    """Against the definition, tiles that are whole and the kernel before, twenty times over."""
    exact = ops.fp8_linear(x, weight, ends, dtype=torch.float32, impl="reference").double()
    out = new(x, weight, ends, dtype)
    wrong = error(out, exact)
    uncut = torch.equal(out, whole(x, weight, ends, dtype))
    before = not beside or torch.equal(out, old(x, weight, ends, dtype))
    same = all(torch.equal(new(x, weight, ends, dtype), out) for _ in range(20))
    mark = "" if wrong < 3e-3 and uncut and same else "WRONG "
    if mark or not before:
        print(f"{mark}{name}: error {wrong:.1e}, bits: whole {uncut}, old {before}, repeats {same}", flush=True)
    return wrong


def checks():
    worst = 0.0
    for n, k in [(2112, 7168), (7168, 2048), (4096, 7168), (24576, 1536), (32768, 512)]:
        weight = weight_of(n, k, seed=1)
        for rows in (4096, 2048) + ((4095, 2049, 1281) if n < 8192 else ()):
            worst = max(worst, check(f"{rows} ({n}, {k})", rows_of(rows, k, rows), weight, beside=True))
    for n, k, rows in [*ODD, (72, 256, 77)]:
        for dtype in (torch.bfloat16, torch.float32):
            x, weight = rows_of(rows, k, rows), weight_of(n, k, seed=2)
            worst = max(worst, check(f"{rows} ({n}, {k}) {dtype}", x, weight, dtype=dtype))
    x = rows_of(3000, 7168, 4)
    worst = max(worst, check("turned weight", x, weight_of(7168, 2112, seed=3).transposed()))
    for sizes in ([256] * 8, [0, 1, 63, 64, 65, 127, 128, 129, 0, 500, 300], [7, 0, 0, 900]):
        ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
        for n, k in [(4096, 2048), (2050, 1040)]:
            x, weight = rows_of(sum(sizes) + 70, k, 5), weight_of(len(sizes), n, k, seed=6)
            worst = max(worst, check(f"experts {sizes} ({n}, {k})", x, weight, ends))
    print(f"values: worst error {worst:.1e} (bfloat16 rounds by 1.7e-3), {time.time() - BEGAN:.0f} s", flush=True)


def times_of(ways, sets, launches):
    """Median of each way in microseconds, one replay of each in turn."""
    graphs = {}
    for name in ways:
        rotation = itertools.cycle(sets)
        for operands in sets:
            WAYS[name](*operands)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                WAYS[name](*next(rotation))
        graphs[name] = graph
    times = {name: [] for name in ways}
    for turn in range(8):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e3 / launches)
    return {name: statistics.median(each) for name, each in times.items()}


def dense():
    print("TFLOP/s: rows (n, k) | " + " ".join(WAYS) + " | new us, whole tiles + chunks of a program, rule's choice")
    for rows, (place, (n, k)) in itertools.product((4096, 2048, 1024), enumerate(SHAPES)):
        if time.time() - BEGAN > LIMIT:
            print("out of time")
            return
        sets = [(rows_of(rows, k, seed), weight_of(n, k, seed=seed)) for seed in range(3)]
        found = times_of(WAYS, sets, 9)
        work = 2 * rows * n * k / 1e6
        tiles = fp8_waves.cdiv(rows, 128) * fp8_waves.cdiv(n, 192)
        cut = fp8_waves.tail(tiles, fp8_waves.cdiv(k, 128), PROCESSORS)
        rule = "new" if fp8_waves.faster_than_library(rows, n, k, PROCESSORS) else "cublas"
        line = " ".join(f"{work / us:.0f}" for us in found.values())
        other = f" (DeepGEMM {DEEPGEMM[place]})" if rows == 4096 else ""
        print(f"{rows} ({n}, {k}) | {line}{other} | {found['new']:.1f} us {cut} {rule}", flush=True)
        del sets


def experts():
    ways = ["three", "old", "new"]
    print("TFLOP/s: experts x rows (n, k) | " + " ".join(ways))
    for count, rows, n, k, other in EXPERTS:
        if time.time() - BEGAN > LIMIT:
            print("out of time")
            return
        ends, weights = ends_of(count, rows), [weight_of(count, n, k, seed=seed) for seed in range(2)]
        sets = [(rows_of(count * abs(rows), k, seed), weight, ends) for seed, weight in enumerate(weights)]
        found = times_of(ways, sets, 4)
        work = 2 * count * abs(rows) * n * k / 1e6
        line = " ".join(f"{work / us:.0f}" for us in found.values())
        print(f"{count}x{rows} ({n}, {k}) | {line}" + (f" (DeepGEMM {other})" if other else ""), flush=True)
        del sets, weights


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_form(sys.argv[2])
        sys.exit()
    compile_forms()
    for part in sys.argv[1:] or ["checks", "experts", "dense"]:
        {"checks": checks, "dense": dense, "experts": experts}[part]()
    print(f"{time.time() - BEGAN:.0f} s")
