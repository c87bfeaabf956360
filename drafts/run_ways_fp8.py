"""A decode step's ways, recorded anew in one engine and replayed in turn. python run_ways_fp8.py OUT fp8-weights BATCH..."""
import json, sys, tempfile, gc, collections, statistics, time
from pathlib import Path
sys.path.insert(0, "benchmarks"); sys.path.insert(0, str(Path(__file__).parent))
T0 = time.time()
import torch
from benthic.serve.aside import SecondStream
from serve_gpu import Sizes, PARTS, decode, alone, random_weights, EngineOptions, Engine, presets
out, part, *batches = sys.argv[1:]
batches = tuple(map(int, batches))
from benthic.model.block_scaled import BlockScaledLinear
early, together = SecondStream.moment, BlockScaledLinear.together
# joined products, moment; FP8 weights
WAYS = {"neither": (False, False), "join": (True, False), "early": (False, True), "both": (True, True), "neither2": (False, False)}
def use(name):
    joined, is_early = WAYS[name]
    SecondStream.moment = early if is_early else lambda self, rows: None
    BlockScaledLinear.together = together if joined else lambda self, x, w: None
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
print(f"end {time.time()-T0:.0f} s")
