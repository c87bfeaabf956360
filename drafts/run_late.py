"""A decode step whose norms make the last sums, on and off in one engine, replayed in turn. python run_late.py OUT PART BATCH..."""
import json, sys, tempfile, collections, statistics, time
from pathlib import Path
sys.path.insert(0, "benchmarks"); sys.path.insert(0, str(Path(__file__).parent))
T0 = time.time()
import torch
from benthic.kernels import triton_permute as tp, ops
from benthic.kernels.host import next_power_of_2
from benthic.kernels.launch import early
from benthic.model.block import MoeBlock
WARPS = 0
def unpermute_norm(rows_RD, maps, weight_TK, beside, norm_D, eps):
    row_TK = maps.row_TK.contiguous(); (tokens, top_k), width = row_TK.shape, rows_RD.shape[1]
    normed, out = (torch.empty(tokens, width, dtype=rows_RD.dtype, device=rows_RD.device) for _ in range(2))
    padded = next_power_of_2(width)
    tp._sum_and_norm[(tokens,)](rows_RD, weight_TK.contiguous(), row_TK, norm_D, normed, out, *beside, *[out] * (2 - len(beside)), width, rows_RD.stride(0), eps,
        BESIDE=len(beside), TOP_K=top_k, WIDTH=padded, num_warps=WARPS or min(16, max(1, padded // 256)), **early(out.device, tokens))
    return normed, out
tp.unpermute_norm = unpermute_norm
from serve_gpu import Sizes, PARTS, decode, alone, random_weights, EngineOptions, Engine, presets
out, part, *batches = sys.argv[1:]
batches = tuple(map(int, batches))
late = MoeBlock.leave
WAYS = {"sums": None, "late": 0, "late 4": 4, "late 16": 16, "sums2": None}
def use(name):
    global WARPS
    MoeBlock.leave = late if WAYS[name] is not None else lambda self, computed, sockets: self.combine(computed, sockets)
    WARPS = WAYS[name] or 0
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
    for name in ("sums", "late"):
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
