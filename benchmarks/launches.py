"""What the host calls in every slot of a training step on a GPU, without one.

    python benchmarks/launches.py

What `benthic.plan.training.launches` sums up: the slice of Moonlight under the layouts of `train_ranks.py`,
and with what changes a block: more dense layers, a query of low rank, a prediction module, recomputation. The
trainer runs as it is on torch's meta device with the choices of a GPU (`allocations.py`). Counted are calls:
operators as torch dispatches them, views and empty tensors too, launches of Triton kernels, and calls of CUDA
for what runs on another stream, each of which costs the host about as much; collectives; and the phases that
a stage is cut into. Messages between pipeline ranks are sent between slots.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from unittest import mock

from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))

from allocations import Allocations, Keeping, on_meta, world, write_documents
from moonlight_slices import LAYOUTS, moonlight_slice
from peaks import FP8, NARROW, V3, Case
from provenance import write_result

from benthic.parallel.mesh import Mesh
from benthic.plan.training.candidate import Numbers
from benthic.spec.layout import Layout
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from benthic.sched.pipeline.table import Slot
    from benthic.spec.model import ModelConfig
    from benthic.train.config import RunConfig


@dataclass(frozen=True)
class Run:
    """What is counted: a layout, fields of the model, what is computed again, the numbers."""

    layout: Layout
    changes: dict[str, Any] = field(default_factory=dict)
    recompute: tuple[str, ...] = ()
    precision: Numbers = field(default_factory=Numbers)

    @property
    def model(self) -> ModelConfig:
        """Its model."""
        return dataclasses.replace(moonlight_slice(), **self.changes)

    @property
    def rows(self) -> int:
        """Eight microbatches of one row on every data rank."""
        return 8 * self.layout.dp_degree

    @property
    def config(self) -> RunConfig:
        """As the trainer sees it."""
        case = Case(layout=self.layout, rows=self.rows, recompute=self.recompute, precision=self.precision)
        return dataclasses.replace(case.config, model=self.model)


_SPLIT: Final = LAYOUTS["zb-h1"]
PIECES: Final = ("norms", "up_projections", "swiglu")
RUNS: Final[dict[str, Run]] = {
    "1 rank": Run(Layout()),
    "zb-h1": Run(_SPLIT),
    "zb-h1, FP8": Run(_SPLIT, precision=FP8),
    "two dense, FP8": Run(_SPLIT, {"first_k_dense_replace": 2}, precision=FP8),
    "dualpipe": Run(LAYOUTS["dualpipe"]),
    "dualpipev-ep2": Run(LAYOUTS["dualpipev-ep2"]),
    "two dense": Run(_SPLIT, {"first_k_dense_replace": 2}),
    "low-rank query": Run(_SPLIT, {"q_lora_rank": 768}),
    "prediction": Run(_SPLIT, {"num_nextn_predict_layers": 1}),
    "attention again": Run(_SPLIT, recompute=("attention",)),
    "experts again": Run(_SPLIT, recompute=("experts",)),
    **{f"{piece} again": Run(_SPLIT, recompute=(piece,)) for piece in PIECES},
    **{f"{piece} again, FP8": Run(_SPLIT, recompute=(piece,), precision=FP8) for piece in PIECES},
    "narrow": Run(_SPLIT, precision=NARROW),
    "as DeepSeek-V3": Run(_SPLIT, recompute=V3, precision=NARROW),
    "zero2": Run(Layout(dp_degree=2, zero_stage=2)),
    "zero3": Run(Layout(dp_degree=2, zero_stage=3)),
    "tp2": Run(LAYOUTS["tp2"]),
    "cp2": Run(LAYOUTS["cp2"]),
    "ep2": Run(LAYOUTS["ep2"]),
    "ep2, as DeepSeek-V3": Run(LAYOUTS["ep2"], recompute=V3, precision=NARROW),
    "ep2, FP8": Run(LAYOUTS["ep2"], precision=FP8),
    "ep16": Run(Layout(dp_degree=16, ep_degree=16)),
}


PUSH: Final = 8
"""Calls for a push of the exchange: two events made and recorded, each awaited, two switches of streams."""


class Mark(NamedTuple):
    """Calls so far."""

    calls: int
    collectives: int


class Count(Allocations):
    """Calls so far; a stopwatch whose time they are."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__(read)
        self.calls = self.collectives = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Count, and do it."""
        if func.namespace == "c10d":
            self.collectives += 1
        else:
            self.calls += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def launch(self, *_args: object, **_options: object) -> None:
        """What stands for the launch of a Triton kernel."""
        self.calls += 1

    def push(self, push: Callable[[], None], inputs: object) -> Keeping:
        """What stands for the stream of an exchange."""
        self.calls += PUSH
        return Keeping(push, inputs)

    def start(self) -> None:
        """Nothing to tie together."""

    def mark(self) -> Mark:
        """This instant."""
        return Mark(self.calls, self.collectives)


@dataclass(frozen=True)
class Watch:
    """What the pipeline takes for a stopwatch."""

    start: Callable[[], None]
    mark: Callable[[], Mark]


def main() -> None:
    """Every run on every pipeline rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_documents(Path(folder) / "data")
        rows = [
            {"run": name, **row}
            for name, run in RUNS.items()
            for pp in range(run.layout.pp_degree)
            if pp == 0 or run.layout.schedule == "zb-h1"  # others have all stages on every rank
            for row in counted(run, data, pp)
        ]
    print(*rows, sep="\n")
    print(write_result("launches", rows, out=words.out))


def counted(run: Run, data: Path, pp: int = 0) -> list[dict[str, Any]]:
    """Medians of each kind of slot with one action of one rank's second step."""
    config, rank = run.config, run.layout.rank_at(pp, 0)
    with world(config, rank), on_meta(config) as found, counting(found) as count:
        trainer = Trainer(config, TokenShards(data, read_meta(data), "train"), Mesh.of(config.layout, rank))
        pipeline: Any = trainer.executor.pipeline
        with count:
            trainer.step()
            pipeline.stopwatch = Watch(count.start, count.mark)
            trainer.step()
        stages: Any = trainer.executor._stages  # noqa: SLF001
        cuts = {number: len(stage.phases(0)) for number, stage in stages.items()}
    slots: dict[tuple[str, int], list[Mark]] = defaultdict(list)
    for slot, start, end in pipeline._marks:  # noqa: SLF001 (counts where spans have times)
        if slot.second is None:
            slots[key(slot)].append(Mark(end.calls - start.calls, end.collectives - start.collectives))
    return [
        {
            "kind": kind,
            "stage": stage,
            "phases": cuts[stage],
            "calls": statistics.median(each.calls for each in marks),
            "collectives": statistics.median(each.collectives for each in marks),
        }
        for (kind, stage), marks in slots.items()
    ]


@contextlib.contextmanager
def counting(found: Allocations) -> Iterator[Count]:
    """Count launches of Triton kernels and pushes too."""
    count = Count(found.read)
    with (
        mock.patch.object(JITFunction, "run", count.launch),
        mock.patch("benthic.parallel.exchange_nvlink.push_stream", return_value=count.push),
    ):
        yield count


def key(slot: Slot) -> tuple[str, int]:
    """Kind and stage of a slot with one action."""
    return slot.first.kind, slot.first.stage


if __name__ == "__main__":
    main()
