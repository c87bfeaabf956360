"""Idle times of a training step: python gaps.py OUT"""
import sys, tempfile, time, json
from pathlib import Path
out = open(sys.argv[1], "w")
sys.path.insert(0, "benchmarks")
import torch
import train_gpu as T
from stdlib_corpus import make_data
sys.argv = ["x", "--lr", "1e-6"]
words = T.parse()
words.data = make_data(Path(tempfile.mkdtemp()), 512, parts=("json", "email"))
for name in ("benthic fp8",):
    step = T.ours(T.OURS[name], words)
    for _ in range(4): step(); torch.cuda.synchronize()
    eights = []
    for _ in range(4):
        a = time.perf_counter()
        for _ in range(8): step()
        torch.cuda.synchronize(); eights.append(round((time.perf_counter() - a) / 8 * 1e3, 1))
    eight = min(eights); print(eights, file=out)
    took = []
    for _ in range(4):
        a = time.perf_counter(); step(); b = time.perf_counter(); torch.cuda.synchronize(); took.append((round(1e3 * (b - a), 1), round(1e3 * (time.perf_counter() - a), 1)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(3): step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    n = len(k) // 3; t0 = k[0]["ts"]
    print(f"== {name}: {eight:.1f} ms a step in a row of eight; one (host, all) {took}; three: {len(k)} kernels, span {(k[-1]['ts']+k[-1]['dur']-t0)/1e3:.1f} ms", file=out)
    end = k[0]["ts"]; idle = 0; small = 0; last = None; rows = []
    for e in k:
        gap = e["ts"] - end
        if gap > 0:
            idle += gap
            if gap > 15: rows.append((gap, (e["ts"] - t0) / 1e3, last["name"][:40], e["name"][:40]))
            else: small += gap
        if e["ts"] + e["dur"] > end: end = e["ts"] + e["dur"]; last = e
    print(f"idle {idle/1e3:.2f} ms of three steps, of it in gaps up to 15 us {small/1e3:.2f}; {len(rows)} larger ones", file=out)
    for gap, at, a, b in rows: print(f"  {gap:8.1f} us at {at:8.2f} ms: {a} -> {b}", file=out)
    # syncs of the host
    sy = [e for e in ev if e.get("ph") == "X" and e["name"] in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync") and e["dur"] > 200]
    for e in sy: print(f"  host {e['name']} {e['dur']/1e3:.2f} ms at {(e['ts']-t0)/1e3:.2f}", file=out)
    out.flush(); del step; import gc; gc.collect(); torch.cuda.empty_cache()
