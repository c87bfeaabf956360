"""Several ranks as one engine: each holds a shard of the model and all of the cache, and runs every step.

Rank 0 has the scheduler, the sampler and whoever asks; before it runs a plan it tells the others, which run
it on their shards (`benthic.serve.follow`). Collectives inside the network join the shards, so every rank
must run the same steps in the same order. When one cannot, none can: the engine ends and says which.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import ConfigError
from benthic.parallel.divided import divide
from benthic.parallel.team import Team
from benthic.serve.build import Rank, assemble
from benthic.serve.commands import Move, Remember, Score, Step
from benthic.serve.weights import eos_token_ids, load_weights, prepare
from benthic.spec.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from benthic.parallel.team import Store
    from benthic.sched.plans import StepPlan
    from benthic.serve.build import Parts
    from benthic.serve.drafts import Drafts
    from benthic.serve.followers import Followers
    from benthic.serve.options import EngineOptions

COLLECTIVE_S: Final = 300.0
"""How long a collective may take: a rank may compile kernels meanwhile."""


@dataclass(frozen=True)
class Leading:
    """Tells the other ranks what rank 0's runner is about to do, and sends the tensors that this takes.

    A `benthic.serve.runner.Lead`.
    """

    followers: Followers
    team: Team

    def move(self, plan: StepPlan) -> None:
        """Blocks are about to go to host memory, or to come back; every rank has its own of all."""
        self.followers.tell(Move(plan.to_host, plan.from_host))

    def step(self, plan: StepPlan, drafts: Drafts | None) -> None:
        """A step is about to run."""
        self.followers.tell(Step.of(plan, drafts))
        if drafts is not None:
            self.team.told(drafts.token_DK.contiguous())

    def score(self, rows: range) -> None:
        """Logits of some rows of the latest step are about to be computed."""
        self.followers.tell(Score(rows.start, rows.stop))

    def newest(self, slots: tuple[int, ...], token_S: Tensor) -> None:
        """Tokens have been drawn for these slots."""
        self.followers.tell(Remember(slots))
        self.team.told(token_S.contiguous())


def shard_of(options: EngineOptions, rank: int) -> Shard:
    """What a rank holds, as the options say."""
    return Shard(
        index=rank,
        size=options.ranks,
        whole_experts=options.enable_expert_parallel,
        own_tokens=options.data_parallel_size > 1,
    )


def own_options(options: EngineOptions, rank: int) -> EngineOptions:
    """The options of one rank: a GPU of its own, or its part of the cores.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    device, size = torch.device(options.device), options.ranks
    options = options if rank == 0 else replace(options, record=None)
    if device.type != "cuda":
        threads = options.num_threads or max(1, ((os.cpu_count() or 1) - 1) // size)
        return replace(options, num_threads=threads)
    first, there = device.index or 0, torch.cuda.device_count()
    if first + size > there:
        degree = shard_of(options, rank).degree
        msg = (
            f"{degree} = {size} from cuda:{first} on needs {first + size} GPUs, but torch sees {there} here. "
            f"Lower {degree}."
        )
        raise ConfigError(msg)
    return replace(options, device=f"cuda:{first + rank}")


def join(options: EngineOptions, store: Store | int, rank: int, followers: Followers | None = None) -> Rank:
    """Meet the other ranks; `options` are this rank's own, `followers` rank 0's. Every rank must call it."""
    device = torch.device(options.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    team = Team.join(store, rank, options.tensor_parallel_size, device, timeout_s=COLLECTIVE_S)
    return Rank(shard_of(options, rank), team, None if followers is None else Leading(followers, team))


def build_shard(path: Path, options: EngineOptions, rank: Rank, meet: Callable[[str], None]) -> Parts:
    """Load this rank's shard and assemble the parts of an engine round it.

    `meet` is called between the two: from then on ranks wait for each other in collectives.
    """
    device, dtype = prepare(options)
    model, scales = load_weights(path, options, device, dtype, rank.shard)
    meet("loaded")
    divide(model, rank.team)
    eos = eos_token_ids(path, model.config)
    return assemble(model, options, model_name=path.name, eos=eos, scales=scales, rank=rank)
