"""Weight gradients of experts that leave in other ways: python run_grad.py [--warm NAME] [--until S]"""
import argparse, importlib, statistics, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import torch
from benthic.kernels import gluon_fp8_three_gradient as now8, gluon_expert_gradient as now16, ops
T0 = time.time(); DEV = "cuda"
p = argparse.ArgumentParser(); p.add_argument("--until", type=float, default=80); p.add_argument("--warm"); words = p.parse_args()
EIGHT, WIDE = ("c2",), ()
def load(prefix, names, now):
    if words.warm: names = [n for n in names if n == words.warm]
    found = {n: importlib.import_module(f"{prefix}_{n}") for n in names}
    return found if words.warm else {"now": now, **found, "now2": now}
eight, wide = load("three_grad", EIGHT, now8), load("wide_grad", WIDE, now16)

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

def turned(graphs, count, turns=8):
    t = {n: [] for n in graphs}; names = list(graphs)
    for g in graphs.values(): g.replay()
    for turn in range(turns):
        for n in names[turn % len(names):] + names[:turn % len(names)]:
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); graphs[n].replay(); b.record(); b.synchronize(); t[n].append(a.elapsed_time(b) * 1e3 / count)
    return {n: statistics.median(x) for n, x in t.items()}

def compare(kind, ways, call, into, flop, count=6):
    found = []
    for m in ways.values():
        into.fill_(0.5); call(m); found.append(into.clone())
    same = [torch.equal(found[0], each) for each in found]; near = max((found[0] - each).abs().max().item() for each in found); del found
    if words.warm: return
    graphs = {n: record(lambda _, m=m: call(m), count) for n, m in ways.items()}
    print(kind, " ".join(f"{n} {us:.0f} ({flop/us/1e6:.0f})" for n, us in turned(graphs, count).items()), "same" if all(same) else f"{same} {near:.3g}", f"{time.time()-T0:.0f} s", flush=True)
    del graphs

torch.set_grad_enabled(False)
for experts, avg, spread, o, i in ((64, 1536, None, 2816, 2048), (64, 1536, .1, 2048, 1408), (64, 384, .1, 2816, 2048), (8, 4096, None, 4096, 7168)):
    if time.time() - T0 > words.until: print("no time"); break
    if words.warm and avg == 4096: break
    s = sizes_of(avg, experts, spread); e, rows = ends(s), sum(s)
    dy, x = (torch.randn(rows, n, device=DEV, dtype=torch.bfloat16) for n in (o, i))
    q = [ops.quantise_fp8_columns(each, e) for each in (dy, x)]
    into = torch.zeros(experts, o, i, device=DEV)
    for fresh in (True, False):
        about = f"{experts}x{avg} {spread} ({o}, {i}) {'written' if fresh else 'added'}:"
        if eight: compare("fp8  " + about, eight, lambda m: m.add_weight_gradient(into, *q, e, fresh=fresh, squares=fresh), into, 2 * rows * o * i)
        if wide and avg != 4096: compare("bf16 " + about, wide, lambda m: m.add_grouped_weight_gradient(into, dy, x, e, fresh=fresh, squares=fresh), into, 2 * rows * o * i)
print(f"end {time.time()-T0:.0f} s")
