"""FP8 products of some dozens of rows an expert on a Hopper GPU: right first, then timed beside what ran before.

    PYTHONPATH=src python3 drafts/run_mid.py [checks] [times]

Times are medians of CUDA graphs of 20 launches over operands that exceed the cache, a launch, in turns.
"""

import itertools
import statistics
import subprocess
import sys
import time

import torch

from benthic.kernels import gluon_fp8_mid as mid
from benthic.kernels import ops, triton_few_rows
from benthic.kernels.launch import in_turn

BEGAN, LIMIT = time.time(), 52
SHAPES = [(64, 2816, 2048), (64, 2048, 1408), (32, 4096, 7168)]
ROWS = {64: (24, 17, 32, 48, 64, 96, 56, 72, 12, 16), 32: (64, 24, 48)}
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


def passed():
    return f"{time.time() - BEGAN:.0f} s"


def compile_forms():
    """Compile all forms in processes side by side; what is compiled stays on disk."""
    forms = ["32", "64", "96", "few_rows", "gluon"]
    for process in [subprocess.Popen([sys.executable, __file__, "compile", form]) for form in forms]:
        assert process.wait() == 0, "does not compile"
    print(f"compiled, {passed()}", flush=True)


def compile_form(form):
    for experts, rows in ((64, 64 * 24), (32, 32 * 24), (64, 64 * 12)):
        x, ends = rows_of(rows, 1024, 0), ends_of(sizes_of(rows, experts))
        weight = weight_of(experts, 256, 1024, 1)
        implementation(form)(x, weight, ends)
        with in_turn():
            implementation(form)(x, weight, ends)
    torch.cuda.synchronize()


def implementation(form):
    if form.isdigit():
        found = next(each for each in mid.FORMS if each.rows == int(form))
        return lambda x, weight, ends: mid.multiply(x, weight, ends, found, dtype=BF16)
    if form == "few_rows":  # which the op refuses above 16 rows an expert
        return lambda x, weight, ends: triton_few_rows.fp8_linear(x, weight, ends, dtype=BF16)
    return lambda x, weight, ends: ops.fp8_linear(x, weight, ends, impl=form)


def rows_of(rows, k, seed):
    torch.manual_seed(seed)
    return ops.Fp8(*ops.quantise_fp8_rows(torch.randn(rows, k, device=DEVICE, dtype=BF16), by_column=True))


def weight_of(experts, n, k, seed):
    torch.manual_seed(seed)
    return ops.quantise_fp8_weight(torch.randn(experts, n, k, device=DEVICE, dtype=BF16) * k**-0.5)


def sizes_of(rows, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.bincount(torch.randint(experts, (rows,), generator=generator), minlength=experts).tolist()


def ends_of(sizes):
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def exact_of(x, weight, sizes):
    """The definition in float64, expert by expert; zeros for rows of none."""
    wide = x.values.double() * x.scale.double().repeat_interleave(128, 1)[:, : x.values.shape[1]]
    out = torch.zeros(len(wide), weight.values.shape[1], device=DEVICE, dtype=torch.float64)
    first = 0
    for expert, size in enumerate(sizes):
        each = weight.scale[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        own = weight.values[expert].double()
        out[first : first + size] = (
            wide[first : first + size] @ (own * each[: own.shape[0], : own.shape[1]]).T
        )
        first += size
    return out


def checks():
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    cases = [
        ("odd", (31, 0, 1, 33, 200, 64, 0), 35, 144, 304),
        ("24 at random", sizes_of(64 * 24, 64), 0, 2816, 2048),
        ("48 at random, a tail", sizes_of(64 * 48, 64, 1), 77, 2048, 1408),
        ("64 at random", sizes_of(32 * 64, 32, 2), 0, 4096, 7168),
        ("one takes all", (0, 0, 700, 0), 0, 2816, 2048),
        ("few tiles", (20, 30), 5, 520, 640),
        ("no rows", (0,) * 64, 40, 2048, 1408),
    ]
    for name, sizes, spare, n, k in cases:
        x, weight, ends = rows_of(sum(sizes) + spare, k, 3), weight_of(len(sizes), n, k, 1), ends_of(sizes)
        exact, few = exact_of(x, weight, sizes), implementation("few_rows")(x, weight, ends)
        line = f"{name}:"
        for form in ("32", "64", "96"):
            call = implementation(form)
            out = call(x, weight, ends)
            same = all(torch.equal(call(x, weight, ends), out) for _ in range(20))
            with in_turn():
                same &= torch.equal(call(x, weight, ends), out)
            norm = exact.norm()
            wrong = ((out.double() - exact).norm() / norm if norm else out.double().abs().sum()).item()
            good = same and wrong < 3e-3 and bool(out.isfinite().all())
            line += f" {form} {'ok' if good else 'WRONG'} {wrong:.1e}, as few_rows {torch.equal(few, out)};"
        print(line, passed(), flush=True)
    torch._C._set_deterministic_algorithms(False)
    behind_what_writes_rows()


def behind_what_writes_rows():
    """In a graph of three layers, launched early: rows and ends are those that kernels ahead have written."""
    dims = [(2816, 2048), (1408, 2816), (2048, 1408)]
    weights = [weight_of(64, n, k, i) for i, (n, k) in enumerate(dims)]
    sizes = [sizes_of(64 * 24, 64, seed) for seed in range(20)]
    sizes += [[0] * 40 + [64] * 24, [1536] + [0] * 63, [0] * 64]  # what is loaded ahead is wrong

    def layers(x, ends):
        for weight in weights:
            rows = ops.Fp8(*ops.quantise_fp8_rows(x, by_column=True))
            x = ops.fp8_linear(rows, weight, ends, impl="gluon_mid")
        return x

    x, ends = torch.randn(64 * 24, 2048, device=DEVICE, dtype=BF16), ends_of(sizes[0])
    layers(x, ends)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(x, ends)
    bad = 0
    for each in sizes:
        x.normal_()
        ends.copy_(ends_of(each))
        graph.replay()
        found = out.clone()
        torch.cuda.synchronize()
        with in_turn():
            bad += not torch.equal(found, layers(x, ends))
    print(
        f"three layers in a graph: {bad} of {len(sizes)} differ from launches in turn, {passed()}", flush=True
    )


def recorded(call, sets):
    rotation = itertools.cycle(sets)
    for operands in sets:
        call(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call(*next(rotation))
    graph.replay()
    return graph


def medians(calls, sets):
    """Microseconds a launch of each call."""
    graphs = {name: recorded(call, sets) for name, call in calls.items()}
    found = {name: [] for name in calls}
    for _ in range(7):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) * 1e3 / 20)
    return {name: statistics.median(each) for name, each in found.items()}


def times():
    print("experts x rows (n, k): us of each, bytes of the weight a second of the faster of ours")
    for experts, n, k in SHAPES:
        weights = [weight_of(experts, n, k, seed) for seed in range(2)]
        for each in ROWS[experts]:
            if time.time() - BEGAN > LIMIT:
                print("out of time")
                return
            rows = each * experts
            sets = [
                (rows_of(rows, k, seed), weight, ends_of(sizes_of(rows, experts, seed)))
                for seed, weight in enumerate(weights)
            ]
            us = medians(
                {name: implementation(name) for name in ("few_rows", "gluon", "32", "64", "96")}, sets
            )
            rate = experts * n * k / min(us[form] for form in ("32", "64", "96")) / 1e6
            label = ", ".join(f"{name} {value:.1f}" for name, value in us.items())
            print(f"{experts} x {each} ({n}, {k}): {label}; {rate:.2f} TB/s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_form(sys.argv[2])
        sys.exit()
    compile_forms()
    for part in sys.argv[1:] or ["checks", "times"]:
        {"checks": checks, "times": times}[part]()
    print(passed())
