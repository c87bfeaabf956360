"""How many operators and collectives the host calls in every slot of a training step, on a CPU.

    torchrun --nproc-per-node 2 benchmarks/launches.py

What `benthic.plan.training.launches` sums up: four narrow layers of Moonlight's form, whose sizes decide
nothing, under the layouts of `train_ranks.py`, and with what changes a block: more dense layers, a query of
low rank, a prediction module, recomputation. Counted is what torch dispatches, views and empty tensors too:
each of them costs the host about as much as a launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from moonlight_slices import LAYOUTS, moonlight
from provenance import write_result
from stdlib_corpus import make_data

from benthic.cli.settings import apply
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train.config import LogConfig, LoopConfig, RunConfig
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.pipeline.table import Slot
    from benthic.spec.model import ModelConfig

NARROW: Final[dict[str, Any]] = {
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Run:
    """What is counted: a layout, fields of the model, what is computed again."""

    layout: Layout
    changes: dict[str, Any] = field(default_factory=dict)
    recompute: tuple[str, ...] = ()

    @property
    def model(self) -> ModelConfig:
        """Its model."""
        return dataclasses.replace(moonlight(), **NARROW | self.changes)


_SPLIT: Final = LAYOUTS["zb-h1"]
RUNS: Final[dict[str, Run]] = {
    "1 rank": Run(Layout()),
    "zb-h1": Run(_SPLIT),
    "dualpipe": Run(LAYOUTS["dualpipe"]),
    "two dense": Run(_SPLIT, {"first_k_dense_replace": 2}),
    "low-rank query": Run(_SPLIT, {"q_lora_rank": 32}),
    "prediction": Run(_SPLIT, {"num_nextn_predict_layers": 1}),
    "attention again": Run(_SPLIT, recompute=("attention",)),
    "experts again": Run(_SPLIT, recompute=("experts",)),
    "zero2": Run(Layout(dp_degree=2, zero_stage=2)),
    "zero3": Run(Layout(dp_degree=2, zero_stage=3)),
    "tp2": Run(LAYOUTS["tp2"]),
    "cp2": Run(LAYOUTS["cp2"]),
    "ep2": Run(LAYOUTS["ep2"]),
}
Mark = tuple[int, int]


class Count(TorchDispatchMode):
    """Operators and collectives so far; a stopwatch whose time they are."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.collectives = 0

    def __torch_dispatch__(
        self, func: Any, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Count, and do it."""
        if func.namespace == "c10d":
            self.collectives += 1
        else:
            self.operators += 1
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        """Nothing to tie together."""

    def mark(self) -> Mark:
        """This instant."""
        return self.operators, self.collectives


def main() -> None:
    """Every run on both ranks; the first rank writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    found: list[Any] = [None, None]
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), 512, parts=("json", "email"))
        rows = []
        for name, run in RUNS.items():
            if rank < run.layout.ranks:
                rows += [{"run": name, **row} for row in counted(run, data, rank)]
            dist.barrier()
    dist.all_gather_object(found, rows)
    if rank == 0:
        lines = [row for name in RUNS for each in found for row in each if row["run"] == name]
        print(*lines, sep="\n")
        print(write_result("launches", lines, out=words.out))
    dist.destroy_process_group()


def counted(run: Run, data: Path, rank: int) -> list[dict[str, Any]]:
    """Medians of each kind of slot of one rank's second step; ranks with equal slots count them twice."""
    trainer, count = trainer_of(run, data, rank), Count()
    pipeline: Any = trainer.executor.pipeline
    trainer.step()
    pipeline.stopwatch = Watch(count.start, count.mark)
    with count:
        trainer.step()
    slots: dict[tuple[str, int], list[Mark]] = defaultdict(list)
    for slot, start, end in pipeline._marks:  # noqa: SLF001 (counts where spans have times)
        if slot.second is None:
            slots[key(slot)].append((end[0] - start[0], end[1] - start[1]))
    if rank and run.layout.pp_degree == 1:
        return []
    return [
        {
            "kind": kind,
            "stage": stage,
            "operators": statistics.median(each[0] for each in marks),
            "collectives": statistics.median(each[1] for each in marks),
        }
        for (kind, stage), marks in slots.items()
    ]


@dataclass(frozen=True)
class Watch:
    """What the pipeline takes for a stopwatch."""

    start: Callable[[], None]
    mark: Callable[[], Mark]


def key(slot: Slot) -> tuple[str, int]:
    """Kind and stage of a slot with one action."""
    return slot.first.kind, slot.first.stage


def trainer_of(run: Run, data: Path, rank: int) -> Trainer:
    """Two rows of 32 tokens a microbatch, eight microbatches."""
    config = RunConfig(
        model=run.model,
        layout=run.layout,
        recompute=run.recompute,
        train=LoopConfig(steps=2, seq_len=32, local_batch_size=2, global_batch_size=16, lr=3e-4),
        log=LogConfig(tensorboard=False, pictures=False),
        device="cpu",
    )
    config = apply(config, ["precision.weights=bfloat16", "optimizer.moment_dtype=bfloat16"])
    meta = read_meta(data)
    resolved = resolve(config, detect("cpu"), meta, ranks=run.layout.ranks).config
    return Trainer(resolved, TokenShards(data, meta, "train"), Mesh.of(run.layout, rank))


if __name__ == "__main__":
    main()
