"""Steps over two GPUs as CUDA graphs, against the same steps launched kernel by kernel."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (ranks meet to compare)

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from small_runs import small_run, write_documents
from spawn import spawn

from benthic.cli.settings import apply
from benthic.parallel.exchange_choice import spots_of
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

pytestmark = pytest.mark.multigpu

LAYOUTS = {
    "ep2": Layout(dp_degree=2, ep_degree=2),
    "zero3": Layout(dp_degree=2, zero_stage=3),
    "zb-h1": Layout(pp_degree=2, schedule="zb-h1"),
    "dualpipe": Layout(pp_degree=2, schedule="dualpipe"),
    "dualpipev-ep2": Layout(dp_degree=2, ep_degree=2, schedule="dualpipev"),
    "tp2": Layout(tp_degree=2),
}


def steps(rank: int, folder: str, name: str, dtype: str, *, graph: bool) -> list[tuple[float, float]]:
    layout, data = LAYOUTS[name], Path(folder)
    own = small_run(layers=4, steps=20, microbatches=8)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    own = dataclasses.replace(
        own, device="cuda", layout=layout, model=dataclasses.replace(own.model, **sizes)
    )
    numbers = [f"precision.weights={dtype}", f"precision.matmul={dtype}"]
    own = apply(own, [*numbers, f"train.cuda_graph={str(graph).lower()}", "train.lr=1e-4"])
    meta, spots = read_meta(data), spots_of(None, torch.device("cuda", rank))
    resolved = resolve(own, detect("cuda"), meta, ranks=layout.ranks, spots=spots).config
    run = Trainer(resolved, TokenShards(data, meta, "train"), Mesh.of(layout, rank))
    assert run.recorded is graph
    found = [(each.loss, each.grad_norm) for each in (run.step() for _ in range(7))]
    run.close()
    return found


def compared(rank: int, folder: str, name: str, dtype: str) -> None:
    one = steps(rank, folder, name, dtype, graph=True)
    other = steps(rank, folder, name, dtype, graph=False)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2), json.dumps([one, other])
    dist.barrier()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_graphs_over_two_gpus_find_what_their_kernels_do(name: str, dtype: str, tmp_path: Path) -> None:
    spawn(compared, 2, str(write_documents(tmp_path / "data")), name, dtype, device="cuda")
