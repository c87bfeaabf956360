"""The process groups of a layout, seen from one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import timedelta

    from benthic.spec.layout import Layout, Place


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. A group of one has no process group and never communicates."""

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """Who this rank talks to, and about what.

    world: every rank. pipeline: ranks with the same place in the other pipeline ranks, in order.
    dense: ranks of this pipeline rank, which hold the same dense parameters. sharded: those of them with the
    same tensor shard. expert: ranks that together hold one copy of all experts. expert_dp: ranks that hold
    the same experts. tensor, context: ranks along one axis. tokens: ranks that share the tokens of the same
    rows. data: ranks with other rows.
    """

    layout: Layout
    rank: int
    world: Group
    pipeline: Group
    dense: Group
    sharded: Group
    expert: Group
    expert_dp: Group
    tensor: Group
    context: Group
    tokens: Group
    data: Group
    _partners: dict[tuple[int, ...], Group] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """Where this rank is."""
        return self.layout.place(self.rank)

    @classmethod
    def of(cls, layout: Layout, rank: int, *, timeout: timedelta | None = None) -> Mesh:
        """Make the groups; every rank must call it. With one rank nothing needs to be initialised."""
        everyone = [layout.place(rank) for rank in range(layout.ranks)]

        def group(key: Callable[[Place], object]) -> Group:
            return _mine(rank, _classes(key(place) for place in everyone), timeout)

        return cls(
            layout=layout,
            rank=rank,
            world=group(lambda _: 0),
            pipeline=group(lambda p: (p.dp, p.cp, p.tp)),
            dense=group(lambda p: p.pp),
            sharded=group(lambda p: (p.pp, p.tp)),
            expert=group(lambda p: _fold(layout, p)),
            expert_dp=group(lambda p: (p.pp, p.ep)),
            tensor=group(lambda p: (p.pp, p.dp, p.cp)),
            context=group(lambda p: (p.pp, p.dp, p.tp)),
            tokens=group(lambda p: (p.pp, p.dp)),
            data=group(lambda p: (p.pp, p.cp, p.tp)),
        )

    def connect(self, device: torch.device) -> None:
        """Add up one number in every group that collectives are of; every rank must call it.

        A library takes memory for its connections when a group first communicates: now, before tensors have
        filled a GPU. The pipeline's ranks send to each other and experts have an exchange of their own.
        """
        of_collectives = (self.dense, self.sharded, self.expert_dp, self.tensor, self.context)
        for group in (self.world, *of_collectives, self.tokens, self.data):
            if group.handle is not None:
                dist.all_reduce(torch.ones(1, device=device), group=group.handle)

    def partners(self, holders: Sequence[int], *, timeout: timedelta | None = None) -> Group:
        """The ranks with this rank's place in the pipeline ranks `holders`; every rank must call it."""
        key = tuple(sorted(holders))
        if key not in self._partners:
            layout = self.layout
            inner = range(layout.ranks_per_stage)
            lists = [tuple(layout.rank_at(pp, i) for pp in key) for i in inner]
            self._partners[key] = _mine(self.rank, lists, timeout)
        return self._partners[key]


def _fold(layout: Layout, place: Place) -> object:
    """Ranks of one copy of the experts are neighbours inside the pipeline rank."""
    inner = (place.dp * layout.cp_degree + place.cp) * layout.tp_degree + place.tp
    return place.pp, inner // layout.ep_degree


def _classes(keys: Iterable[object]) -> list[tuple[int, ...]]:
    """Ranks with equal keys, together."""
    found: dict[object, list[int]] = {}
    for rank, key in enumerate(keys):
        found.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _mine(rank: int, lists: Sequence[tuple[int, ...]], timeout: timedelta | None) -> Group:
    """Make every group of the lists, as torch demands of every rank, and return this rank's own."""
    own = Group((rank,), 0, None)
    for ranks in lists:
        if len(ranks) == 1:
            continue
        handle = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = Group(ranks, ranks.index(rank), handle)
    return own
