"""The instances behind a router: who is up, what is assigned to whom, who comes and who goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from benthic.errors import EngineDeadError, ServeError
from benthic.sched.routing import InstanceState, PrefixMap, Role
from benthic.serve.messages import Ready, Stats
from benthic.serve.restarts import Restarts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.serve.client import EngineClient

logger = logging.getLogger("benthic.serve.router")

DRAIN_LOOK_S: Final = 0.02
"""Seconds between two looks at whether an instance has nothing left."""


class Load(NamedTuple):
    """What one request asks of one instance."""

    queued_tokens: int
    blocks: int


@dataclass(eq=False)
class Member:
    """One instance: its process, and what is assigned to it. `turning` is the role it is about to have.

    `heir`: it replaces another one, so there was a time when one could run here.
    """

    name: str
    role: Role
    client: EngineClient
    heir: bool = False
    ready: Ready | None = None
    draining: bool = False
    turning: Role | None = None
    loads: dict[str, Load] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether it takes new requests."""
        resting = self.draining or self.turning is not None
        return self.ready is not None and not resting and self.client.trouble is None

    def state(self, ready: Ready) -> InstanceState:
        """What the policy sees of it."""
        return InstanceState(
            name=self.name,
            role=self.role,
            open=self.open,
            num_requests=len(self.loads),
            queued_tokens=sum([load.queued_tokens for load in self.loads.values()]),
            used_blocks=sum([load.blocks for load in self.loads.values()]),
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
        )

    def computed(self, name: str) -> None:
        """The prompt of request `name` is computed; its blocks stay assigned."""
        self.loads[name] = self.loads[name]._replace(queued_tokens=0)


class Members:
    """Starts instances, admits them when they are up, and replaces those that die.

    Args:
        connect: starts the process of an instance, by its name and its index (from 0, never reused).
        restarts: how many instances that died are replaced in an hour.
        together: none can serve without the others; when one dies, the others end by themselves.
        gone: called with the name of an instance whose process has ended.
    """

    def __init__(
        self,
        connect: Callable[[str, int], EngineClient],
        *,
        restarts: int,
        together: bool = False,
        gone: Callable[[str], None] | None = None,
    ) -> None:
        self.together = together
        self.changed = asyncio.Event()
        self.places: PrefixMap | None = None
        self._connect = connect
        self._call_gone = gone
        self._restarts = Restarts(restarts)
        self._members: dict[str, Member] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._num_joined = 0
        self._gone = _sum(())
        self._last_words = "none was started"
        self._first_words: str | None = None
        self._closing = False

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Member:
        """The instance of that name.

        Raises:
            ServeError: there is none; names those that there are.
        """
        if name not in self._members:
            msg = f"there is no instance {name!r}. There are: {', '.join(self._members) or 'none'}."
            raise ServeError(msg)
        return self._members[name]

    @property
    def trouble(self) -> str | None:
        """Why no instance can be relied on; None while one can."""
        if any(member.open for member in self):
            return None
        if self._first_words is not None:
            return f"the instances share experts and cannot go on without {self._first_words}"
        if self._members:
            words = [f"{member.name}: {member.client.trouble or 'draining'}" for member in self]
            return f"no instance takes requests ({'; '.join(words)})"
        return f"no instance is left; the last one ended so: {self._last_words}"

    @property
    def stats(self) -> Stats | None:
        """The instances' reports, added up; None before the first. Totals of those that left are kept."""
        known = [member.client.stats for member in self if member.client.stats is not None]
        return _sum([self._gone, *known]) if known else None

    def states(self) -> list[InstanceState]:
        """What the policy sees of the instances that are up."""
        return [member.state(member.ready) for member in self if member.ready is not None]

    async def wait_ready(self) -> Ready:
        """Wait until every instance is up. Raises: EngineDeadError with the words of one that is not."""
        members = list(self)
        found = await asyncio.gather(*(member.client.wait_ready() for member in members))
        for member, ready in zip(members, found, strict=True):
            self._admit(member, ready)
        return found[0]

    def join(self, role: Role, *, heir: bool = False) -> str:
        """Start one more instance, which gets requests as soon as it is up; returns its name."""
        index = self._num_joined
        self._num_joined += 1
        name = f"{role}-{index}"
        member = self._members[name] = Member(name, role, self._connect(name, index), heir)
        watcher = asyncio.create_task(self._watch(member))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return name

    async def drain(self, name: str) -> None:
        """Give an instance nothing new, wait until what it has is done, and end it. Raises: ServeError."""
        member = self[name]
        member.draining = True
        self.changed.set()
        while member.loads and member.client.trouble is None:
            await asyncio.sleep(DRAIN_LOOK_S)
        await member.client.close()

    async def turn(self, name: str, role: Role) -> bool:
        """Give an instance nothing new, wait until what it has is done, then give it what is `role`'s.

        Its process goes on: the weights stay, and so does its name.

        Returns: whether it changed; not when it ended meanwhile, or is the last one left of its role.
        Raises: ServeError.
        """
        member = self[name]
        member.turning = role
        try:
            while member.loads and member.client.trouble is None:
                await asyncio.sleep(DRAIN_LOOK_S)
            others = [other for other in self if other is not member and other.role == member.role]
            turned = bool(others) and member in self and member.client.trouble is None
            if turned:
                member.role = role
            return turned
        finally:
            member.turning = None
            self.changed.set()

    async def leave(self, name: str) -> None:
        """End an instance now; its requests move to others. Raises: ServeError."""
        member = self[name]
        member.draining = True
        await member.client.close()

    async def close(self) -> None:
        """End every instance; requests in flight fail. Once."""
        self._closing = True
        await asyncio.gather(*(member.client.close() for member in self))
        await asyncio.gather(*self._watchers)  # they end with their instances

    async def _watch(self, member: Member) -> None:
        """Admit an instance when it is up; when it is gone, forget it and perhaps start another."""
        with contextlib.suppress(EngineDeadError):  # `wait_dead` says why
            self._admit(member, await member.client.wait_ready())
        self._last_words = await member.client.wait_dead()
        stats = member.client.stats
        if stats is not None:
            self._gone = _sum([self._gone, _totals(stats)])
        del self._members[member.name]
        if self._call_gone is not None:
            self._call_gone(member.name)
        if self.places is not None:
            self.places.forget(member.name)
        if not member.draining and not self._closing:
            logger.error("%s: %s", member.name, self._last_words)
            if self.together:
                self._give_up(f"{member.name}: {self._last_words}")
            else:
                self._replace(member)
        self.changed.set()
        await member.client.close()

    def _admit(self, member: Member, ready: Ready) -> None:
        if member.ready is not None:
            return
        member.ready = ready
        if self.places is None:
            self.places = PrefixMap(block_size=ready.block_size)
        logger.info("%s is up (%d blocks of %d)", member.name, ready.num_blocks, ready.block_size)
        self.changed.set()

    def _give_up(self, words: str) -> None:
        """The first one has ended: the others get nothing new while they end."""
        self._first_words = words
        for member in self:
            member.draining = True

    def _replace(self, member: Member) -> None:
        if member.ready is None and not member.heir:
            logger.error("%s never came up and is not replaced", member.name)
        elif not self._restarts.take():
            logger.error("%s is not replaced: %d were within an hour", member.name, self._restarts.most)
        else:
            another = self.join(member.turning or member.role, heir=True)
            logger.info("%s is replaced by %s", member.name, another)


def _sum(reports: Sequence[Stats]) -> Stats:
    numbers = [name for name in Stats.__struct_fields__ if name != "accepted_at"]
    places = zip_longest(*(report.accepted_at for report in reports), fillvalue=0)
    return Stats(
        **{name: sum([getattr(report, name) for report in reports]) for name in numbers},
        accepted_at=tuple(map(sum, places)),
    )


def _totals(stats: Stats) -> Stats:
    """What stays of an instance that left: its totals, not its gauges."""
    gauges = (
        "num_running",
        "num_waiting",
        "num_blocks",
        "num_free_blocks",
        "leased_blocks",
        "host_blocks",
        "host_blocks_held",
    )
    return msgspec.structs.replace(stats, **dict.fromkeys(gauges, 0))
