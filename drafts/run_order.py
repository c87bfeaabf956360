"""Ways of experts' products in rotated order, the first one twice. python run_order.py [--until S]"""
import argparse, importlib, sys, time, statistics
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent)); sys.path.insert(0, "/tmp")
import torch
src = (Path(__file__).parent / "run_queue.py").read_text().rsplit("\nmain()", 1)[0]
exec(src)


def turned_order(graphs, count, turns=12):
    t = {n: [] for n in graphs}; names = list(graphs)
    for g in graphs.values(): g.replay()
    for turn in range(turns):
        for n in names[turn % len(names):] + names[:turn % len(names)]:
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); graphs[n].replay(); b.record(); b.synchronize()
            t[n].append(a.elapsed_time(b) * 1e3 / count)
    return {n: statistics.median(x) for n, x in t.items()}

def go():
    p = argparse.ArgumentParser(); p.add_argument("--until", type=float, default=80); until = p.parse_args().until
    torch.set_grad_enabled(False); count = 10
    ok = True
    for sizes in ([384] * 64, sizes_of(300, 64, .4), [0] * 7 + [1] + [700] * 8):
        e, rows = ends(sizes), sum(sizes) + 70
        x, w = Q(torch.randn(rows, 640, device=DEV).bfloat16()), ops.quantise_fp8_weight(torch.randn(len(sizes), 512, 640, device=DEV).bfloat16())
        want = old_3.linear(x, w, e, dtype=torch.bfloat16)
        for m in (new_3,): ok &= all(torch.equal(m.linear(x, w, e, dtype=torch.bfloat16), want) for _ in range(5))
    print("bits", ok, flush=True)
    for nn, kk, cases in ((2816, 2048, [(64, a, s) for a, s in ((1536, None), (1536, .1), (384, None), (384, .1), (192, .1), (96, .3))]), (2048, 1408, [(64, a, s) for a, s in ((1536, None), (1536, .1), (384, .1))]),
                      (4096, 7168, [(32, 256, None), (32, 256, .1), (8, 4096, None)]), (7168, 2048, [(32, 256, None), (32, 256, .1), (8, 4096, None)])):
        w = None
        for experts, avg, spread in cases:
            if time.time() - T0 > until: print("no time"); return
            if w is None or w[0].values.shape[0] != experts: w = [ops.quantise_fp8_weight(torch.randn(experts, nn, kk, device=DEV, dtype=torch.bfloat16)) for _ in range(2)]
            s = sizes_of(avg, experts, spread); e = ends(s)
            x = [Q(torch.randn(sum(s), kk, device=DEV, dtype=torch.bfloat16)) for _ in range(2)]
            graphs, keep = {}, []
            for name, m in (("old", old_3), ("new", new_3), ("old2", old_3), ("new2", new_3), ("two", two)):
                g, o = record(lambda i, m=m: m.linear(x[i % 2], w[i % 2], e, dtype=torch.bfloat16), count); graphs[name] = g; keep.append(o)
            flop = 2 * sum(s) * nn * kk
            print(f"fp8 {experts}x{avg} sp {spread} ({kk}->{nn}): " + ", ".join(f"{m} {us:.1f} ({flop/us/1e6:.0f})" for m, us in turned_order(graphs, count).items()), flush=True)
            del graphs, keep
    for nn, kk, kind, cases in ((2816, 2048, "turned", [(64, a, s) for a, s in ((1536, None), (1536, .1))]), (2816, 2048, "upright", [(64, a, s) for a, s in ((1536, None), (1536, .1), (48, .3), (96, .3), (192, .1))]), (7168, 2048, "turned", [(8, 4096, None)])):
        w = None
        for experts, avg, spread in cases:
            if time.time() - T0 > until: print("no time"); return
            if w is None: w = [torch.randn(experts, nn, kk, device=DEV, dtype=torch.bfloat16) for _ in range(2)]
            s = sizes_of(avg, experts, spread); e = ends(s)
            x = [torch.randn(sum(s), nn if kind == "upright" else kk, device=DEV, dtype=torch.bfloat16) for _ in range(2)]
            ways = bf16_ways(kind) | {"old2": bf16_ways(kind)["old"], "new2": bf16_ways(kind)["new"], "torch": (lambda x, w, e: torch._grouped_mm(x, w, e)) if kind == "upright" else lambda x, w, e: torch._grouped_mm(x, w.transpose(1, 2), e)}
            graphs, keep = {}, []
            for name, run in ways.items():
                if name == "table": continue
                g, o = record(lambda i, run=run: run(x[i % 2], w[i % 2], e), count); graphs[name] = g; keep.append(o)
            flop = 2 * sum(s) * nn * kk
            print(f"bf16 {kind} {experts}x{avg} sp {spread} ({kk}->{nn}): " + ", ".join(f"{m} {us:.1f} ({flop/us/1e6:.0f})" for m, us in turned_order(graphs, count).items()), flush=True)
            del graphs, keep
    print(f"end {time.time()-T0:.0f} s")
go()
