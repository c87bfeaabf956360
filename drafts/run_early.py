"""A decode step's ways, recorded anew in one engine and replayed in turn. python run_early.py OUT PART BATCH... """
import json, sys, tempfile, gc, collections, statistics, time
from pathlib import Path
sys.path.insert(0, "benchmarks"); sys.path.insert(0, str(Path(__file__).parent))
T0 = time.time()
import torch
import gluon_mid as mid
from benthic.kernels import triton_few_rows as few
from benthic.serve.aside import SecondStream
from serve_gpu import Sizes, PARTS, decode, alone, random_weights, EngineOptions, Engine, presets
out, part, *batches = sys.argv[1:]
batches = tuple(map(int, batches))
MODE = {"mid": False}
few_linear, few_swiglu, early = few.grouped_linear, few.grouped_swiglu, SecondStream.moment
few.grouped_linear = lambda x, w, e: (mid.grouped_linear if MODE["mid"] and x.shape[0] > 16 * w.shape[0] else few_linear)(x, w, e)
few.grouped_swiglu = lambda x, w, e: (mid.grouped_swiglu if MODE["mid"] and x.shape[0] > 16 * w.shape[0] else few_swiglu)(x, w, e)
WAYS = {"late": (False, None), "early": (True, None), "late2": (False, None), "mid 132": (True, (0, 0)), "mid 118 128": (True, (118, 128)), "mid 118 118": (True, (118, 118)), "mid 108 108": (True, (108, 108)), "mid late 118 128": (False, (118, 128))}
def use(name):
    is_early, spare = WAYS[name]
    SecondStream.moment = early if is_early else lambda self: None
    MODE["mid"] = spare is not None
    if spare: mid.SPARE[:] = spare
sizes = Sizes(presets.get("moonlight-16b-a3b"), "cuda", steps=4)
model = random_weights(sizes.config, torch.device("cuda"), torch.bfloat16, seed=0)
o = EngineOptions(device="cuda", quantization=PARTS[part][0], kv_cache_dtype=PARTS[part][1], max_num_seqs=max(batches), max_num_batched_tokens=8192,
    enable_prefix_caching=False, cudagraph_capture_sizes=batches, async_scheduling=True)
engine = Engine.of(model, o, eos=())
print(f"engine {time.time()-T0:.0f} s", flush=True)
f = open(out, "w")
graphs = engine.parts.runner.graphs.get(1)
for b in batches:
    decode(engine, sizes, b); size = graphs.size_for(b)
    state = {}
    made = {}
    for name in WAYS:
        if b < 256 and "mid" in name: continue
        use(name); made[name] = None
        with torch.inference_mode():
            graphs._graphs[size] = graphs._capture(size)
        made[name] = graphs._graphs[size]
    decode(engine, sizes, b)  # fill buffers, by the last
    times = collections.defaultdict(list)
    names = list(made)
    for turn in range(8):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            graphs._graphs[size] = made[name]; times[name].append(alone(engine, b) * 1e3)
    print(f"batch {b}: " + ", ".join(f"{n} {statistics.median(t):.3f}" for n, t in times.items()), f"{time.time()-T0:.0f} s", flush=True)
    for name in names:
        graphs._graphs[size] = made[name]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(3): graphs.replay(size)
            torch.cuda.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as t:
            p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
        k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
        n = len(k) // 3; k = k[n:2*n]
        span = k[-1]["ts"] + k[-1]["dur"] - k[0]["ts"]
        print(f"== {name} batch {b}: {n} kernels, span {span/1e3:.3f}", file=f)
        m = n // 2; t0 = k[m]["ts"]
        for e in k[m:m+48]:
            print(f"   {e['ts']-t0:8.2f} {e['dur']:7.2f} s{e['args'].get('stream')} grid {e['args'].get('grid')} {e['name'][:60]}", file=f)
        f.flush()
print("== products")
import torch.nn.functional as F
def bench(fn, n=40):
    st = torch.cuda.Stream()
    with torch.cuda.stream(st): fn(0)
    torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(n): fn(i)
    ts = []
    for _ in range(7):
        a, e = (torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record(); g.replay(); e.record(); e.synchronize(); ts.append(a.elapsed_time(e) * 1e3 / n)
    return statistics.median(ts)
with torch.inference_mode():
    for m in (64, 256, 512):
        line = []
        for nn in (576, 3072, 3648, 3712, 3840, 4096, 2048):
            w = [torch.randn(nn, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(12)]; x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
            line.append(f"{nn}: {bench(lambda i: F.linear(x, w[i % 12])):.1f} turned {bench(lambda i: (w[i % 12] @ x.T)):.1f}")
        print(f"rows {m}: " + ", ".join(line), flush=True)
print(f"end {time.time()-T0:.0f} s")
