"""On one H200: right, in graphs, then how fast with which tiling. python /tmp/few_check.py [checks|sweep|down]"""
import math, sys
import torch
from benthic.kernels import ops, triton_few_rows
SHAPES = {"q": (2048, 3072), "kv_a": (2048, 576), "o": (2048, 2048), "gate_up": (2048, 5632), "down": (2816, 2048)}
dev = "cuda"
def r(*s, seed=0): return torch.randn(*s, generator=torch.Generator(dev).manual_seed(seed), device=dev, dtype=torch.float32).bfloat16()
def graph(run):
    run(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): run()
    return g
def us(g, count, reps=20):
    for _ in range(3): g.replay()
    t = []
    for _ in range(reps):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); g.replay(); b.record(); torch.cuda.synchronize(); t.append(a.elapsed_time(b) * 1e3 / count)
    return sorted(t)[reps // 2]
@torch.inference_mode()
def sweep(tilings):
    gain = torch.ones(7168, device=dev, dtype=torch.bfloat16)
    for name, (k, n) in SHAPES.items():
        count = math.ceil((256 << 20) / (k * n * 2)); ws = [r(n, k, seed=i) for i in range(count)]
        for rows in (1, 8):
            x = r(rows, k, seed=999); exact = x.double() @ ws[0].double().t(); floor = k * n * 2 / 4.3e6
            print(f"{name} rows {rows}: bytes {floor:.2f} us", flush=True)
            def alone(impl): return graph(lambda: [ops.linear(x, w, impl=impl) for w in ws])
            # between products a small kernel launched early, as norms are in a step; its own time is shown apart
            def behind(impl): return graph(lambda: [ops.linear(ops.rms_norm(x, gain[:k], 1e-6), w, impl=impl) for w in ws])
            norm = us(graph(lambda: [ops.rms_norm(x, gain[:k], 1e-6) for _ in ws]), count)
            print(f"   norm alone {norm:.2f}\n   library           chain {us(alone('torch'), count):6.2f}  with norm {us(behind('torch'), count):6.2f}", flush=True)
            for t in tilings:
                triton_few_rows.held = (lambda _n, t=t: t) if t else HELD
                found = ops.linear(x, ws[0], impl="few_rows").double()
                err = float((found - exact).norm() / exact.norm())
                print(f"   {str(t or HELD(n)):17} chain {us(alone('few_rows'), count):6.2f}  with norm {us(behind('few_rows'), count):6.2f}  err {err:.1e}", flush=True)
        del ws
HELD = triton_few_rows.held
sweep([None] if "default" in sys.argv else [None, (16, 8, 256), (8, 8, 128), (4, 8, 128), (16, 4, 128), (16, 4, 256), (8, 4, 128), (16, 16, 64), (16, 16, 128)])
