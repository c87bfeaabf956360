"""One H200, PYTHONPATH=src of the branch: bits of experts' products against the kernel before, then times."""
import importlib.util, itertools, statistics, sys, time, traceback
from pathlib import Path
import torch
from benthic.kernels import ops, gluon_grouped as new

spec = importlib.util.spec_from_file_location("h1_old_grouped", Path(__file__).with_name("h1_old_grouped.py"))
old = importlib.util.module_from_spec(spec); sys.modules["h1_old_grouped"] = old; spec.loader.exec_module(old)
START, BF16, bad = time.time(), torch.bfloat16, 0

def made(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=torch.float32).to(BF16)

def ends_of(sizes):
    return torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)

def check(label, run):
    global bad
    try:
        found, expected = run()
        torch.cuda.synchronize()
        same = torch.equal(found, expected)
        if not same:
            bad += 1
            wrong = (found != expected) & ~(found.isnan() & expected.isnan())
            at = wrong.nonzero()
            print(f"MISMATCH {label}: {int(wrong.sum())} of {wrong.numel()}, first {at[0].tolist() if len(at) else 'NaN'} last {at[-1].tolist() if len(at) else ''} nan {int(found.isnan().sum())}", flush=True)
    except Exception:
        bad += 1
        print(f"FAILED {label}"); traceback.print_exc(limit=4)
        if "CUDA" in traceback.format_exc() or "illegal" in traceback.format_exc():
            sys.exit(1)

RAGGED = [
    (0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 319, 320, 321, 364, 384, 404, 448, 449, 511, 512, 513),
    (1,), (0, 0, 0), (64,), (65,), (700, 0, 3, 129), (6144, 17, 0, 1023), (384,) * 64,
]
print(torch.cuda.get_device_name(), torch.__version__)
for sizes, (inner, outer), spare in itertools.product(RAGGED, ((64, 64), (192, 320), (192, 384), (2048, 2816), (1408, 2048)), (0, 70)):
    if inner * outer > 1e6 and spare:
        continue
    ends, rows = ends_of(sizes), sum(sizes)
    x, w = made(rows + spare, inner, seed=1), made(len(sizes), outer, inner, seed=2)
    x[rows:] = float("nan")  # they belong to nobody
    g = made(rows + spare, outer, seed=3)
    if rows + spare:
        tag = f"{sizes if len(sizes) < 9 else len(sizes)} {inner}->{outer} +{spare}"
        check(f"turned  {tag}", lambda: (new.multiply(x, w.transpose(1, 2), ends), old.multiply(x, w.transpose(1, 2), ends)))
        check(f"upright {tag}", lambda: (new.multiply(g, w, ends), old.multiply(g, w, ends)))
        if outer % 128 == 0:
            check(f"swiglu  {tag}", lambda: (ops.grouped_swiglu(x, w, ends, impl="gluon"), ops.swiglu(old.multiply(x, w.transpose(1, 2), ends))))
ends = ends_of((200, 3, 500))  # large gates: silu saturates either way
x, w = made(703, 256, seed=1) * 30, made(3, 512, 256, seed=2)
check("swiglu, large", lambda: (ops.grouped_swiglu(x, w, ends, impl="gluon"), ops.swiglu(old.multiply(x, w.transpose(1, 2), ends))))
check("again", lambda: (ops.grouped_swiglu(x, w, ends, impl="gluon"), ops.grouped_swiglu(x, w, ends, impl="gluon")))
print(f"bits: {bad} wrong, {time.time() - START:.0f} s", flush=True)

def binomial(mean, experts=64):
    """Rows of each expert when mean * experts copies choose at random, seed fixed."""
    g = torch.Generator().manual_seed(mean)
    chosen = torch.randint(experts, (mean * experts,), generator=g)
    return torch.bincount(chosen, minlength=experts).tolist()

def timed(runs, sets, repeats):
    """Median us of each, in turns over rotating operands, so that clocks are shared."""
    for run in runs.values():
        for operands in sets:
            run(*operands)
    found = {name: [] for name in runs}
    rotation = itertools.cycle(sets)
    torch.cuda._sleep(100_000_000)
    for _ in range(repeats):
        for name, run in runs.items():
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            operands = next(rotation)
            pair[0].record(); run(*operands); pair[1].record()
            found[name].append(pair)
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 for name, pairs in found.items()}

print(f"{'rows an expert':>14} {'product':>22} {'old us':>8} {'new us':>8} {'new/old':>8} {'new TF/s':>9} | {'old+swiglu':>10} {'new+swiglu':>10} {'fused':>8} {'saved':>6} {'TF/s':>6} | torch us")
for mean in (96, 192, 384, 1536, 6144):
    sizes = binomial(mean)
    rows, ends = sum(sizes), ends_of(sizes)
    for k, n, turned in ((2048, 2816, True), (1408, 2048, True), (2816, 2048, False), (2048, 1408, False)):
        if time.time() - START > 52:
            print("out of time"); break
        shape = (64, n, k) if turned else (64, k, n)
        sets = [(made(rows, k, seed=s), made(*shape, seed=9 + s)) for s in range(2 if mean > 400 else 3)]
        view = (lambda w: w.transpose(1, 2)) if turned else (lambda w: w)
        runs = {
            "old": lambda x, w: old.multiply(x, view(w), ends),
            "new": lambda x, w: new.multiply(x, view(w), ends),
            "torch": lambda x, w: torch.nn.functional.grouped_mm(x, view(w), offs=ends),
        }
        if (k, n) == (2048, 2816):
            runs |= {
                "old+swiglu": lambda x, w: ops.swiglu(old.multiply(x, view(w), ends)),
                "new+swiglu": lambda x, w: ops.swiglu(new.multiply(x, view(w), ends)),
                "fused": lambda x, w: ops.grouped_swiglu(x, w, ends, impl="gluon"),
            }
        with torch.inference_mode():
            t = timed(runs, sets, 15 if mean > 2000 else 25)
        flops = 2 * rows * k * n / 1e6
        line = f"{mean:14} {f'{k}->{n} ' + ('turned' if turned else 'upright'):>22} {t['old']:8.1f} {t['new']:8.1f} {t['new'] / t['old']:8.3f} {flops / t['new']:9.0f} |"
        if "fused" in t:
            line += f" {t['old+swiglu']:10.1f} {t['new+swiglu']:10.1f} {t['fused']:8.1f} {t['old+swiglu'] - t['fused']:6.1f} {flops / t['fused']:6.0f} |"
        else:
            line += f" {'':44} |"
        print(line, f"{t['torch']:.1f}", flush=True)
        del sets
print(f"{bad} wrong bits; {time.time() - START:.0f} s")
