"""A decode step whose gate has four programs, or the library's product, in one engine, in turn. python run_gate.py OUT PART BATCH..."""
import json, sys, tempfile, collections, statistics, time
from pathlib import Path
sys.path.insert(0, "benchmarks"); sys.path.insert(0, str(Path(__file__).parent))
T0 = time.time()
import torch
from benthic.kernels.ops import gate
BESIDE = gate.GATED_BESIDE
from serve_gpu import Sizes, PARTS, decode, alone, random_weights, EngineOptions, Engine, presets
out, part, *batches = sys.argv[1:]
batches = tuple(map(int, batches))
WAYS = {"library": 0, "tiles": BESIDE, "library2": 0, "tiles2": BESIDE}
def use(name): gate.GATED_BESIDE = WAYS[name]
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
    made = {}
    for name in WAYS:
        use(name)
        with torch.inference_mode(): graphs._graphs[size] = graphs._capture(size)
        made[name] = graphs._graphs[size]
    decode(engine, sizes, b)
    times = collections.defaultdict(list); names = list(made)
    for turn in range(10):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            graphs._graphs[size] = made[name]; times[name].append(alone(engine, b) * 1e3)
    print(f"batch {b}: " + ", ".join(f"{n} {statistics.median(t):.3f}" for n, t in times.items()), f"{time.time()-T0:.0f} s", flush=True)
    for name in ("library", "tiles"):
        graphs._graphs[size] = made[name]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            for _ in range(3): graphs.replay(size)
            torch.cuda.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as t:
            p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
        k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
        n = len(k) // 3; k = k[n:2*n]
        print(f"== {name} batch {b}: {n} kernels, span {(k[-1]['ts'] + k[-1]['dur'] - k[0]['ts'])/1e3:.3f}", file=f)
        m = n // 2; t0 = k[m]["ts"]
        for e in k[m:m+40]: print(f"   {e['ts']-t0:8.2f} {e['dur']:7.2f} s{e['args'].get('stream')} grid {e['args'].get('grid')} {e['name'][:60]}", file=f)
        f.flush()
print(f"end {time.time()-T0:.0f} s")
