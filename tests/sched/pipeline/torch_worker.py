"""One rank of a test: how far torch's own pipeline runtime, given our tables, is from one process."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist  # noqa: TID251 (torch's runtime is what is tested here)
from torch.distributed.pipelining import PipelineStage  # noqa: TID251
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime  # noqa: TID251

from benthic.sched.pipeline.table_csv import read_table

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, ROWS = 6, 2


def layers(stages: int) -> list[torch.nn.Module]:
    torch.manual_seed(1)
    return [
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()).double() for _ in range(stages)
    ]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum()


def serial(modules, x, target, microbatches):
    model = torch.nn.Sequential(*copy.deepcopy(modules))
    total = 0.0
    for part, wanted in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        loss = loss_of(model(part), wanted)
        loss.backward()
        total += loss.item()
    return total, [[p.grad for p in module.parameters()] for module in model]


def furthest(table, text_path, rank) -> float:
    """The largest difference of this rank's loss and gradients from those of one process."""
    modules = layers(table.stages)
    torch.manual_seed(2)
    x, target = torch.randn(2, ROWS * table.microbatches, WIDTH, dtype=torch.float64)
    loss, gradients = serial(modules, x, target, table.microbatches)
    mine = [stage for stage, where in enumerate(table.routes[0]) if where == rank]
    stages = [PipelineStage(modules[s], s, table.stages, torch.device("cpu")) for s in mine]
    runtime = _PipelineScheduleRuntime(stages, table.microbatches, loss_fn=loss_of, scale_grads=False)
    runtime._load_csv(text_path)
    losses: list[torch.Tensor] = []
    keywords = {"target": target, "losses": losses} if table.stages - 1 in mine else {}
    runtime.step(*([x] if 0 in mine else []), **keywords)
    far = [abs(sum(part.item() for part in losses) - loss)] if keywords else []
    for s in mine:
        far += [
            (ours.grad - theirs).abs().max().item()
            for ours, theirs in zip(modules[s].parameters(), gradients[s], strict=True)
        ]
    return max(far)


def run_tables(rank: int, ranks: int, folder: Path) -> None:
    """Run every table in `folder` and leave this rank's differences there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=ranks)
    far = {
        path.stem: furthest(read_table(path.read_text()), path.with_suffix(".csv"), rank)
        for path in sorted(folder.glob("*.table"))
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(far))
    dist.destroy_process_group()
