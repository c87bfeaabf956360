"""Experts' products whose tiles are taken from a counter, beside every so-manieth: bits, then times. python run_queue.py [--until S]"""
import argparse, itertools, statistics, sys, time, concurrent.futures, multiprocessing
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parent))
import old_gluon_grouped as old_g, old_gluon_fp8_three as old_3
from benthic.kernels import gluon_grouped as new_g, gluon_fp8_three as new_3, gluon_fp8 as two, ops
T0 = time.time(); DEV = "cuda"

def sizes_of(avg, experts, spread, seed=0):
    if spread is None: return [avg] * experts
    g = torch.Generator().manual_seed(seed + avg)
    w = torch.exp(spread * torch.randn(experts, generator=g))
    return torch.bincount(torch.multinomial(w, avg * experts, replacement=True, generator=g), minlength=experts).tolist()

def Q(x): return ops.Fp8(*ops.quantise_fp8_rows(x, by_column=True))

def ends(s): return torch.tensor(s, device=DEV).cumsum(0).to(torch.int32)

def record(body, count):
    st = torch.cuda.Stream()
    with torch.cuda.stream(st): body(0)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(count): out = body(i)
    return g, out

def timed(graphs, count, turns=7):
    t = {n: [] for n in graphs}
    for g in graphs.values(): g.replay()
    for _ in range(turns):
        for n, g in graphs.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); g.replay(); b.record(); b.synchronize()
            t[n].append(a.elapsed_time(b) * 1e3 / count)
    return {n: statistics.median(x) for n, x in t.items()}

def bf16_ways(kind):
    def run(m):
        if kind == "gated": return lambda x, w, e: m.grouped_swiglu(x, w, e)
        lies = (lambda w: w.transpose(1, 2)) if (kind == "turned") == (m is old_g) else (lambda w: w)  # old: [E, K, N]
        return lambda x, w, e: m.multiply(x, lies(w), e)
    ways = {"old": run(old_g), "new": run(new_g)}
    if kind == "turned": ways["torch"] = lambda x, w, e: torch._grouped_mm(x, w.transpose(1, 2), e)
    if kind == "gated": ways["table"] = lambda x, w, e: ops.grouped_swiglu(x, w, e)
    if kind == "turned": ways["table"] = lambda x, w, e: ops.grouped_linear(x, w, e)
    return ways

def bits():
    bad = 0
    for sizes in ([384] * 64, sizes_of(384, 64, .3), sizes_of(1536, 64, .1), [0] * 7 + [1] + [700] * 8, [5000, 0, 3], sizes_of(100, 64, .5)):
        e, rows = ends(sizes), sum(sizes) + 70
        x = torch.randn(rows, 2048, device=DEV).bfloat16(); x[rows - 70:] = torch.nan
        w = torch.randn(len(sizes), 2816, 2048, device=DEV).bfloat16() / 45
        for kind in ("gated", "turned", "upright"):
            ww = w if kind != "upright" else w.transpose(1, 2).contiguous()
            ways = bf16_ways(kind); exact = ways["old"](x, ww, e)
            out = [ways["new"](x, ww, e) for _ in range(10)]
            ok = all(torch.equal(o, exact) for o in out); bad += not ok
            if not ok: print("BAD", kind, sizes[:4])
        xq, wq = Q(x.nan_to_num(0)), ops.quantise_fp8_weight(w)
        exact = old_3.linear(xq, wq, e, dtype=torch.bfloat16)
        ok = all(torch.equal(new_3.linear(xq, wq, e, dtype=torch.bfloat16), exact) for _ in range(10)); bad += not ok
        if not ok: print("BAD fp8", sizes[:4])
    one = Q(x[:1000].nan_to_num(0)); w1 = ops.quantise_fp8_weight(w[0])
    bad += not torch.equal(new_3.linear(one, w1, None, dtype=torch.bfloat16), old_3.linear(one, w1, None, dtype=torch.bfloat16))
    print("BITS", "all equal" if not bad else f"{bad} BAD", f"{time.time()-T0:.0f} s", flush=True)

def main():
    p = argparse.ArgumentParser(); p.add_argument("--until", type=float, default=110); until = p.parse_args().until
    torch.set_grad_enabled(False)
    bits()
    W = {}
    def weight(e, n, k, n_sets=2):
        if (e, n, k) not in W:
            W.clear(); W[e, n, k] = [torch.randn(e, n, k, device=DEV, dtype=torch.bfloat16) / k ** .5 for _ in range(n_sets)]
        return W[e, n, k]
    count = 10
    cases = [(64, a, s) for a, s in ((384, .1), (384, None), (48, .3), (64, .3), (96, .3), (128, .3), (192, .1), (256, .1), (768, .1), (1536, .1), (1536, None), (6144, .1))] + [(32, 256, None), (32, 256, .1), (8, 4096, None), (8,4096,.1)]
    for n, k, kind in ((2816, 2048, "gated"), (2048, 1408, "turned"), (1408, 2048, "upright")):
        for experts, avg, spread in cases:
            if experts < 64 and kind != "turned": continue
            if kind == "upright" and avg not in (384, 1536): continue
            if time.time() - T0 > until: print("no time"); return
            nn, kk = (7168, 2048) if experts < 64 else (n, k)
            w = weight(experts, nn, kk)
            if kind == "upright": w = [x.transpose(1, 2).contiguous() for x in w]
            s = sizes_of(avg, experts, spread); e = ends(s)
            x = [torch.randn(sum(s), w[0].shape[1] if kind == "upright" else kk, device=DEV, dtype=torch.bfloat16) for _ in range(2)]
            graphs, keep = {}, []
            for name, run in bf16_ways(kind).items():
                g, o = record(lambda i, run=run: run(x[i % 2], w[i % 2], e), count); graphs[name] = g; keep.append(o)
            flop = 2 * sum(s) * nn * kk
            print(f"bf16 {kind} {experts}x{avg} sp {spread} ({kk}->{nn}): " + ", ".join(f"{m} {us:.1f} ({flop/us/1e6:.0f})" for m, us in timed(graphs, count).items()), flush=True)
            del graphs, keep
    for n, k in ((2816, 2048), (2048, 1408)):
        for experts, avg, spread in [(64, a, s) for a, s in ((96, .3), (192, .1), (256, .1), (384, None), (384, .1), (768, .1), (1536, None), (1536, .1))] + [(32, 256, None), (32, 256, .1), (32, 256, .3), (8, 4096, .1), (4, 8192, .1)]:
            if time.time() - T0 > until: print("no time"); return
            nn, kk = ((4096, 7168) if n == 2816 else (7168, 2048)) if experts < 64 else (n, k)
            w = [ops.quantise_fp8_weight(x) for x in weight(experts, nn, kk)]
            s = sizes_of(avg, experts, spread); e = ends(s)
            x = [Q(torch.randn(sum(s), kk, device=DEV, dtype=torch.bfloat16)) for _ in range(2)]
            graphs, keep = {}, []
            for name, m in (("old", old_3), ("new", new_3), ("two", two)):
                g, o = record(lambda i, m=m: m.linear(x[i % 2], w[i % 2], e, dtype=torch.bfloat16), count); graphs[name] = g; keep.append(o)
            flop = 2 * sum(s) * nn * kk
            print(f"fp8 {experts}x{avg} sp {spread} ({kk}->{nn}): " + ", ".join(f"{m} {us:.1f} ({flop/us/1e6:.0f})" for m, us in timed(graphs, count).items()), flush=True)
            del graphs, keep
    print(f"end {time.time()-T0:.0f} s")
main()
