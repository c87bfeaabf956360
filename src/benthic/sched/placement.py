"""Which GPU holds which expert: busy experts get replicas, and replicas are packed so that GPUs are even.

The algorithm is DeepSeek's expert-parallel load balancer (DeepSeek-V3 report section 3.4; its EPLB release).
Hierarchical: groups of experts are packed onto nodes, so that a token limited to few groups visits few nodes;
each node replicates its own busiest experts and packs replicas onto its GPUs. Global: the same with one
group on one node. Prefill uses the first, decode at wide expert parallelism the second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What experts are placed on.

    Attributes:
        replicas: physical experts on all GPUs together, at least one for each expert.
        groups: groups of consecutive experts of the gate (`n_group`).
        nodes: hosts whose GPUs are joined by fast links.
        gpus: of all nodes.
    """

    replicas: int
    groups: int = 1
    nodes: int = 1
    gpus: int


@dataclass(frozen=True)
class Placement:
    """The experts of one layer on GPUs.

    Attributes:
        expert_of: the expert in each physical slot; a GPU's slots are consecutive.
        gpus: how many GPUs share the slots evenly.
    """

    expert_of: tuple[int, ...]
    gpus: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Replicas of each expert."""
        found = Counter(self.expert_of)
        return tuple(found[expert] for expert in range(max(found) + 1))

    def slots_of(self, expert: int) -> tuple[int, ...]:
        """The physical slots that hold an expert."""
        return tuple(slot for slot, held in enumerate(self.expert_of) if held == expert)

    def gpu_loads(self, load: Sequence[float]) -> list[float]:
        """The load of each GPU when an expert's tokens are spread evenly over its replicas."""
        counts, each = self.counts, len(self.expert_of) // self.gpus
        shares = [load[expert] / counts[expert] for expert in self.expert_of]
        return [sum(shares[start : start + each]) for start in range(0, len(shares), each)]

    def imbalance(self, load: Sequence[float]) -> float:
        """Load of the busiest GPU relative to the mean: all wait for it. 1 is perfect, also without load."""
        loads = self.gpu_loads(load)
        total = sum(loads)
        return max(loads) * len(loads) / total if total else 1.0


def in_order(experts: int, gpus: int) -> Placement:
    """Every expert once, in order: what there is before balancing."""
    return Placement(tuple(range(experts)), gpus)


def place(load: Sequence[float], cluster: Cluster) -> Placement:
    """Replicate and place the experts of one layer for an expected load.

    Hierarchical when the groups divide over the nodes, else global. Deterministic: equal loads keep their
    order.

    Args:
        load: tokens (or any measure of work) of each expert.
        cluster: what to place them on.

    Raises:
        ConfigError: experts, replicas, groups, nodes or GPUs do not divide, or experts outnumber replicas.
    """
    _check(len(load), cluster)
    if cluster.groups % cluster.nodes:
        groups, nodes = 1, 1
    else:
        groups, nodes = cluster.groups, cluster.nodes
    slots: list[int] = []
    for experts in _experts_of_nodes(load, groups, nodes):
        replicas = replicate([load[expert] for expert in experts], cluster.replicas // nodes)
        counts = Counter(replicas)
        shares = [load[experts[local]] / counts[local] for local in replicas]
        for packed in pack(shares, cluster.gpus // nodes):
            slots += [experts[replicas[index]] for index in packed]
    return Placement(tuple(slots), cluster.gpus)


def replicate(load: Sequence[float], replicas: int) -> list[int]:
    """The expert of each replica: one each, then again and again the one whose replicas carry most."""
    counts = [1] * len(load)
    found = list(range(len(load)))
    for _ in range(replicas - len(load)):
        busiest = max(range(len(load)), key=lambda expert: load[expert] / counts[expert])
        found.append(busiest)
        counts[busiest] += 1
    return found


def pack(load: Sequence[float], packs: int) -> list[list[int]]:
    """Items by pack, equally many in each: heaviest first, each to the lightest pack that has room."""
    room = len(load) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    weights = [0.0] * packs
    for item in sorted(range(len(load)), key=lambda item: -load[item]):
        lightest = min((p for p in range(packs) if len(found[p]) < room), key=weights.__getitem__)
        found[lightest].append(item)
        weights[lightest] += load[item]
    return found


def _experts_of_nodes(load: Sequence[float], groups: int, nodes: int) -> list[list[int]]:
    """The experts of each node: whole groups, packed by their load."""
    size = len(load) // groups
    of_group = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    packed = pack([sum(load[expert] for expert in experts) for experts in of_group], nodes)
    return [[expert for group in node for expert in of_group[group]] for node in packed]


def _check(experts: int, cluster: Cluster) -> None:
    for what, count, by, over in (
        ("experts", experts, "groups", cluster.groups),
        ("GPUs", cluster.gpus, "nodes", cluster.nodes),
        ("replicas", cluster.replicas, "GPUs", cluster.gpus),
    ):
        if over < 1 or count % over:
            msg = f"{count} {what} do not divide evenly by {over} {by}; choose a multiple"
            raise ConfigError(msg)
    if cluster.replicas < experts:
        msg = f"{experts} experts need at least as many replicas, but replicas={cluster.replicas}"
        raise ConfigError(msg)
