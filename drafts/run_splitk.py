"""FP8 products of some dozens of rows on a Hopper GPU: right first, then timed beside what ran before.

    PYTHONPATH=src python3 drafts/run_splitk.py [checks] [times]

Times are medians of a CUDA graph of 20 launches over operands that exceed the cache, a launch; `alone` are events
around single calls behind a busy GPU, as `benchmarks/kernels.py` measures.
"""

import itertools
import statistics
import subprocess
import sys
import time

import torch

from benthic.kernels import gluon_fp8_split as split
from benthic.kernels import ops
from benthic.kernels.launch import in_turn
from benthic.kernels.triton_tiles import multiprocessors

BEGAN, LIMIT = time.time(), 55
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
DEEPGEMM = {128: [228, 428, 267, 594, 375, 255], 64: [120, 222, 154, 315, 191, 141]}
DEVICE = torch.device("cuda")
PROCESSORS = multiprocessors(torch.empty(1, device=DEVICE).device)
FP8 = torch.float8_e4m3fn


def compile_forms():
    """Compile all forms in processes side by side; what is compiled stays on disk."""
    forms = [f"{rows},{groups}" for rows in (64, 128) for groups in (1, 2, 3)]
    for process in [subprocess.Popen([sys.executable, __file__, "compile", form]) for form in forms]:
        assert process.wait() == 0, "does not compile"
    print(f"compiled, {time.time() - BEGAN:.0f} s", flush=True)


def compile_form(form):
    rows, groups = map(int, form.split(","))
    x, weight = rows_of(rows, 1024, 0), weight_of(256, 1024, 1)
    for divided in (
        split.Division(rows, groups, 5, whole=False),
        split.Division(rows, groups, 8, whole=True),
    ):
        split.multiply(x, weight, divided, dtype=torch.bfloat16)
        with in_turn():
            split.multiply(x, weight, divided, dtype=torch.bfloat16)
    torch.cuda.synchronize()


def rows_of(rows, k, seed):
    torch.manual_seed(seed)
    return ops.Fp8(*ops.quantise_fp8_rows(torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)))


def weight_of(n, k, seed):
    torch.manual_seed(seed)
    return ops.quantise_fp8_weight(torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * k**-0.5)


def divisions(rows, n, k):
    """The chosen one, and all others with one to three groups."""
    chosen = split.division(rows, n, k, PROCESSORS)
    every = {
        split._cost(rows, n, k, PROCESSORS, groups, whole)[1]
        for groups in (1, 2, 3)
        for whole in (True, False)
    }
    return [chosen, *sorted(every - {chosen})]


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def checks():
    worst = 0.0
    for n, k in SHAPES:
        weight = weight_of(n, k, 1)
        for rows in (1, 17, 64, 65, 100, 128, 200):
            x = rows_of(rows, k, rows)
            exact = ops.fp8_linear(x, weight, dtype=torch.float32, impl="reference").double()
            forced = (
                divisions(rows, n, k) if rows in (17, 128, 200) and n != 24576 else divisions(rows, n, k)[:1]
            )
            for divided in forced:
                out = split.multiply(x, weight, divided, dtype=torch.bfloat16)
                wrong = error(out, exact)
                worst = max(worst, wrong)
                same = all(
                    torch.equal(split.multiply(x, weight, divided, dtype=torch.bfloat16), out)
                    for _ in range(20)
                )
                if not (same and wrong < 3e-3):
                    print(f"WRONG {rows} ({n}, {k}) {tuple(divided)}: error {wrong:.1e}, same bits {same}")
            if 16 < rows <= 128:
                own = ops.fp8_linear(x, weight)
                assert torch.equal(own, split.multiply(x, weight, forced[0], dtype=torch.bfloat16)), (
                    "not the choice"
                )
    print(f"values: worst error {worst:.1e} (bfloat16 rounds by 1.7e-3), {time.time() - BEGAN:.0f} s")
    turned = weight_of(7168, 2112, 3).transposed()
    x = rows_of(100, 7168, 4)
    exact = ops.fp8_linear(x, turned, dtype=torch.float32, impl="reference").double()
    print(f"turned weight: error {error(ops.fp8_linear(x, turned), exact):.1e}")
    behind_what_writes_rows()


def behind_what_writes_rows():
    """In a graph of four layers, launched early: rows are those that the kernel ahead has written."""
    dims = [(4096, 7168), (2112, 4096), (7168, 2112), (4096, 7168)]
    weights = [weight_of(n, k, i) for i, (n, k) in enumerate(dims)]

    def layers(x):
        for weight in weights:
            x = ops.fp8_linear(ops.Fp8(*ops.quantise_fp8_rows(x)), weight)
        return x

    for rows in (48, 128):
        x = torch.randn(rows, 7168, device=DEVICE, dtype=torch.bfloat16)
        layers(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers(x)
        bad = 0
        for seed in range(50):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            graph.replay()
            found = out.clone()
            torch.cuda.synchronize()
            with in_turn():
                bad += not torch.equal(found, layers(x))
        print(f"{rows} rows through four layers in a graph: {bad} of 50 differ from launches in turn")


def median(call, sets):
    rotation = itertools.cycle(sets)
    for operands in sets:
        call(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*next(rotation)) for _ in range(20)]
    graph.replay()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 20)
    del kept
    return statistics.median(times)


def alone(call, sets):
    rotation, pairs = itertools.cycle(sets), []
    torch.cuda._sleep(60_000_000)
    for _ in range(30):
        operands = next(rotation)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*operands)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in pairs)


def old(rows):
    impl = "few_rows" if rows <= 16 else "cublas"
    return lambda x, weight: ops.fp8_linear(x, weight, impl=impl)


def times():
    print(
        "rows (n, k): old us TF | new us TF division | in turn us | alone old new us TF DeepGEMM | others us"
    )
    for rows, (place, (n, k)) in itertools.product((128, 64, 32, 96, 16, 192, 256), enumerate(SHAPES)):
        if time.time() - BEGAN > LIMIT:
            print("out of time")
            return
        count = max(2, -(-180_000_000 // (n * k)))
        weights = [weight_of(n, k, seed) for seed in range(min(count, 3))]
        copies = [
            ops.Fp8(w.values.clone(), w.scale.clone())
            for w in itertools.islice(itertools.cycle(weights), count)
        ]
        sets = [(rows_of(rows, k, seed), weight) for seed, weight in enumerate(copies)]
        work = 2 * rows * n * k / 1e6

        def by(divided):
            return lambda x, weight: split.multiply(x, weight, divided, dtype=torch.bfloat16)

        chosen, *rest = divisions(rows, n, k)
        before, now = median(old(rows), sets), median(by(chosen), sets)
        with in_turn():
            slow = median(by(chosen), sets)
        line = f"{rows} ({n}, {k}): {before:.1f} {work / before:.0f} | {now:.1f} {work / now:.0f} {name(chosen)} | {slow:.1f}"
        if rows in DEEPGEMM:
            single = alone(by(chosen), sets)
            line += (
                f" | {alone(old(rows), sets):.1f} {single:.1f} {work / single:.0f} {DEEPGEMM[rows][place]}"
            )
        others = sorted((median(by(divided), sets), name(divided)) for divided in rest)
        print(line + " | " + ", ".join(f"{label} {us:.1f}" for us, label in others), flush=True)


def name(divided):
    return f"{divided.groups}x64/{divided.share}{'' if divided.whole else 's'}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_form(sys.argv[2])
        sys.exit()
    compile_forms()
    for part in sys.argv[1:] or ["checks", "times"]:
        {"checks": checks, "times": times}[part]()
    print(f"{time.time() - BEGAN:.0f} s")
