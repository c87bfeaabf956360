"""What `benthic calibrate` measures with every rank that a launcher has started: the links between them.

Every rank calls the same collectives in the same order, as often as any other; a size takes as long as it
takes the slowest. What the host takes for a call is measured on all at once too, for they share a host.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

from benthic.parallel import collectives
from benthic.parallel.mesh import Group
from benthic.plan.cost.machine import Measured
from benthic.plan.cost.ops import AllToAll, Collective, PointToPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.cli.calibration import Stopwatch
    from benthic.plan.cost.machine import Profile
    from benthic.plan.cost.ops import Op

    Calls = Iterator[tuple[Op, Callable[[], object]]]

BYTES: Final = {
    "cuda": tuple(2**power for power in range(16, 31, 2)),
    "cpu": tuple(2**power for power in range(14, 23, 2)),
}
"""Of a rank's buffer."""
_REPEATS: Final = 5
_SHORT: Final = 2**24
"""Bytes up to which several calls are timed together."""
_TOGETHER: Final = 20
_LAUNCHES: Final = 100


@dataclass(frozen=True)
class Ranks:
    """The ranks of the default process group, `per_node` of them on every host.

    watch: of "cuda" or "cpu"; rank i of a host has its GPU i.
    """

    watch: Stopwatch
    per_node: int

    @property
    def device(self) -> str:
        """What all ranks measure."""
        return self.watch.device

    @property
    def here(self) -> int:
        """This rank."""
        return dist.get_rank()

    @property
    def count(self) -> int:
        """All of them."""
        return dist.get_world_size()

    @property
    def group(self) -> Group:
        """All of them, as collectives ask for them."""
        return Group(tuple(range(self.count)), self.here, dist.group.WORLD)

    def meet(self) -> None:
        """Wait for all."""
        dist.barrier()

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """The most that any rank says of each."""
        found = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return list(map(float, found))

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Median seconds of one of so many calls; every rank's own.

        Several calls are one CUDA graph on a GPU, as those of a training step are: else the host's time for a
        call would be taken for the link's.
        """
        call()
        if times == 1 or self.device != "cuda":
            return self._median(call, times)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread looks after NCCL
            for _ in range(times):
                call()
        graph.replay()
        took = self._median(graph.replay, 1) / times
        self.watch.wait()
        graph.reset()  # NCCL does not end before graphs with its kernels do
        return took

    def _median(self, call: Callable[[], object], times: int) -> float:
        took = []
        for _ in range(_REPEATS):
            dist.barrier()
            took.append(self.watch.time(call, times) / times)
        return statistics.median(took)

    def launch(self, call: Callable[[], object]) -> float:
        """Seconds until a call has been handed to the GPU."""
        for _ in range(_LAUNCHES):
            call()
        self.watch.wait()
        start = self.watch.clock()
        for _ in range(_LAUNCHES):
            call()
        took = (self.watch.clock() - start) / _LAUNCHES
        self.watch.wait()
        return took


def links(ranks: Ranks, source: str, sizes: Sequence[int] | None = None) -> list[Measured]:
    """All-to-all, collectives and messages of `sizes` bytes; the same on every rank."""
    ops, took = [], []
    for size in sizes or BYTES[ranks.device]:
        for op, call in _calls(ranks, size):
            ops.append(op)
            took.append(ranks.seconds(call, _TOGETHER if size <= _SHORT else 1))
    found = zip(ops, ranks.slowest(took), strict=True)
    return [Measured(op, seconds, source) for op, seconds in found]


def collective(ranks: Ranks) -> dict[str, float]:
    """What the host takes to launch a collective, by the name that a profile has."""
    few = torch.zeros(64, device=ranks.device)
    return {"host collective": ranks.slowest([ranks.launch(lambda: dist.all_reduce(few))])[0]}


def together(
    ranks: Ranks, own: Profile | None, host: dict[str, float], sizes: Sequence[int] | None = None
) -> Profile | None:
    """The first rank's profile with the points of all, with links, and `host` as it is for the slowest rank.

    On a CPU the host waits for its collectives, so nothing is said of launching them.
    """
    source = f"benthic calibrate, {ranks.count} ranks, torch {torch.__version__}"
    points = links(ranks, source, sizes)
    known = dict(zip(host, ranks.slowest(list(host.values())), strict=True)) if host else {}
    if ranks.device == "cuda":
        known |= collective(ranks)
    shares: list[Sequence[Measured]] = [()] * ranks.count
    dist.all_gather_object(shares, own.points if own else ())
    if own is None or ranks.here > 0:
        return None
    everyone = tuple(itertools.chain(*shares, points))
    return replace(own, points=everyone, overheads={**own.overheads, **known})


def _calls(ranks: Ranks, size: int) -> Calls:
    """What is timed with `size` bytes a rank, or in all where every rank has a share."""
    n, near = ranks.count, min(ranks.per_node, ranks.count)
    dtype = torch.bfloat16 if ranks.device == "cuda" else torch.float32
    numel = max(1, size // dtype.itemsize // n) * n
    moved = numel * dtype.itemsize
    whole, other = (torch.zeros(numel, dtype=dtype, device=ranks.device) for _ in range(2))
    share = torch.zeros(numel // n, dtype=dtype, device=ranks.device)
    sent = AllToAll(nvlink=moved * (near - 1) / n, network=moved * (n - near) / n, ranks=n)
    yield sent, lambda: dist.all_to_all_single(other, whole)
    yield (
        Collective(name="all-gather", bytes=moved, ranks=n, per_node=near),
        lambda: collectives.gather(whole, share, ranks.group),
    )
    yield (
        Collective(name="reduce-scatter", bytes=moved, ranks=n, per_node=near),
        lambda: collectives.reduce_scatter(share, whole, ranks.group),
    )
    yield Collective(name="all-reduce", bytes=moved, ranks=n, per_node=near), lambda: dist.all_reduce(whole)
    if near > 1:
        yield PointToPoint(bytes=moved, tier="nvlink"), lambda: _message(whole, ranks.here, 1)
    if n > near:
        yield PointToPoint(bytes=moved, tier="network"), lambda: _message(whole, ranks.here, near)


def _message(buffer: torch.Tensor, here: int, to: int) -> None:
    """From rank 0; the others have nothing to do."""
    if here == 0:
        dist.send(buffer, to)
    elif here == to:
        dist.recv(buffer, 0)
