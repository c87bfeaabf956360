"""A stage of the network as phases that an executor runs: embedding, blocks, head, MTP modules, losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benthic.model.network import Hidden, Passed
from benthic.parallel.chunk import Step, joined
from benthic.parallel.pipeline import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from benthic.model.block import Block
    from benthic.model.network import DeepSeek
    from benthic.model.rope import Angles
    from benthic.model.sockets import Sockets
    from benthic.parallel.buckets import Bucket
    from benthic.parallel.chunk import Phase
    from benthic.parallel.recorder import Pace
    from benthic.train.data.microbatch import Microbatch
    from benthic.train.losses import Objective
    from benthic.train.scoring import Scored


@dataclass(frozen=True)
class Task:
    """One microbatch as one rank computes it.

    `batch` holds this rank's tokens; `positions_T` are those of the tokens from which attention asks, which
    are all of the tensor group's.
    """

    batch: Microbatch
    positions_T: Tensor
    sockets: Sockets
    objective: Objective | Scored


@dataclass(frozen=True)
class Held:
    """The sharded parameters of one or several units, as one, for products that may read copies of them."""

    buckets: tuple[Bucket, ...]

    def acquire(self) -> None:
        """Make the parameters whole."""
        for bucket in self.buckets:
            bucket.acquire(copies=True)

    def release(self) -> None:
        """They are not needed until the next `acquire`."""
        for bucket in self.buckets:
            bucket.release(copies=True)


@dataclass
class ModelStage:
    """One stage of this rank, with the microbatches of the present step.

    Args:
        model: the part of the network.
        first: whether microbatches enter here.
        buckets: the parameters by unit.
        pace: measures attention; None: nothing is measured.
        paired: some slot runs two microbatches alternately, so that one computes while rows of the other
            travel to experts or back: there its phases end.
    """

    model: DeepSeek
    first: bool
    buckets: Mapping[str, tuple[Bucket, ...]]
    tasks: Sequence[Task] = field(default_factory=tuple)
    pace: Pace | None = None
    paired: bool = True

    def boundary(self, microbatch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the residual stream at the front of the stage."""
        tokens = self.tasks[microbatch].batch.tokens_T.numel()
        return (tokens, self.model.config.hidden_size), next(self.model.parameters()).dtype

    def finished(self, microbatch: int) -> None:  # noqa: ARG002 (every microbatch alike)
        """Under ZeRO-2 and 3, shard the gradients as soon as a microbatch's are in."""
        for unit, buckets in self.buckets.items():
            for bucket in buckets:
                if bucket.zero_stage > 1 and self._uses(unit):
                    bucket.reduce()

    def phases(self, microbatch: int) -> list[Phase]:
        """Everything that happens to a microbatch here, in order."""
        return joined(self._steps(self.tasks[microbatch]), apart=self.paired)

    def _uses(self, unit: str) -> bool:
        top, _, index = unit.partition(".")
        if top == "layers":
            return int(index) in self.model.part.layers
        if top == "mtp":
            return int(index) in self.model.part.mtp
        return self.model.part.embed if top == "embed" else self.model.part.head

    def _steps(self, task: Task) -> Iterator[Step]:
        model = self.model
        angles = model.rotary(task.positions_T)
        if self.first:
            yield self._step("embed", lambda _: Flow(model.embed(task.batch.tokens_T)), "embed")
        for block in model.blocks:
            yield from self._block(block, task, angles, f"layers.{block.layer}")
        if model.part.head:
            yield self._step("head", lambda flow: self._head(flow, task), "head")
        for depth in model.part.mtp:
            yield from self._mtp(depth, task, angles)

    def _step(self, name: str, run: Callable[[Flow], Flow], *units: str, **known: bool) -> Step:
        buckets = tuple(b for unit in units for b in self.buckets[unit] if b.gathered)
        return Step(name, run, Held(buckets) if buckets else None, **known)

    def _block(self, block: Block, task: Task, angles: Angles, unit: str) -> Iterator[Step]:
        sockets, config = task.sockets, self.model.config

        def attention(flow: Flow) -> Flow:
            return Flow(block.attention(flow.value, angles, sockets), flow.loss)

        def experts(flow: Flow) -> Flow:
            routing, loss = block.routing(flow.value), flow.loss
            if routing is not None:
                top_k, count = config.num_experts_per_tok, config.n_routed_experts
                here = task.objective.routed(block.layer, routing, top_k=top_k, experts=count)
                loss = here if loss is None else loss + here
            return Flow(block.experts(flow.value, sockets), loss)

        def dispatch(flow: Flow) -> Flow:
            return Flow(block.dispatch(flow.value, sockets), flow.loss)

        def combine(flow: Flow) -> Flow:
            return Flow(block.combine(flow.value, sockets), flow.loss)

        attend = attention if self.pace is None else self.pace.timed(attention)
        yield self._step(f"{unit}.attention", attend, unit)
        yield self._step(f"{unit}.dispatch", dispatch, unit, sends=block.sends)
        yield self._step(f"{unit}.experts", experts, unit, sends=block.sends)
        yield self._step(f"{unit}.combine", combine)

    def _head(self, flow: Flow, task: Task) -> Flow:
        hidden = self.model.finish(Passed(flow.value, ()))
        loss = task.objective.main(self.model, hidden, task.batch.target_KT[0])
        return Flow(self.model.mtp_input(hidden) if self.model.part.mtp else None, _plus(flow.loss, loss))

    def _mtp(self, depth: int, task: Task, angles: Angles) -> Iterator[Step]:
        model, module, unit = self.model, self.model.mtp_module(depth), f"mtp.{depth}"

        def project(flow: Flow) -> Flow:
            embedded_TD = model.embed(task.batch.ahead_KT[depth])
            return Flow(module.project(embedded_TD, flow.value, task.sockets), flow.loss)

        def head(flow: Flow) -> Flow:
            hidden = Hidden(flow.value, module.norm(flow.value), ())
            loss = task.objective.ahead(model, hidden, task.batch.target_KT[depth + 1], depth)
            further = depth + 1 < len(model.part.mtp)
            return Flow(model.mtp_input(hidden) if further else None, _plus(flow.loss, loss))

        yield self._step(f"{unit}.project", project, unit, "embed", again=True)
        yield from self._block(module.block, task, angles, unit)
        yield self._step(f"{unit}.head", head, unit, "head")


def _plus(loss: Tensor | None, more: Tensor) -> Tensor:
    return more if loss is None else loss + more
