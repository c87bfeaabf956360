"""torchrun --nproc-per-node N .gpu/mystery.py LAYOUT|one [--set ...]: where a step of train_ranks goes."""
import sys, os, time, collections, cProfile, pstats, io, gc, tempfile
sys.path.insert(0, "benchmarks")
from pathlib import Path
import torch, torch.distributed as dist
import train_ranks as R
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.parallel.stopwatch import Stopwatch
name = sys.argv[1]; extra = [a for a in sys.argv[2:] if "=" in a]
full = "full" in sys.argv
sys.argv = ["x", *(["--full"] if full else []), *sum((["--set", e] for e in extra), [])]
words = R.parse("x")
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))); torch.cuda.set_device(here)
dist.init_process_group("nccl", device_id=here if "late" not in os.environ else None)
tmp = tempfile.mkdtemp()
data = R.shared_data(Path(tmp), rank, small=False)
layout = Layout() if name == "one" else R.LAYOUTS[name]
t = R.trainer_of(R.configured(words, "cuda"), layout, data, Mesh.of(layout, rank))
steps = []
compiled = []
import triton
def heard(*a, **k):
    src = k.get("src"); compiled.append((len(steps), getattr(src, "name", None) or getattr(getattr(src, "fn", None), "__name__", "?"), k.get("cache_hit")))
triton.knobs.compilation.listener = heard
many = int(os.environ.get("STEPS", 9))
segs = []
for i in range(many):
    segs.append(torch.cuda.memory_stats().get("num_device_alloc", 0))
    if i == many - 4: t.executor.pipeline.stopwatch = Stopwatch(t.device)
    a = time.perf_counter(); t.step(); steps.append((time.perf_counter() - a) * 1e3)
say = print if rank == 0 else (lambda *a, **k: None)
say(f"== {name} {extra} OMP {os.environ.get('OMP_NUM_THREADS')} threads {torch.get_num_threads()} cpu affinity {len(os.sched_getaffinity(0))} steps ms", " ".join(f"{x:.0f}" for x in steps))
for r in range(ranks):
    if rank == r: print(f"rank {r} compiled after step 0:", [c for c in compiled if c[0] > 0][:30], "device allocs by step", segs, flush=True)
    dist.barrier()
t.executor.pipeline.stopwatch = None if "stopwatch" not in os.environ else t.executor.pipeline.stopwatch
if "quick" in os.environ: dist.destroy_process_group(); sys.exit()
# host speed: launches of an empty kernel and plain python
x = torch.zeros(8, device=here); torch.cuda.synchronize(); a = time.perf_counter()
for _ in range(2000): x.add_(1.0)
b = time.perf_counter(); torch.cuda.synchronize(); c = time.perf_counter()
n = 0
d = time.perf_counter()
for i in range(1000000): n += i
say(f"launch {1e6*(b-a)/2000:.2f} us, with wait {1e6*(c-a)/2000:.2f}; python 1M adds {1e3*(time.perf_counter()-d):.1f} ms")
if rank == 0:
    pr = cProfile.Profile(); pr.enable()
a = time.perf_counter(); t.step(); b = time.perf_counter()
if rank == 0:
    pr.disable(); s = io.StringIO(); pstats.Stats(pr, stream=s).sort_stats("tottime").print_stats(28)
    say(f"cProfile step {1e3*(b-a):.0f} ms"); say("\n".join(l[:130] for l in s.getvalue().splitlines()[:44]))
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CUDA]) as p:
    a = time.perf_counter(); t.step(); t.step(); torch.cuda.synchronize(); b = time.perf_counter()
say(f"profiled: {(b-a)/2*1e3:.1f} ms a step")
ev = sorted(((e.time_range.start, e.time_range.end, e.name) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA))
span = (ev[-1][1] - ev[0][0]) / 1e3
tot = collections.defaultdict(lambda: [0, 0.0]); busy = 0; end = -1; gaps = []
last = ""
for a_, b_, n_ in ev:
    tot[n_][0] += 1; tot[n_][1] += b_ - a_
    if end > 0 and a_ > end: gaps.append((a_ - end, (a_ - ev[0][0]) / 1e3, last[:44], n_[:44]))
    if b_ > end: busy += b_ - max(a_, end); end, last = b_, n_
say(f"span {span:.1f} ms, busy {busy/1e3:.1f}, {len(ev)} kernels in two steps; gaps {sum(g[0] for g in gaps)/1e3:.1f} ms, >8us {sum(g[0] for g in gaps if g[0]>8)/1e3:.1f} in {sum(g[0]>8 for g in gaps)}, >100us {sum(g[0] for g in gaps if g[0]>100)/1e3:.1f} in {sum(g[0]>100 for g in gaps)}")
for k, (n, us) in sorted(tot.items(), key=lambda x: -x[1][1])[:36]: say(f"{us/1e3:8.2f} ms {n:5d}  {k[:120]}")
for g in sorted(gaps, reverse=True)[:14]: say(f"  {g[0]:7.1f} us at {g[1]:7.1f} ms  {g[2]} -> {g[3]}")
dist.barrier(); dist.destroy_process_group()
