"""How a step computes: kernel by kernel, or as one CUDA graph, for which no host is too slow.

What is recorded is everything between the batch and the update: forward and backward of all microbatches
through the pipeline table, transfers and sums between ranks, the gradients' norm. What differs from step to
step lies in memory that the graph reads: tokens, where documents begin, the weights of the losses. How many
rows each dispatch brings to the experts of a rank is not known before: there is room for somewhat more than
it has brought, and a step that brings more still is computed again, kernel by kernel, and recorded anew.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import torch
import torch.distributed as dist  # noqa: TID251 (ranks replay together or not at all)

from benthic.errors import ConfigError
from benthic.parallel.buckets import global_norm
from benthic.parallel.exchange_routes import Room
from benthic.parallel.setup import SPARE_ROWS
from benthic.train.data.microbatch import sent
from benthic.train.exchange import asks_for_rows
from benthic.units import binary_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from benthic.parallel.buckets import Bucket
    from benthic.parallel.mesh import Mesh
    from benthic.sched.pipeline.table import Table
    from benthic.train.data.microbatch import Microbatch
    from benthic.train.executor import Executor, Outcome, Placed
    from benthic.train.losses import Weights

logger = logging.getLogger("benthic.train")

RESERVE: Final = 3 << 30
"""Bytes that must be left beside a recorded step: an evaluation, holes between tensors, the graph itself."""


class Found(NamedTuple):
    """Losses and counts of a step and the 2-norm of its gradients, which are in the buckets."""

    outcome: Outcome
    norm: Tensor


class Computation(Protocol):
    """What a step is before its update."""

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """Clear the gradients, compute them, sum them over the ranks."""
        ...

    def again(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """The same for a step for which there was not enough room."""
        ...

    def close(self) -> None:
        """Let go of what outlives a step; NCCL does not end before graphs with its kernels do."""
        ...


@dataclass(frozen=True)
class Direct:
    """The host launches every kernel."""

    executor: Executor
    buckets: Sequence[Bucket]
    mesh: Mesh

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """See `Computation`."""
        return self.placed([self.executor.place(each) for each in batch], weights)

    again = run

    def close(self) -> None:
        """Nothing does."""

    def placed(self, batch: Sequence[Placed], weights: Weights) -> Found:
        """`run` of what is on the device: nothing comes from the host or goes there."""
        for bucket in self.buckets:
            bucket.zero()
        outcome = self.executor.run_placed(batch, weights)
        for bucket in self.buckets:
            bucket.settle()
        return Found(outcome, global_norm(self.buckets, self.mesh.world))


class Graph(Protocol):
    """A recorded computation and where it leaves what it finds."""

    found: Found

    def replay(self) -> None:
        """Run it again, behind all that was launched."""
        ...

    def reset(self) -> None:
        """It will not run again."""
        ...


class OnGpu:
    """A CUDA graph, recorded from what this thread launches: others look after NCCL."""

    def __init__(self, compute: Callable[[], Found]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.found = compute()
        self._graph = graph
        self.replay = graph.replay

    def reset(self) -> None:
        """Wait for the last run, and free what is the graph's."""
        torch.cuda.synchronize()
        self._graph.reset()


@dataclass(frozen=True)
class Shape:
    """What two steps must share to run as one graph."""

    table: Table
    sequences: int
    rows: tuple[int, ...]
    balance: float

    def like(self, other: Shape | None) -> bool:
        """Tables are compared by identity: a trainer has one until its steps change their size."""
        return other is not None and self.table is other.table and replace(self, table=other.table) == other


@dataclass
class Tape:
    """One recorded step: the memory that it reads, and its graph and what that leaves, once there is one."""

    shape: Shape
    batch: list[Placed]
    factors: Tensor
    weights: Weights
    room: Room | None
    graph: Graph | None = None

    def fill(self, batch: Sequence[Placed], weights: Weights) -> None:
        """Lay another step's operands where the graph reads."""
        here = [tensor for each in self.batch for tensor in (*each.batch.tensors(), each.positions_T)]
        there = [tensor for each in batch for tensor in (*each.batch.tensors(), each.positions_T)]
        torch._foreach_copy_(here, there)
        self.factors.copy_(_factors(weights, self.factors.device))


class Recorded:
    """Steps as CUDA graphs.

    The first step of a shape is launched kernel by kernel, and rows are counted; the second too, with the
    operands of a graph, so that all that is met for the first time is met outside of one; the third is
    recorded. Steps that are measured slot by slot are launched kernel by kernel, and all are, which a warning
    says, if there is no memory for a graph, or the host waited for its device in the second step: sizes that
    no kernel of ours takes may need it.

    Memory: that of a step, which belongs to its graph from then on.

    Args:
        direct: what is recorded.
        beside: bytes that an update allocates, which a graph's memory cannot be lent to.
        record: makes a graph of a call.

    Attributes:
        refused: no step will be recorded.
    """

    def __init__(
        self, direct: Direct, beside: int = 0, record: Callable[[Callable[[], Found]], Graph] = OnGpu
    ) -> None:
        self.direct, self._beside, self._to_graph = direct, beside, record
        self._seen: Shape | None = None
        self._tape: Tape | None = None
        self._sequences = 0
        self._spare, self._rows = 1, list[int]()
        self.refused = self._known = False

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """See `Computation`.

        Raises:
            ConfigError: the step cannot be recorded; the error says why.
        """
        if self.refused or self.direct.executor.timed:
            return self.direct.run(batch, weights)
        shape = self._shape(batch, weights)
        if not shape.like(self._seen):
            self._forget()
            self._seen, self._rows, self._known = shape, [], False
            return self._counted(batch, weights)
        if self._tape is None and self._refuses(self._no_memory()):
            return self.direct.run(batch, weights)
        placed = [self.direct.executor.place(each.padded(shape.sequences)) for each in batch]
        if self._tape is None:
            self._tape = self._begin(shape, placed, weights)
            if not self._known:
                return self._rehearse(self._tape)
        self._tape.fill(placed, weights)
        if self._tape.graph is None:
            self._record(self._tape)
        return self._replayed(self._tape)

    def again(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """See `Computation`; what is recorded had too little room."""
        shape = self._seen
        self._forget()
        self._seen, self._spare = shape, 2 * self._spare
        return self._counted(batch, weights)

    def _counted(self, batch: Sequence[Microbatch], weights: Weights) -> Found:
        """Kernel by kernel, and how many rows each dispatch brings, at most so far."""
        found, exchange = self.direct.run(batch, weights), self.direct.executor.exchange
        if asks_for_rows(exchange):
            before = self._rows or [0] * len(exchange.counted)
            self._rows = [max(pair) for pair in zip(before, exchange.counted, strict=True)]
        return found

    def close(self) -> None:
        """See `Computation`."""
        self._forget()

    def _shape(self, batch: Sequence[Microbatch], weights: Weights) -> Shape:
        """Of this step on all ranks: their numbers of documents differ."""
        most = max(max(each.cu_seqlens.numel() - 1, 2 * each.rows) for each in batch)
        self._sequences = max(self._sequences, 1 << (self._most(most) - 1).bit_length())
        rows = tuple(each.rows for each in batch)
        return Shape(self.direct.executor.pipeline.table, self._sequences, rows, weights.balance)

    def _most(self, number: int) -> int:
        world = self.direct.mesh.world
        if world.handle is None:
            return number
        found = torch.tensor(number, device=self.direct.executor.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=world.handle)
        return int(found)

    def _begin(self, shape: Shape, placed: list[Placed], weights: Weights) -> Tape:
        executor = self.direct.executor
        factors = _factors(weights, executor.device).clone()
        main, *mtp = factors.unbind()
        room = None
        if asks_for_rows(executor.exchange):
            rows = [each + self._spare * each // SPARE_ROWS + 1 for each in self._rows]
            room = Room(rows, torch.zeros((), dtype=torch.int64, device=executor.device))
        return Tape(shape, placed, factors, replace(weights, main=main, mtp=tuple(mtp)), room)

    def _computed(self, tape: Tape) -> Found:
        """Kernel by kernel, with the operands of a graph."""
        exchange, computed = self.direct.executor.exchange, self.direct.placed
        if not asks_for_rows(exchange):
            return computed(tape.batch, tape.weights)
        exchange.room = tape.room
        try:
            return computed(tape.batch, tape.weights)
        finally:
            exchange.room = None

    def _rehearse(self, tape: Tape) -> Found:
        """The second step; afterwards every rank knows whether the host of any waited."""
        with waits(self.direct.executor.device) as seen:
            found = self._computed(tape)
        if not self._refuses(f"the host waits for its device in them: {seen[0]}" if seen else None):
            self._known = True
        return found

    def _refuses(self, reason: str | None) -> bool:
        """Whether any rank has a reason to record no step; every rank must call it."""
        reason = self.direct.executor.first(reason)
        if reason is not None:
            if self.direct.mesh.rank == 0:
                logger.warning("steps are launched kernel by kernel: %s", reason)
            self.refused, self._tape = True, None
        return self.refused

    def _no_memory(self) -> str | None:
        """Too little for the most that has been in use and a graph's spare rows, in words."""
        device = self.direct.executor.device
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        most, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        others = total - free - torch.cuda.memory_reserved(device)
        spare = (most - now) * self._spare // SPARE_ROWS if self._rows else 0
        needed = most + spare + self._beside + others + RESERVE
        if needed <= total:
            return None
        return f"a CUDA graph of one needs {binary_bytes(needed)} of the device's {binary_bytes(total)}"

    def _record(self, tape: Tape) -> None:
        """Copies of weights are made inside, as if all had just been updated."""
        for bucket in self.direct.buckets:
            bucket.changed()
        self.direct.executor.linear.recorded(begin=True)
        try:
            tape.graph = self._to_graph(lambda: self._computed(tape))
        except Exception as error:
            message = f"a step could not be recorded as a CUDA graph: {error}. Set train.cuda_graph=false."
            raise ConfigError(message) from error

    def _replayed(self, tape: Tape) -> Found:
        assert tape.graph is not None, "nothing is recorded"  # noqa: S101
        tape.graph.replay()
        world, found = self.direct.mesh.world, tape.graph.found
        if world.handle is not None:  # who watches how long collectives take sees none of a graph's, but this
            dist.all_reduce(torch.zeros(1, device=self.direct.executor.device), group=world.handle)
        return Found(found.outcome.kept(), found.norm.clone())

    def _forget(self) -> None:
        if self._tape is not None and self._tape.graph is not None:
            self._tape.graph.reset()
            self.direct.executor.linear.recorded(begin=False)
        self._seen = self._tape = None


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waits for a GPU meanwhile, in torch's words; a graph may not have that."""
    seen: list[str] = []
    if device.type != "cuda":
        yield seen
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in caught:
        if "called a synchronizing CUDA operation" in str(each.message):
            seen.append(f"{each.filename}, line {each.lineno}")
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _factors(weights: Weights, device: torch.device) -> Tensor:
    """The weights of the main loss and of every MTP depth."""
    return sent(torch.tensor([weights.main, *weights.mtp], dtype=torch.float32), device)
