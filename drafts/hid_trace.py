"""torchrun: hidden.py's trainer, unprofiled step times for both exchanges, then one traced step saved whole."""
import sys, os, json, gzip, time, tempfile, statistics
from pathlib import Path
sys.path.insert(0, "benchmarks")
import torch, torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from train_ranks import LAYOUTS, configured, parse, shared_data, trainer_of
from benthic.cli.settings import apply
from benthic.parallel.mesh import Mesh
OUT = Path(os.environ["TRACES"]); OUT.mkdir(parents=True, exist_ok=True)
words = parse(__doc__)
rank = int(os.environ["RANK"]); torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
with tempfile.TemporaryDirectory() as folder:
    data = shared_data(Path(folder), rank, small=False)
    for name in words.layouts:
        for kind in ("nvlink", "all_to_all"):
            config = apply(configured(words, "cuda"), [f"exchange.kind={kind}"])
            trainer = trainer_of(config, LAYOUTS[name], data, Mesh.of(LAYOUTS[name], rank))
            took = []
            for _ in range(7):
                torch.cuda.synchronize(); dist.barrier(); t = time.perf_counter()
                trainer.step(); torch.cuda.synchronize(); took.append(time.perf_counter() - t)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                trainer.step(); torch.cuda.synchronize()
            ev = [(e.name[:70], e.device_resource_id, e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            with gzip.open(OUT / f"{name}-{kind}-{rank}.json.gz", "wt") as f: json.dump(ev, f)
            if rank == 0: print(name, kind, "steps ms", [round(1e3 * t, 1) for t in took], flush=True)
            del trainer
dist.destroy_process_group()
