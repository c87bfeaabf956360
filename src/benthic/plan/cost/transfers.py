"""Operations that move bytes from GPU to GPU: over NVLink inside a node, over the network between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Tier = Literal["nvlink", "network"]
Alike = tuple[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAll:
    """Every rank sends `nvlink` bytes to ranks of its node and `network` bytes to other nodes, at once.

    For tokens to experts: a token crosses the network once a node and NVLink once a rank.
    """

    nvlink: float
    network: float = 0.0
    ranks: int

    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By the slower link in use."""
        return f"all-to-all {'network' if self.network else 'nvlink'}"

    @property
    def at(self) -> tuple[float, ...]:
        """Bytes over the slower link in use, ranks."""
        return (max(1.0, self.network or self.nvlink), self.ranks)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Nothing else."""
        return ()

    @property
    def traffic(self) -> tuple[float, float]:
        """Bytes that leave a rank over NVLink and over the network."""
        return self.nvlink, self.network

    @property
    def hops(self) -> int:
        """Messages that follow each other."""
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PointToPoint:
    """One rank sends `bytes` to another."""

    bytes: float
    tier: Tier = "network"

    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By link."""
        return f"send {self.tier}"

    @property
    def at(self) -> tuple[float, ...]:
        """Bytes."""
        return (max(1.0, self.bytes),)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Nothing else."""
        return ()

    @property
    def traffic(self) -> tuple[float, float]:
        """Bytes that leave a rank over NVLink and over the network."""
        return (self.bytes, 0.0) if self.tier == "nvlink" else (0.0, self.bytes)

    @property
    def hops(self) -> int:
        """Messages that follow each other."""
        return 1


CollectiveName = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """A collective over `ranks` ranks, `per_node` of which share a node; `bytes` is the whole buffer.

    Rings inside each node and one ring of nodes for each of its GPUs: over NVLink a rank sends
    `bytes (p - 1)/p`, over the network `bytes/p (q - 1)/q`, p ranks a node and q nodes. An all-reduce is a
    reduce-scatter and an all-gather.
    """

    name: CollectiveName
    bytes: float
    ranks: int
    per_node: int

    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By name and slowest link."""
        return f"{self.name} {'network' if self.ranks > self.per_node else 'nvlink'}"

    @property
    def at(self) -> tuple[float, ...]:
        """Bytes, ranks."""
        return (max(1.0, self.bytes), self.ranks)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Nothing else."""
        return ()

    @property
    def traffic(self) -> tuple[float, float]:
        """Bytes that leave a rank over NVLink and over the network."""
        inside = min(self.per_node, self.ranks)
        nodes = max(1.0, self.ranks / inside)
        times = 2 if self.name == "all-reduce" else 1
        nvlink = times * self.bytes * (inside - 1) / inside
        return nvlink, times * self.bytes / inside * (nodes - 1) / nodes

    @property
    def hops(self) -> int:
        """Messages that follow each other."""
        inside = min(self.per_node, self.ranks)
        steps = inside - 1 + max(0, round(self.ranks / inside) - 1)
        return steps * (2 if self.name == "all-reduce" else 1)
