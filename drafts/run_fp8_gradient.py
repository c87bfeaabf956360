"""Checks and times of experts' FP8 weight gradients: by red.global.add of registers (old), by TMA (new forms).

`PYTHONPATH=src python3 drafts/run_fp8_gradient.py` on an H200: a line a form, then a line a size, about 50 s.
`... rehearse` runs every function here on a CPU, with the definition instead of kernels.
"""

import hashlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benthic.kernels import gluon_expert_gradient, ops
from benthic.kernels.reference import fp8_linear

HERE = Path(__file__).resolve().parent
NEW = HERE.parent / "src/benthic/kernels/gluon_fp8_three_gradient.py"
NEVER, ALWAYS = 0, 1 << 30
FORMS = {  # stages x slots, f: the cache reads old sums early
    "old": (HERE / "old_fp8_gradient.py", {}),
    "4x2": (NEW, {"STAGES": 4, "SLOTS": 2, "FETCHED_ROWS": NEVER}),
    "4x2f": (NEW, {"STAGES": 4, "SLOTS": 2, "FETCHED_ROWS": ALWAYS}),
    "3x4": (NEW, {"STAGES": 3, "SLOTS": 4, "FETCHED_ROWS": NEVER}),
    "3x4f": (NEW, {"STAGES": 3, "SLOTS": 4, "FETCHED_ROWS": ALWAYS}),
}
REHEARSED = "rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
# outputs, inputs, rows of experts: many tiles a program, edges both ways, none, one, chunks that end anywhere
CHECKS = [
    (2816, 2048, [70, 0, 1, 128, 333, 64]),
    (2048, 1408, [70, 0, 1, 128, 333, 64]),
    (208, 144, [0, 63, 65, 1, 0, 129, 1000]),
    (16, 272, [5, 0, 129]),
    (400, 48, [0, 0, 300, 0]),
    (192, 128, [96] * 70),
]
SIZES = [(64, rows, *shape) for shape in ((2816, 2048), (2048, 1408)) for rows in (128, 384, 768, 1536)]
SIZES += [(8, 4096, 4096, 7168)]
LAUNCHES, REPLAYS, REPEATS = 20, 5, 20
if REHEARSED:
    CHECKS, SIZES, REPEATS = CHECKS[2:5], [(3, 100, 48, 32), (2, 200, 32, 48)], 3
    torch.set_num_threads(1)


def module_of(name):
    path, constants = FORMS[name]
    text = path.read_text()
    for constant, value in constants.items():
        value = value if constant == "FETCHED_ROWS" else f"gl.constexpr({value})"
        text, count = re.subn(rf"^{constant} = .*", f"{constant} = {value}", text, flags=re.M)
        assert count == 1, (name, constant)
    folder = Path(tempfile.gettempdir()) / f"fp8_gradient_{hashlib.md5(text.encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    file = folder / f"gradient_{name}.py"
    if not file.exists():
        file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"gradient_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernels_of(name):
    """Adding and making; rehearsed, the definition, called as the kernel can be."""
    module = module_of(name)
    if not REHEARSED:
        return module.add_weight_gradient, module.weight_gradient

    def add(*args, **named):
        inspect.signature(module.add_weight_gradient).bind(*args, **named)
        fp8_linear.add_weight_gradient(*args, **named)

    def make(*args, **named):
        inspect.signature(module.weight_gradient).bind(*args, **named)
        return fp8_linear.weight_gradient(*args, **named)

    return add, make


def add_narrow(into, dy, x, ends, *, fresh):
    """The bfloat16 kernel."""
    if REHEARSED:
        inspect.signature(gluon_expert_gradient.add_grouped_weight_gradient).bind(into, dy, x, ends, fresh=fresh)
        ops.add_weight_gradient(into, dy, x, ends, fresh=fresh)
    else:
        gluon_expert_gradient.add_grouped_weight_gradient(into, dy, x, ends, fresh=fresh)


def rows_of(counts, *widths):
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    return [torch.randn(sum(counts), n, device=DEVICE, dtype=torch.bfloat16) for n in widths], ends


def quantised(parts, ends, counts=None):
    """Column tiles; with `counts`, NaN in all that belongs to no expert."""
    found = [ops.quantise_fp8_columns(part, ends) for part in parts]
    if counts is not None:
        used = sum(-(-n // 128) for n in counts)
        for part in found:
            part.values.view(torch.uint8)[:, used * 128 :] = 0x7F  # NaN
            part.scale[:, used:] = float("nan")
    return found


def exactly(dy, x, counts):
    """The definition in float64, chunk for chunk, of what was quantised."""
    wide = [p.values.double() * p.scale.double().repeat_interleave(128, 1) for p in (dy, x)]
    found, first = [], 0
    for n in counts:
        last = first + -(-n // 128) * 128
        found.append(wide[0][:, first:last] @ wide[1][:, first:last].T)
        first = last
    return torch.stack(found)


def error(got, want):
    off = (got.double() - want).abs().max() / want.abs().max()
    return off.item()  # NaN where anything is


def check(name):
    """Against the definition, against the old kernel's bits, against itself."""
    (add, make), (old_add, old_make) = kernels_of(name), kernels_of("old")
    worst, narrow, same, as_old = [], [], True, True
    torch.manual_seed(1)
    for o_dim, i_dim, counts in CHECKS:
        parts, ends = rows_of(counts, o_dim, i_dim)
        dy, x = quantised(parts, ends, counts)
        want = exactly(dy, x, counts)
        before = torch.randn(want.shape, device=DEVICE)
        runs = []
        for _ in range(REPEATS):
            into, fresh = before.clone(), torch.full_like(before, float("nan"))
            add(into, dy, x, ends, fresh=False)
            add(fresh, dy, x, ends, fresh=True)
            runs.append((into, fresh))
        same &= all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
        into, fresh = runs[0]
        without = torch.tensor(counts, device=DEVICE) == 0
        same &= torch.equal(into[without], before[without]) and not fresh[without].any()
        old_into, old_fresh = before.clone(), torch.full_like(before, float("nan"))
        old_add(old_into, dy, x, ends, fresh=False)
        old_add(old_fresh, dy, x, ends, fresh=True)
        half, old_half = (f(dy, x, ends, dtype=torch.bfloat16) for f in (make, old_make))
        as_old &= torch.equal(into, old_into) and torch.equal(fresh, old_fresh) and torch.equal(half, old_half)
        odd = torch.zeros(before.numel() + 1, device=DEVICE)[1:].view_as(before)  # begins at no 16 bytes
        add(odd, dy, x, ends, fresh=False)
        worst += [error(into, before.double() + want), error(fresh, want), error(odd, want)]
        narrow.append(error(half, want))
        whole = quantised(parts, None)  # one weight alone
        found, old = (f(*whole, None, dtype=torch.float32) for f in (make, old_make))
        alone = exactly(*whole, [sum(counts)])[0]
        worst.append(error(found, alone))
        as_old &= torch.equal(found, old)
        if name == "4x2":
            through_op = before.clone()
            ops.add_fp8_weight_gradient(through_op, dy, x, ends)
            as_old &= torch.equal(through_op, old_into)
    good = all(e < 1e-3 for e in worst) and all(e < 6e-3 for e in narrow)
    print(f"{'right' if good and same and as_old else 'WRONG':5} {name:5} fp32 {max(worst):.1e} bf16 "
          f"{max(narrow):.1e} repeats {same} as old {as_old}")  # fmt: skip


def compile_narrow():
    """All that is timed beside the forms, so that nothing is compiled then."""
    torch.manual_seed(1)
    few, many = ([40, 60], [70, 50]) if REHEARSED else ([400, 60], [4000, 5000])
    for o_dim, i_dim in sorted({size[2:] for size in SIZES}):
        for counts in (few, many):
            parts, ends = rows_of(counts, o_dim, i_dim)
            quantised(parts, ends)
            into = torch.zeros(len(counts), o_dim, i_dim, device=DEVICE)
            for fresh in (False, True):
                add_narrow(into, *parts, ends, fresh=fresh)
    exact = parts[0].float()[counts[0] :].T @ parts[1].float()[counts[0] :]
    print(f"bf16  within {error(into[-1], exact.double()):.0e}")


def replayed(call):
    """A function that makes `LAUNCHES` calls and gives what measures them in microseconds."""
    call(0)
    call(1)
    if REHEARSED:

        def run():
            begun = time.perf_counter()
            for at in range(2):
                call(at)
            took = (time.perf_counter() - begun) * 1e6 / 2
            return lambda: took

        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at in range(LAUNCHES):
            call(at)

    def run():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3 / LAUNCHES

    return run


def medians(calls):
    """Of each call, taken in turns, in microseconds."""
    runs = {name: replayed(call) for name, call in calls.items()}
    spans = {name: [] for name in calls}
    for _ in range(REPLAYS):
        for name, run in runs.items():
            spans[name].append(run())
    if not REHEARSED:
        torch.cuda.synchronize()
    return {name: sorted(span() for span in each)[REPLAYS // 2] for name, each in spans.items()}


def time_all(kernels):
    for experts, rows, o_dim, i_dim in SIZES:
        torch.manual_seed(rows)
        drawn = torch.distributions.Dirichlet(torch.full((experts,), 8.0)).sample() * experts * rows
        sets = []
        for _ in range(2):
            parts, ends = rows_of(drawn.int().tolist(), o_dim, i_dim)
            into = torch.zeros(experts, o_dim, i_dim, device=DEVICE)
            sets.append((into, quantised(parts, ends), parts, ends))
        for fresh in (False, True):
            calls = {
                name: lambda at, f=fresh, k=add: k(sets[at % 2][0], *sets[at % 2][1], sets[at % 2][3], fresh=f)
                for name, add in kernels.items()
                if not (fresh and name.endswith("f"))  # written, nothing is fetched
            }
            calls["bf16"] = lambda at, f=fresh: add_narrow(
                sets[at % 2][0], *sets[at % 2][2], sets[at % 2][3], fresh=f
            )
            took = medians(calls)
            moved, flops = sets[0][0].numel() * (4 if fresh else 8), 2 * len(sets[0][2][0]) * i_dim * o_dim
            print(f"{'write' if fresh else 'add':5} {experts}x{rows} {i_dim}->{o_dim} us | products "
                  f"{flops / 1150e6:.0f} sums {moved / 4.2e6:.0f} | "
                  + " ".join(f"{name} {us:.0f}" for name, us in took.items()), flush=True)  # fmt: skip


def main():
    begun = time.time()
    if len(sys.argv) > 1 and sys.argv[1] in FORMS:
        check(sys.argv[1])
        return
    if len(sys.argv) > 1 and sys.argv[1] == "bf16":
        compile_narrow()
        return
    more = ["rehearse"] if REHEARSED else []
    checks = {
        n: subprocess.Popen([sys.executable, __file__, n, *more], stdout=subprocess.PIPE, text=True)
        for n in (*FORMS, "bf16")
    }
    good = {}
    for name, process in checks.items():
        try:
            text, _ = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"HANGS {name}\n"
        print(text or f"FAILS {name}\n", end="", flush=True)
        good[name] = process.returncode == 0 and "HANGS" not in text
    print(f"checked in {time.time() - begun:.0f} s")
    time_all({name: kernels_of(name)[0] for name in FORMS if good[name]})
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
