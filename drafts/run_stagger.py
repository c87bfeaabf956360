"""Weight gradients of experts whose programs begin apart, so that not all write at once. python run_stagger.py [--until S]"""
import argparse, importlib, statistics, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import torch
from benthic.kernels import gluon_fp8_three_gradient as now8, gluon_expert_gradient as now16, ops
T0 = time.time(); DEV = "cuda"
three = {ns: importlib.import_module(f"three_stagger_{ns}") for ns in (400, 800, 1600)}
wide = {ns: importlib.import_module(f"expert_stagger_{ns}") for ns in (400, 800, 1600)}

def sizes_of(avg, experts, spread):
    if spread is None: return [avg] * experts
    g = torch.Generator().manual_seed(avg)
    return torch.bincount(torch.multinomial(torch.exp(spread * torch.randn(experts, generator=g)), avg * experts, replacement=True, generator=g), minlength=experts).tolist()

def ends(s): return torch.tensor(s, device=DEV).cumsum(0).to(torch.int32)

def record(body, count):
    st = torch.cuda.Stream()
    with torch.cuda.stream(st): body(0)
    torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(count): body(i)
    return g

def turned(graphs, count, turns=10):
    t = {n: [] for n in graphs}; names = list(graphs)
    for g in graphs.values(): g.replay()
    for turn in range(turns):
        for n in names[turn % len(names):] + names[:turn % len(names)]:
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); graphs[n].replay(); b.record(); b.synchronize(); t[n].append(a.elapsed_time(b) * 1e3 / count)
    return {n: statistics.median(x) for n, x in t.items()}

def main():
    p = argparse.ArgumentParser(); p.add_argument("--until", type=float, default=80); until = p.parse_args().until
    torch.set_grad_enabled(False); count = 6
    for o, i, cases in ((2816, 2048, ((64, 1536, None), (64, 1536, .1), (64, 384, .1))), (2048, 1408, ((64, 1536, None), (64, 1536, .1))), (4096, 7168, ((8, 4096, None),))):
        for experts, avg, spread in cases:
            if time.time() - T0 > until: print("no time"); return
            s = sizes_of(avg, experts, spread); e, rows = ends(s), sum(s)
            dy, x = (torch.randn(rows, n, device=DEV, dtype=torch.bfloat16) for n in (o, i))
            q = [ops.quantise_fp8_columns(each, e) for each in (dy, x)]
            into = torch.zeros(experts, o, i, device=DEV)
            for fresh in (True, False):
                ways = {"now": now8, **{f"{ns} ns": m for ns, m in three.items()}, "now2": now8}
                graphs = {n: record(lambda _, m=m: m.add_weight_gradient(into, *q, e, fresh=fresh), count) for n, m in ways.items()}
                flop = 2 * rows * o * i
                print(f"fp8 {experts}x{avg} sp {spread} ({o}, {i}) {'written' if fresh else 'added'}: " + ", ".join(f"{n} {us:.0f} ({flop/us/1e6:.0f})" for n, us in turned(graphs, count).items()), flush=True)
                ways = {"now": now16, **{f"{ns} ns": m for ns, m in wide.items()}, "now2": now16}
                graphs = {n: record(lambda _, m=m: m.add_grouped_weight_gradient(into, dy, x, e, fresh=fresh), count) for n, m in ways.items()}
                print(f"bf16 the same: " + ", ".join(f"{n} {us:.0f} ({flop/us/1e6:.0f})" for n, us in turned(graphs, count).items()), flush=True)
                del graphs
    print(f"end {time.time()-T0:.0f} s")
main()
