"""Kernels of a training step by name: python .gpu/prof_train.py OUT"""
import sys, collections, tempfile, time, json, gc
from pathlib import Path
out = open(sys.argv[1], "w")
sys.path.insert(0, "benchmarks")
import torch
import train_gpu as T
from stdlib_corpus import make_data
sys.argv = ["x", "--lr", "1e-6"]
words = T.parse()
words.data = make_data(Path(tempfile.mkdtemp()), 512, parts=("json", "email"))
for name in ("benthic fp8", "benthic bf16"):
    step = T.ours(T.OURS[name], words)
    took = []
    for _ in range(5):
        a = time.perf_counter(); step(); torch.cuda.synchronize(); took.append(1e3 * (time.perf_counter() - a))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        step(); torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    by = collections.defaultdict(list)
    for e in k: by[(e["name"][:74], str(e["args"].get("grid")))].append(e["dur"])
    busy = sum(e["dur"] for e in k); span = k[-1]["ts"] + k[-1]["dur"] - k[0]["ts"]
    print(f"== {name}: steps {[round(x, 1) for x in took]} ms, {len(k)} kernels, sum {busy/1e3:.2f} ms, span {span/1e3:.2f}", file=out)
    for (n, g), d in sorted(by.items(), key=lambda x: -sum(x[1]))[:70]:
        print(f"{sum(d):9.0f} us {len(d):4d} x {sum(d)/len(d):8.1f}  {g:18s} {n}", file=out)
    out.flush(); del step; gc.collect(); torch.cuda.empty_cache()
