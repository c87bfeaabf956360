"""A step of all of Moonlight over two ranks, kernels of both with their launches: torchrun prof_pair.py FOLDER [train_ranks flags]"""
import sys, json, os, tempfile, time, gzip
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
    for _ in range(4):
        t = time.perf_counter(); trainer.step(); h = time.perf_counter() - t; torch.cuda.synchronize()
        print(f"rank {rank} step {time.perf_counter() - t:.2f} s, host {h:.2f}", flush=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        t = time.perf_counter(); trainer.step(); h = time.perf_counter() - t; torch.cuda.synchronize()
        print(f"rank {rank} profiled step {time.perf_counter() - t:.2f} s, host {h:.2f}", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as t:
        p.export_chrome_trace(t.name); ev = json.load(open(t.name))["traceEvents"]
    names, rows, launch = {}, [], {}
    for e in ev:
        c = e.get("args", {}).get("correlation")
        if e.get("cat") in ("cuda_runtime", "cuda_driver"): launch[c] = (e["ts"], e["dur"])
    for e in ev:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            l = launch.get(e["args"].get("correlation"), (0, 0))
            rows.append((e["ts"], e["dur"], e["args"].get("stream", -1), names.setdefault(e["name"][:80], len(names)), l[0], l[1]))
    rows.sort()
    with gzip.open(f"{out}/pair_{rank}.json.gz", "wt") as f: json.dump({"names": list(names), "rows": rows}, f)
dist.destroy_process_group()
