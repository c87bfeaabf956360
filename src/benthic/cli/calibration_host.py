"""What the host takes for a call of a training step: half of what `benthic calibrate` knows of small ones.

A slice of Moonlight with few experts trains on short rows, and the clock is the host's own: a slot lasts as
long as launching it, whatever the GPU still has to do. How often a slot calls an operator or a kernel is what
the planner counts (`plan/training/launches.py`), so both mean the same call.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from benthic.parallel.mesh import Mesh
from benthic.parallel.stopwatch import Stopwatch
from benthic.plan.cost import machine as machines
from benthic.plan.training import launches
from benthic.plan.training.candidate import Candidate, Rows
from benthic.plan.training.stage import shape_of
from benthic.spec import presets
from benthic.spec.layout import Layout
from benthic.train.config import LogConfig, LoopConfig, RunConfig
from benthic.train.data.shards import TokenShards, read_meta, write_made_up
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.plan.training.launches import Calls
    from benthic.spec.model import ModelConfig
    from benthic.train.data.shards import Split


@dataclass(frozen=True)
class Sizes:
    """What trains: a model, tokens of a row, microbatches of a step, and how many steps are timed.

    warm: steps before those. Together some seconds, for a host that has waited begins slowly.
    """

    model: ModelConfig
    seq_len: int = 256
    microbatches: int = 4
    warm: int = 6
    steps: int = 18

    @property
    def calls(self) -> Calls:
        """Of one microbatch, as the planner counts them."""
        one = Candidate(
            model=self.model, layout=Layout(), train=Rows(seq_len=self.seq_len), rows=self.microbatches
        )
        shape = shape_of(one, machines.get("h200"))
        found = launches.of_stage(0).plus(launches.of_end("embedding")).plus(launches.of_end("head"))
        for layer in range(self.model.num_hidden_layers):
            found = found.plus(launches.of_block(shape, moe=self.model.is_moe(layer)))
        return found


ON_GPU: Final = Sizes(
    replace(
        presets.get("moonlight-16b-a3b"),
        name="moonlight, few experts",
        num_hidden_layers=3,
        n_routed_experts=8,
        vocab_size=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
)


def overheads(
    device: str, sizes: Sizes = ON_GPU, *, clock: Callable[[], float] = perf_counter
) -> dict[str, float]:
    """Seconds of the host for one call, forward and backward, by the names that a profile has.

    Trains for `sizes.warm + sizes.steps` steps. On a CPU, where calls compute, seconds mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(device, sizes, _documents(Path(folder) / "data", sizes))
        # marks of the host: the pipeline asks a stopwatch of the CPU when it hands a slot on
        trainer.executor.pipeline.stopwatch = Stopwatch(torch.device("cpu"), clock)
        took: dict[str, list[float]] = defaultdict(list)
        for step in range(sizes.warm + sizes.steps):
            trainer.step()
            if step >= sizes.warm:
                for span in trainer.executor.pipeline.spans(step):
                    took[span.slot.first.kind].append(span.end - span.start)
    calls = sizes.calls
    backward = statistics.median(took["B"]) / (calls.input + calls.weight)
    return {
        "host operator forward": statistics.median(took["F"]) / calls.forward,
        "host operator input": backward,
        "host operator weight": backward,
    }


def _trainer(device: str, sizes: Sizes, data: Path) -> Trainer:
    """Of one rank."""
    loop = LoopConfig(
        steps=sizes.warm + sizes.steps,
        seq_len=sizes.seq_len,
        local_batch_size=1,
        global_batch_size=sizes.microbatches,
        lr=1e-6,
    )
    log = LogConfig(tensorboard=False, pictures=False)
    config = RunConfig(model=sizes.model, train=loop, log=log, device=device)  # type: ignore[arg-type]
    meta = read_meta(data)
    config = resolve(config, detect(device), meta).config
    return Trainer(config, TokenShards(data, meta, "train"), Mesh.of(Layout(), 0))


def _documents(folder: Path, sizes: Sizes) -> Path:
    """Random tokens, a document a row and more."""
    random = np.random.default_rng(0)
    rows = 2 * sizes.microbatches * (sizes.warm + sizes.steps)
    ids = random.integers(2, sizes.model.vocab_size, (rows, sizes.seq_len)).tolist()
    documents: dict[Split, list[list[int]]] = {"train": ids, "held_out": ids[:1]}
    return write_made_up(folder, documents, vocab_size=sizes.model.vocab_size, shard_tokens=1 << 20)
