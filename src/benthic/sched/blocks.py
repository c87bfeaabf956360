"""Blocks of the paged cache: who uses which, and which free ones still hold something worth finding again.

A block is in exactly one of three states: used (its count of users is above zero), free and blank, or free
and keyed (it still holds the tokens of its key, and may be acquired again or evicted). Allocation takes blank
blocks first and then evicts the least recently used keyed one.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = b""
"""The parent of a first block."""


def block_key(parent: bytes, payload: bytes) -> bytes:
    """Name a full block by everything up to its end: `blake2b(parent || payload)`, 16 bytes.

    `payload` encodes the block's tokens (or a caller's own key). A cryptographic hash, because two prompts
    that shared a key would read each other's cache.
    """
    return blake2b(parent + payload, digest_size=16).digest()


class BlockPool:
    """Counts users of `num_blocks` blocks and finds full blocks by key.

    Every operation costs O(1) per block.

    Args:
        num_blocks: how many there are.
        evicted: told the key and the block of every eviction, while the block still holds its tokens.
    """

    __slots__ = ("_blank", "_block_of", "_evictable", "_evicted", "_key_of", "_users", "num_blocks")

    def __init__(self, num_blocks: int, evicted: Callable[[bytes, int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self._evicted = evicted
        self._users = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks without users: blank ones and those that are only kept for their key."""
        return len(self._blank) + len(self._evictable)

    def users(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._users[block]

    def find(self, key: bytes) -> int | None:
        """The block that holds the tokens of `key`, if any does."""
        return self._block_of.get(key)

    def take(self) -> int:
        """Hand out one free block to one user; the caller has checked `num_free`."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            key = self._forget(block)
            if self._evicted is not None:
                self._evicted(key, block)
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a user to a block that `find` returned."""
        if self._users[block] == 0:
            del self._evictable[block]
        self._users[block] += 1

    def give_back(self, table: list[int]) -> None:
        """Remove one user from each block; the end of the table is evicted before its beginning."""
        for block in reversed(table):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._key_of[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None

    def remember(self, block: int, key: bytes) -> None:
        """Let `find(key)` return this full, used block, unless another block holds the same tokens."""
        if key not in self._block_of and self._key_of[block] is None:
            self._block_of[key] = block
            self._key_of[block] = key

    def clear(self) -> int:
        """Forget every free keyed block (its contents became invalid); returns how many there were."""
        cleared = len(self._evictable)
        for block in self._evictable:
            self._forget(block)
            self._blank.append(block)
        self._evictable.clear()
        return cleared

    def _forget(self, block: int) -> bytes:
        key, self._key_of[block] = self._key_of[block], None
        assert key is not None  # noqa: S101 (only keyed blocks are evictable)
        del self._block_of[key]
        return key
