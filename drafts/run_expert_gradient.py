"""Checks and times of experts' weight gradients: the kernel with atomics of registers beside new ones.

`PYTHONPATH=src python3 drafts/run_expert_gradient.py` on an H200; one line a variant, then one a size.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
NEW = HERE.parent / "src/benthic/kernels/gluon_expert_gradient.py"
VARIANTS = {
    "old": (HERE / "expert_gradient_atomic.py", {}),
    "4x2": (NEW, {"STAGES": 4, "SLOTS": 2, "FETCH": False}),
    "4x2f": (NEW, {"STAGES": 4, "SLOTS": 2, "FETCH": True}),
    "3x4": (NEW, {"STAGES": 3, "SLOTS": 4, "FETCH": False}),
    "3x4f": (NEW, {"STAGES": 3, "SLOTS": 4, "FETCH": True}),
    "read": (HERE / "expert_gradient_read.py", {}),
}
SHAPES = [(2048, 2816), (1408, 2048)]
# input, output, rows of experts: both orders of operands, edges, no rows, one row, blocks that end anywhere
CHECKS = [
    (2048, 2816, [70, 0, 1, 128, 333, 64]),
    (1408, 2048, [70, 0, 1, 128, 333, 64]),
    (200, 136, [5, 0, 129, 64, 1000]),
    (136, 200, [5, 0, 129, 64, 1000]),
    (264, 248, [0, 77, 63, 0, 65]),
    (2056, 1416, [130, 40, 0]),
    (512, 256, [96] * 70),
]
CUDA = torch.device("cuda")


def module_of(name):
    path, constants = VARIANTS[name]
    text = path.read_text()
    for constant, value in constants.items():
        text, count = re.subn(rf"^{constant} = .*", f"{constant} = gl.constexpr({value})", text, flags=re.M)
        assert count == 1, (name, constant)
    folder = Path(tempfile.gettempdir()) / f"expert_gradient_{hashlib.md5(text.encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    file = folder / f"gradient_{name}.py"
    if not file.exists():
        file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"gradient_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def operands(i_dim, o_dim, counts, tail=0):
    rows = sum(counts) + tail
    x = torch.randn(rows, i_dim, device=CUDA, dtype=torch.bfloat16)
    dy = torch.randn(rows, o_dim, device=CUDA, dtype=torch.bfloat16)
    if tail:
        x[-tail:], dy[-tail:] = float("nan"), float("nan")
    return dy, x, torch.tensor(counts, device=CUDA).cumsum(0).int()


def expected(dy, x, counts):
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    pairs = zip(starts[:-1], starts[1:], strict=True)
    return torch.stack([dy[a:b].float().T @ x[a:b].float() for a, b in pairs])


def error(got, want):
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def check(name):
    kernel, worst, narrow, squares_off, same = module_of(name), 0.0, 0.0, 0.0, True
    torch.manual_seed(1)
    for i_dim, o_dim, counts in CHECKS:
        dy, x, ends = operands(i_dim, o_dim, counts, tail=3)
        want = expected(dy, x, counts)
        before = torch.randn_like(want)
        runs = []
        for _ in range(20):
            into = before.clone()
            kernel.add_grouped_weight_gradient(into, dy, x, ends, fresh=False)
            fresh = torch.full_like(want, float("nan"))
            squares = kernel.add_grouped_weight_gradient(fresh, dy, x, ends, fresh=True, squares=True)
            again = torch.full_like(want, float("nan"))
            kernel.add_grouped_weight_gradient(again, dy, x, ends, fresh=True)
            same &= torch.equal(again, fresh)
            runs.append((into, fresh, squares))
        same &= all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
        into, fresh, squares = runs[0]
        worst = max(worst, error(into, before + want), error(fresh, want))
        without = torch.tensor(counts, device=CUDA) == 0
        same &= torch.equal(into[without], before[without])
        squares_off = max(squares_off, abs(squares.double().sum() / want.double().square().sum() - 1).item())
        out = kernel.grouped_weight_gradient(dy, x, ends, dtype=torch.bfloat16)
        narrow = max(narrow, error(out, want))
        if name != "old":  # a sum that does not begin at 16 bytes
            odd = torch.zeros(want.numel() + 1, device=CUDA)[1:].view_as(want)
            kernel.add_grouped_weight_gradient(odd, dy, x, ends, fresh=False)
            worst = max(worst, error(odd, want))
    right = worst < 3e-5 and narrow < 5e-3 and squares_off < 1e-4 and same
    print(f"{'right' if right else 'WRONG':5} {name:5} fp32 {worst:.1e} bf16 {narrow:.1e} squares {squares_off:.1e} same {same}")


def median(calls, times=20):
    """Of each call, taken in turns, in microseconds."""
    spans = {name: [] for name in calls}
    for name, call in calls.items():
        call()
    for _ in range(times):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            spans[name].append((start, end))
    torch.cuda.synchronize()
    return {n: sorted(a.elapsed_time(b) for a, b in s)[times // 2] * 1e3 for n, s in spans.items()}


def time_all(kernels):
    sizes = [(64, rows, *shape) for shape in SHAPES for rows in (128, 384, 1536)] + [(8, 4096, 7168, 4096)]
    for experts, rows, i_dim, o_dim in sizes:
        torch.manual_seed(rows)
        drawn = torch.distributions.Dirichlet(torch.full((experts,), 8.0)).sample() * experts * rows
        dy, x, ends = operands(i_dim, o_dim, drawn.int().tolist())
        into = torch.zeros(experts, o_dim, i_dim, device=CUDA)
        for fresh in (False, True):
            calls = {
                name: lambda k=kernel, f=fresh: k.add_grouped_weight_gradient(into, dy, x, ends, fresh=f)
                for name, kernel in kernels.items()
            }
            took = median(calls)
            moved, flops = into.numel() * (4 if fresh else 8), 2 * len(x) * i_dim * o_dim
            floor = max(moved / 4.2e6, flops / 650e6)
            print(
                f"{'write' if fresh else 'add':5} {experts}x{rows} {i_dim}->{o_dim} us floor {floor:.0f} | "
                + " ".join(f"{name} {us:.0f}" for name, us in took.items()),
                flush=True,
            )


def main():
    begun = time.time()
    if len(sys.argv) > 1:
        check(sys.argv[1])
        return
    checks = {n: subprocess.Popen([sys.executable, __file__, n], stdout=subprocess.PIPE, text=True) for n in VARIANTS}
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
    time_all({name: module_of(name) for name in VARIANTS if good[name]})
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
