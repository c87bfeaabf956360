"""Prompts of a server: times as serve_gpu has them, and a table of kernels of one. python prof_prefill.py OUT PART"""
import json, sys, tempfile, collections
sys.path.insert(0, "benchmarks")
import torch
from serve_gpu import Sizes, PARTS, prefill_row, requests, measure_roofs, random_weights, EngineOptions, Engine, presets
out, part = sys.argv[1:3]
sizes = Sizes(presets.get("moonlight-16b-a3b"), "cuda", steps=8)
roofs = measure_roofs(sizes)
print("roof", roofs["product_flops"] / 1e12, flush=True)
model = random_weights(sizes.config, torch.device("cuda"), torch.bfloat16, seed=0)
o = EngineOptions(device="cuda", quantization=PARTS[part][0], kv_cache_dtype=PARTS[part][1], max_num_seqs=4, max_num_batched_tokens=16384,
    enable_prefix_caching=False, cudagraph_capture_sizes=(1, 4), async_scheduling=True)
engine = Engine.of(model, o, eos=())
f = open(out, "w")
for count, length in ((1, 512), (1, 2048), (1, 4096), (4, 4096), (16, 4096)):
    r = prefill_row(engine, sizes, count, length, roofs)
    print("==", part, r["prompts"], f"{r['tokens_per_second']:.0f} tokens/s {r['ms']:.2f} ms {100*r['of_bf16_product']:.1f} %", flush=True)
    if count == 16: break
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for each in requests(sizes, count, length, 1, seed=77): engine.add(each)
        while engine.has_work: engine.step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    by = collections.defaultdict(list)
    for e in k: by[e["name"][:90]].append(e["dur"])
    span = k[-1]["ts"] + k[-1]["dur"] - k[0]["ts"]
    print(f"== {part} {count} x {length}: {len(k)} kernels, sum {sum(e['dur'] for e in k)/1e3:.3f} ms, span {span/1e3:.3f}", file=f)
    for name, d in sorted(by.items(), key=lambda x: -sum(x[1]))[:40]:
        print(f"{sum(d):9.1f} us {len(d):4d} x {sum(d)/len(d):7.2f}  {name}", file=f)
    f.flush()
