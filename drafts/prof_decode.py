"""Kernels of a decode step: a table by name, and one layer in order. python .gpu/prof_decode.py OUT PART BATCH..."""
import json, sys, tempfile, gc, collections
sys.path.insert(0, "benchmarks")
import torch
from serve_gpu import Sizes, PARTS, decode, alone, random_weights, EngineOptions, Engine, presets
out, part, *batches = sys.argv[1:]
batches = tuple(map(int, batches))
sizes = Sizes(presets.get("moonlight-16b-a3b"), "cuda", steps=8)
model = random_weights(sizes.config, torch.device("cuda"), torch.bfloat16, seed=0)
o = EngineOptions(device="cuda", quantization=PARTS[part][0], kv_cache_dtype=PARTS[part][1], max_num_seqs=max(batches), max_num_batched_tokens=8192,
    enable_prefix_caching=False, cudagraph_capture_sizes=batches, async_scheduling=True)
engine = Engine.of(model, o, eos=())
f = open(out, "w")
for b in batches:
    s, _ = decode(engine, sizes, b)
    graphs = engine.parts.runner.graphs.get(1); size = graphs.size_for(b)
    a = alone(engine, b)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(3): graphs.replay(size)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    n = len(k) // 3; k = k[n:2*n]
    by = collections.defaultdict(list)
    for e in k: by[e["name"][:70]].append(e["dur"])
    total = sum(e["dur"] for e in k); span = k[-1]["ts"] + k[-1]["dur"] - k[0]["ts"]
    print(f"== {part} batch {b}: step {1e3*s:.3f} ms, alone {1e3*a:.3f}, {n} kernels, sum {total/1e3:.3f} ms, span {span/1e3:.3f}", file=f)
    for name, d in sorted(by.items(), key=lambda x: -sum(x[1])):
        print(f"{sum(d):9.1f} us {len(d):4d} x {sum(d)/len(d):7.2f}  {name}", file=f)
    m = n // 2
    t0 = k[m]["ts"]
    for e in k[m:m+50]:
        print(f"   {e['ts']-t0:8.2f} {e['dur']:7.2f} s{e['args'].get('stream')} grid {e['args'].get('grid')} {e['name'][:60]}", file=f)
    f.flush()
