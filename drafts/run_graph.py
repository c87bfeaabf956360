"""Steps launched one by one and as a CUDA graph: torchrun run_graph.py [--full] LAYOUT... [--set ...]"""
import sys, os, gc, time, statistics, tempfile, traceback
from pathlib import Path
args = sys.argv[1:]
full = "--full" in args; layouts = [a for a in args if not a.startswith("--") and "=" not in a]; sets = [a for a in args if "=" in a]
sys.path.insert(0, "benchmarks")
sys.argv = ["train_ranks.py", *(["--full"] if full else []), "--layouts", "ep2", "--set", "train.lr=1e-6", *(x for s in sets if not s.startswith("STEPS") and not s.startswith("WAYS") for x in ("--set", s))]
import torch, torch.distributed as dist
import train_ranks as R
from moonlight_slices import LAYOUTS
from benthic.spec.layout import Layout
from benthic.parallel.mesh import Mesh
words = R.parse("x"); rank = int(os.environ["RANK"]); here = torch.device("cuda", rank); torch.cuda.set_device(here)
dist.init_process_group("nccl", device_id=here)
STEPS = int(next((s[6:] for s in sets if s.startswith("STEPS")), 9)); WAYS = next((s[5:] for s in sets if s.startswith("WAYS")), "false,true").split(",")
t0 = time.time()
def one(name, way):
    config = R.apply(R.configured(words, "cuda"), [f"train.cuda_graph={way}"])
    layout = Layout() if name == "1" else LAYOUTS[name]
    trainer = R.trainer_of(config, layout, data, Mesh.of(layout, 0 if name == "1" else rank))
    losses, secs, norms = [], [], []
    for i in range(STEPS):
        t = time.perf_counter(); r = trainer.step(); secs.append(time.perf_counter() - t); losses.append(r.loss); norms.append(r.grad_norm)
    torch.cuda.synchronize(); tokens = int(config.train.global_batch_size) * 4096
    s = statistics.median(secs[min(5, STEPS - 2):])
    if rank == 0: print(f"{name:14s} graph={way:5s} {s*1e3:8.1f} ms {tokens/s:9.0f} tok/s peak {torch.cuda.max_memory_allocated()/2**30:.1f} reserved {torch.cuda.max_memory_reserved()/2**30:.1f} GiB  {time.time()-t0:.0f} s", " ".join(f"{x:.5f}" for x in losses), "norm", " ".join(f"{x:.4f}" for x in norms), "s", " ".join(f"{x*1e3:.0f}" for x in secs), flush=True)
    del trainer
with tempfile.TemporaryDirectory() as folder:
    data = R.shared_data(Path(folder), rank, small=False)
    for name in layouts:
        if name == "1":
            if rank == 0:
                for way in WAYS:
                    try: one(name, way)
                    except Exception: traceback.print_exc()
                    R.free()
            dist.barrier(); continue
        for way in WAYS:
            one(name, way); R.free()
dist.destroy_process_group()
