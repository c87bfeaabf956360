"""How one optimizer step's microbatches are computed: the stages of this rank, driven by the pipeline table.

One process is the table of one rank and one stage; the trainer sees no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251 (sums over ranks are what a multi-rank step is made of)

from benthic.model.local import PackedAttend
from benthic.model.sockets import Sockets
from benthic.parallel.context import ContextAttend
from benthic.parallel.links import GroupLinks
from benthic.parallel.pipeline import TableExecutor
from benthic.parallel.tokens import TokenShare
from benthic.train.data.microbatch import sent
from benthic.train.evaluate import Scores
from benthic.train.exchange import asks_for_rows, overlaps, room_of
from benthic.train.losses import Objective, Tally, total
from benthic.train.scoring import Scored, rounds
from benthic.train.stage import ModelStage, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.products import WeightGradients
    from benthic.model.sockets import Attend, Exchange, Linear
    from benthic.parallel.mesh import Group, Mesh
    from benthic.parallel.recorder import Pace
    from benthic.parallel.stages import Stages
    from benthic.sched.pipeline.table import Table
    from benthic.spec.model import ModelConfig
    from benthic.train.data.microbatch import Microbatch
    from benthic.train.losses import Weights


@dataclass(frozen=True)
class Outcome:
    """Sums over all microbatches of a step and all ranks, as `losses.Tally`; gradients are in the buckets.

    `over` counts dispatches for which an exchange had no room: if there were any, the rest is wrong.
    """

    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor
    over: Tensor
    counts: dict[int, Tensor]

    def kept(self) -> Outcome:
        """A copy, which the next replay of a recorded step does not overwrite."""
        main, *mtp, balance, over = torch.stack([self.main, *self.mtp, self.balance, self.over]).unbind()
        counts = torch.stack(list(self.counts.values())).unbind() if self.counts else ()
        return Outcome(main, tuple(mtp), balance, over, dict(zip(self.counts, counts, strict=True)))


class Placed(NamedTuple):
    """This rank's tokens of a microbatch on its device.

    `positions_T` are those from which attention asks; `attend` is there if ranks share a row's attention.
    """

    batch: Microbatch
    positions_T: Tensor
    attend: ContextAttend | None = None


class Sums(NamedTuple):
    """The losses of an `Outcome` and the gradients' norm, as the host knows them."""

    main: float
    mtp: tuple[float, ...]
    balance: float
    norm: float
    over: int = 0

    @classmethod
    def of(cls, outcome: Outcome, norm: Tensor) -> Sums:
        """Wait once for the device; what is queued behind this is not waited for."""
        wide = norm.to(outcome.main.dtype)
        found = torch.stack([outcome.main, *outcome.mtp, outcome.balance, wide, outcome.over])
        main, *mtp, balance, length, over = found.tolist()
        return cls(main, tuple(mtp), balance, length, int(over))


class Executor:
    """Forward and backward of one step on this rank.

    Args:
        config: the whole model.
        table: the pipeline schedule.
        stages: what this rank holds.
        mesh: the ranks.
        device: of this rank.
        linear: the socket.
        exchange: the socket.
        sink: of the socket's weight gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        table: Table,
        stages: Stages,
        mesh: Mesh,
        device: torch.device,
        linear: Linear,
        exchange: Exchange,
        sink: WeightGradients,
    ) -> None:
        self.config, self.mesh, self.device, self.linear = config, mesh, device, linear
        self.exchange, self._sink = exchange, sink
        self.tally = Tally()
        paired = overlaps(table) and mesh.layout.ep_degree > 1
        self._stages = {
            s: ModelStage(m, s == 0, stages.buckets, paired=paired) for s, m in stages.models.items()
        }
        links = None if mesh.pipeline.handle is None else GroupLinks(mesh.pipeline.handle, device)
        self.pipeline = TableExecutor(table, mesh.place.pp, self._stages, links, sink)

    @property
    def models(self) -> tuple[DeepSeek, ...]:
        """The parts of the network on this rank, in order."""
        return tuple(stage.model for stage in self._stages.values())

    def first(self, found: str | None) -> str | None:
        """Of what every rank found, that of the lowest pipeline rank; every rank must call it."""
        world = self.mesh.world
        if world.handle is None:
            return found
        everything: list[str | None] = [None] * world.size
        dist.all_gather_object(everything, found, group=world.handle)
        return next((f"{text} (rank {rank})" for rank, text in enumerate(everything) if text), None)

    def follow(self, table: Table) -> None:
        """Run another number of microbatches from the next step on."""
        self.pipeline = replace(self.pipeline, table=table)

    def measure(self, pace: Pace | None) -> None:
        """Let `pace` time the attention of every block from now on; None: nothing."""
        for stage in self._stages.values():
            stage.pace = pace

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Outcome:
        """Add the gradient of the weighted loss of every microbatch to this rank's parameters."""
        return self.run_placed([self.place(each) for each in batch], weights)

    def run_placed(self, placed: Sequence[Placed], weights: Weights) -> Outcome:
        """`run` of microbatches that are on the device, without any copy from or to the host."""
        self.tally.clear()
        self._take([self._task(each, self._objective(each.batch, weights)) for each in placed])
        self.pipeline.run()
        return self._outcome()

    @property
    def timed(self) -> bool:
        """Whether slots or the attention of blocks are measured."""
        return self.pipeline.stopwatch is not None or any(s.pace is not None for s in self._stages.values())

    @torch.no_grad()
    def score(self, batches: Iterator[Microbatch]) -> Scores:
        """Score microbatches, dealt to the data ranks; every rank calls it with all of them."""
        mesh, sums = self.mesh, Scores()
        each = self.pipeline.table.microbatches
        for batch in rounds(batches, mesh.layout.dp_degree, mesh.place.dp, each):
            found = [Scored() for _ in batch]
            tasks = [self._task(self.place(m), score) for m, score in zip(batch, found, strict=True)]
            self._take(tasks)
            self.pipeline.run(forward_only=True)
            for task, scored in zip(tasks, found, strict=True):
                sums.add(scored.scores(task.batch, whole_rows=mesh.tokens.size == 1))
        counts = (sums.targets, sums.drafts, sums.accepted)
        targets, drafts, accepted = total_of(counts, mesh.world, self.device)
        return Scores(self._sum(sums.nats), targets, drafts, accepted)

    def _sum(self, value: float) -> float:
        total_ = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.mesh.world.handle is not None:
            dist.all_reduce(total_, group=self.mesh.world.handle)
        return float(total_)

    def _take(self, tasks: Sequence[Task]) -> None:
        if asks_for_rows(self.exchange):
            self.exchange.begin()
        for stage in self._stages.values():
            stage.tasks = tasks

    def _objective(self, batch: Microbatch, weights: Weights) -> Objective:
        """The losses of a microbatch, whose rows the ranks of `mesh.tokens` share."""
        shards = self.mesh.tokens.size
        mean = self._mean if shards > 1 else None
        return Objective(weights, self.tally, batch.rows, shards, mean, self._sink)

    def place(self, batch: Microbatch) -> Placed:
        """This rank's part of a microbatch, whose tokens are on the host still."""
        mesh = self.mesh
        if mesh.tokens.size == 1:
            own = batch.to(self.device)
            return Placed(own, own.positions_T)
        share = TokenShare.of(mesh.layout, mesh.place, rows=batch.rows, seq_len=batch.seq_len)
        attend = None
        if mesh.context.size > 1:
            attend = ContextAttend.of(share, batch.cu_seqlens.tolist(), mesh.context, self.device)
        own = batch.take(share.stream()).to(self.device)
        return Placed(own, sent(batch.positions_T[share.attention()], self.device), attend)

    def _task(self, placed: Placed, objective: Objective | Scored) -> Task:
        own = placed.batch
        attend: Attend = placed.attend or PackedAttend(own.cu_seqlens, own.max_seqlen)
        return Task(own, placed.positions_T, Sockets(attend, self.exchange, self.linear), objective)

    def _mean(self, f_SE: Tensor) -> Tensor:
        """Over the ranks that share the tokens of a row, each with equally many."""
        dist.all_reduce(f_SE, group=self.mesh.tokens.handle)
        return f_SE / self.mesh.tokens.size

    def _outcome(self) -> Outcome:
        """What every rank found, together: one sum over the world for losses, one for counts."""
        config, tally = self.config, self.tally
        depths = range(config.num_nextn_predict_layers)
        like = torch.zeros((), device=self.device)
        found = [tally.main, *(tally.mtp.get(depth, []) for depth in depths), tally.balance]
        room = room_of(self.exchange)
        over = like if room is None else room.over
        sums = torch.stack([*(total(terms, like).double() for terms in found), over.double()])
        layers = [i for i in range(config.num_hidden_layers + len(depths)) if config.is_moe(i)]
        empty = torch.zeros(config.n_routed_experts, dtype=torch.int64, device=self.device)
        counts = torch.stack([tally.counts.get(i, empty) for i in layers]) if layers else empty[None]
        if self.mesh.world.handle is not None:
            dist.all_reduce(sums, group=self.mesh.world.handle)
            dist.all_reduce(counts, group=self.mesh.world.handle)
        return Outcome(
            main=sums[0],
            mtp=tuple(sums[1:-2]),
            balance=sums[-2],
            over=sums[-1],
            counts=dict(zip(layers, counts, strict=True)) if layers else {},
        )


def total_of(counts: tuple[int, ...], group: Group, device: torch.device) -> tuple[int, ...]:
    """The sums of some integers over a group of ranks."""
    if group.handle is None:
        return counts
    found = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(found, group=group.handle)
    return tuple(found.tolist())
