"""Which evicted blocks the host's memory keeps, and what moves between it and the device.

A keyed block that is evicted from the device goes to a block of host memory, the one not moved for longest;
when its key is looked up again, it comes back to a free block of the device instead of being computed. What
came back is kept on the host too, so that evicting it anew moves nothing.

The copies are part of a plan. All of `to_host` are made before any of `from_host`, and both before the plan
writes anything, so a device block may leave and be filled again in one plan, and a block that leaves may come
back in it. What must not happen is that a host block is overwritten before it is read: while a plan is being
made, blocks that it brings back are not given to others.
"""

from __future__ import annotations

from collections import OrderedDict

from benthic.sched.plans import BlockCopy


class HostTier:
    """Keys of `num_blocks` blocks of host memory, and the copies of the plan being made.

    Every operation costs O(1), but `keep` O(blocks brought back by this plan) when these are all there are.
    """

    __slots__ = ("_blank", "_from_host", "_held", "_reading", "_to_host", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._held: OrderedDict[bytes, int] = OrderedDict()
        self._reading: set[int] = set()
        self._to_host: dict[int, int] = {}
        self._from_host: list[BlockCopy] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    @property
    def num_held(self) -> int:
        """Blocks that hold something."""
        return len(self._held)

    @property
    def to_host(self) -> tuple[BlockCopy, ...]:
        """This plan's copies out, each host block once."""
        return tuple([BlockCopy(block, host) for host, block in self._to_host.items()])

    @property
    def from_host(self) -> tuple[BlockCopy, ...]:
        """This plan's copies in, each device block once."""
        return tuple(self._from_host)

    def begin_plan(self) -> None:
        """A new plan: nothing moves yet."""
        self._reading.clear()
        self._to_host = {}
        self._from_host = []

    def keep(self, key: bytes, block: int) -> None:
        """Device block `block`, which holds the tokens of `key`, is evicted: copy it out if there is room.

        There is none only while this plan brings back every block that the host has.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return
        host = self._blank.pop() if self._blank else self._oldest()
        if host is not None:
            self._held[key] = host
            self._to_host[host] = block

    def reserve(self, keys: list[bytes]) -> None:
        """Keep the blocks of `keys`, all of them held, until this plan is made: it brings them back."""
        for key in keys:
            self._held.move_to_end(key)
            self._reading.add(self._held[key])

    def bring_back(self, key: bytes, block: int) -> None:
        """Fill device block `block` with what is held for `key`, which is reserved."""
        self._from_host.append(BlockCopy(block, self._held[key]))

    def clear(self) -> int:
        """Forget everything (its contents became invalid); returns how many blocks that were."""
        cleared = len(self._held)
        self._blank.extend(self._held.values())
        self._held.clear()
        return cleared

    def _oldest(self) -> int | None:
        """Take the block not moved for longest from its key; None when this plan reads all of them."""
        for key, host in self._held.items():
            if host not in self._reading:
                del self._held[key]
                return host
        return None
