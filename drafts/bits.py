"""torchrun --nproc-per-node 2 bits.py OUT: hashes of losses and parameters after three steps."""
import sys, os, hashlib, tempfile, dataclasses, json
sys.path.insert(0, "benchmarks")
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
import train_ranks as R
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
out = sys.argv[1]; sys.argv = ["x", "--small", "--steps", "3"] + os.environ.get("MORE","").split()
words = R.parse("x"); rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
L = dict(R.LAYOUTS)
L["dualpipev-zero3"] = Layout(dp_degree=2, zero_stage=3, schedule="dualpipev")
L["dualpipev-ep2-zero3"] = Layout(dp_degree=2, ep_degree=2, zero_stage=3, schedule="dualpipev")
L["dualpipev-pp2"] = Layout(pp_degree=2, schedule="dualpipev")
L["zb-v"] = Layout(pp_degree=2, schedule="zb-v")
L["chimera"] = Layout(pp_degree=2, schedule="chimera")
L["one"] = Layout()
found = {}
from benthic.spec import presets
for mtp in (0, 1):
  with tempfile.TemporaryDirectory() as t:
    data = R.shared_data(Path(t), rank, small=True)
    config = R.configured(words, "cpu")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_nextn_predict_layers=mtp))
    for name, layout in L.items():
        if layout.ranks > rank or rank == 0:
            if not (layout.ranks == 1 and rank):
                try:
                    tr = R.trainer_of(config, layout, data, Mesh.of(layout, rank))
                    for _ in range(3): tr.step()
                    h = hashlib.sha256()
                    for st in list(tr.executor._stages.values())[:1]:
                        for u, bs in st.buckets.items():
                            for k in bs:
                                h.update(u.encode()); h.update(k.kept.detach().clone().view(torch.uint8).numpy().tobytes())
                    found[f"{name} mtp{mtp}"] = h.hexdigest()[:16]
                except Exception as e:
                    found[f"{name} mtp{mtp}"] = repr(e)[:300]
        dist.barrier()
all_ = [None]*2; dist.all_gather_object(all_, found)
if rank == 0: json.dump(all_, open(out, "w"), indent=1); print(json.dumps(all_, indent=1))
dist.destroy_process_group()
