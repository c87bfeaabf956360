"""Kernels of a mixture layer forward and backward. python .gpu/prof_layer.py OUT"""
import sys, json, tempfile, collections
sys.path.insert(0, "benchmarks")
import torch
import moe_layer as M
from moe_layer_peer import copy_weights, model_of, peer
model, tokens = model_of(small=False), 16384
wide = M.ours(model, M.PrecisionConfig(weights="bfloat16", matmul="bfloat16"), tokens, "cuda")
narrow = M.ours(model, M.PrecisionConfig(weights="fp8", matmul="fp8"), tokens, "cuda")
moe = peer(model, "cuda"); copy_weights(wide.module, narrow.module, moe); del moe
torch.manual_seed(0)
x, dout = (torch.randn(tokens, model.hidden_size, device="cuda").bfloat16() for _ in range(2))
f = open(sys.argv[1], "w")
for name, layer in (("bf16", wide), ("fp8", narrow)):
    for _ in range(5): M.both(layer, x, dout)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(5): M.both(layer, x, dout)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    n = len(k) // 5; k = k[2*n:3*n]
    total = sum(e["dur"] for e in k); span = k[-1]["ts"] + k[-1]["dur"] - k[0]["ts"]
    print(f"== {name}: {n} kernels, sum {total/1e3:.3f} ms, span {span/1e3:.3f}", file=f)
    t0 = k[0]["ts"]
    for e in k: print(f"   {e['ts']-t0:9.1f} {e['dur']:8.1f} s{e['args'].get('stream')} {e['args'].get('grid')} {e['name'][:70]}", file=f)
    f.flush()
