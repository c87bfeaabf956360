"""A step of all of Moonlight over two ranks by kernels, idle time and gaps: torchrun prof_full.py OUT [train_ranks flags]"""
import sys, json, os, collections, tempfile, time
from pathlib import Path
out, *flags = sys.argv[1:]
sys.path.insert(0, "benchmarks")
sys.argv = ["train_ranks.py", "--full", "--layouts", "ep2", "--set", "train.global_batch_size=32", "--set", "train.local_batch_size=4", *flags]
import torch, torch.distributed as dist
import train_ranks as R
from moonlight_slices import LAYOUTS
from benthic.parallel.mesh import Mesh
words = R.parse("x"); rank = int(os.environ["RANK"]); here = torch.device("cuda", rank); torch.cuda.set_device(here)
dist.init_process_group("nccl", device_id=here)
with tempfile.TemporaryDirectory() as folder:
    data = R.shared_data(Path(folder), rank, small=False); config = R.configured(words, "cuda"); layout = LAYOUTS["ep2"]
    trainer = R.trainer_of(config, layout, data, Mesh.of(layout, rank))
    for _ in range(2):
        t = time.perf_counter(); trainer.step(); torch.cuda.synchronize()
        if rank == 0: print(f"step {time.perf_counter() - t:.2f} s", flush=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        trainer.step(); torch.cuda.synchronize()
    if rank == 0:
        with tempfile.NamedTemporaryFile(suffix=".json") as t:
            p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
        k = sorted((e for e in ev if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
        f = open(out, "w"); end, idle, gaps = k[0]["ts"], 0.0, collections.Counter()
        before = ""
        for e in k:
            if e["ts"] > end: idle += e["ts"] - end; gaps[before[:40] + " -> " + e["name"][:40]] += e["ts"] - end
            if e["ts"] + e["dur"] > end: end, before = e["ts"] + e["dur"], e["name"]
        print(f"span {(end - k[0]['ts'])/1e3:.1f} ms, idle {idle/1e3:.1f}, {len(k)} kernels, sum {sum(e['dur'] for e in k)/1e3:.1f}", file=f)
        for n, d in gaps.most_common(20): print(f"gap {d/1e3:8.2f} ms {n}", file=f)
        by = collections.defaultdict(list)
        for e in k: by[e["name"][:70]].append(e["dur"])
        for n, d in sorted(by.items(), key=lambda x: -sum(x[1]))[:60]: print(f"{sum(d)/1e3:9.2f} ms {len(d):6d} x {sum(d)/len(d):8.1f} us {n}", file=f)
dist.destroy_process_group()
