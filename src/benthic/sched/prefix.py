"""Which blocks of a sequence are known already, and which are being computed right now by another.

A block becomes visible when the plan that filled it is committed. A request whose next block is being
computed by a request ahead of it is parked until that block is committed: sixteen equal prompts arriving
together cost one.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from benthic.sched.blocks import ROOT, BlockPool, block_key

if TYPE_CHECKING:
    from benthic.sched.host_tier import HostTier
    from benthic.sched.request import SequenceState


class PrefixIndex:
    """Keys, matches and parking for the sequences of one scheduler.

    Args:
        pool: where the blocks are.
        host: where evicted ones may be.
        block_size: tokens in a block.
        enabled: False makes every answer "nothing is cached".
        counted: keys come from `Request.block_keys` instead of token ids.
    """

    __slots__ = ("_block_size", "_computing", "_counted", "_enabled", "_host", "_parked", "_pool")

    def __init__(
        self, pool: BlockPool, host: HostTier, *, block_size: int, enabled: bool, counted: bool
    ) -> None:
        self._pool = pool
        self._host = host
        self._block_size = block_size
        self._enabled = enabled
        self._counted = counted
        self._computing: dict[bytes, SequenceState] = {}
        self._parked: dict[bytes, list[SequenceState]] = {}

    def add_keys(self, seq: SequenceState, num_tokens: int) -> None:
        """Extend `seq.keys` to the full blocks among its first `num_tokens` tokens (one hash per block)."""
        if not self._enabled:
            return
        keys, size, request = seq.keys, self._block_size, seq.request
        parent = keys[-1] if keys else _root(request.salt)
        if self._counted:
            while len(keys) < len(request.block_keys):
                parent = block_key(parent, repr(request.block_keys[len(keys)]).encode())
                keys.append(parent)
            return
        while (len(keys) + 1) * size <= num_tokens:
            start = len(keys) * size
            parent = block_key(parent, array("q", seq.tokens[start : start + size]).tobytes())
            keys.append(parent)

    def match(self, seq: SequenceState) -> list[int | None]:
        """The cached blocks that `seq` starts with; its last known token is never among them.

        None stands for a block that only the host holds.
        """
        if not seq.request.reuse_prefix:
            return []
        blocks: list[int | None] = []
        for key in seq.keys[: self._reusable(seq)]:
            block = self._pool.find(key)
            if block is None and key not in self._host:
                break
            blocks.append(block)
        return blocks

    def next_computing(self, seq: SequenceState, matched: int) -> bytes | None:
        """The key after `matched` blocks if a sequence ahead of `seq` is computing it now."""
        if not seq.request.reuse_prefix or matched >= self._reusable(seq):
            return None
        leader = self._computing.get(seq.keys[matched])
        if leader is None or leader.rank >= seq.rank:
            return None
        return seq.keys[matched]

    def park(self, seq: SequenceState, key: bytes) -> None:
        """Keep `seq` out of the queue until the block of `key` is committed or no longer being computed."""
        self._parked.setdefault(key, []).append(seq)

    def cached(self, key: bytes) -> bool:
        """Whether the block of `key` is in the cache or on the host."""
        return self._pool.find(key) is not None or key in self._host

    def has(self, key: bytes) -> bool:
        """Whether the block of `key` is cached or being computed."""
        return key in self._computing or self.cached(key)

    def begin(self, seq: SequenceState, matched: int, end: int | None = None) -> None:
        """Note that `seq` computes its full blocks from `matched` on, up to `end`."""
        for key in seq.keys[matched:end]:
            self._computing.setdefault(key, seq)

    def commit(self, seq: SequenceState, num_computed: int) -> list[SequenceState]:
        """Make the full blocks among the first `num_computed` tokens visible; returns whom this unparks."""
        full = min(num_computed // self._block_size, len(seq.keys))
        woken: list[SequenceState] = []
        for index in range(seq.num_registered, full):
            key = seq.keys[index]
            self._pool.remember(seq.table[index], key)
            woken += self._settle(seq, key)
        seq.num_registered = max(seq.num_registered, full)
        return woken

    def end(self, seq: SequenceState, first: int | None = None) -> list[SequenceState]:
        """Note that `seq` computes no block any more, from `first` on; returns whom this unparks."""
        woken: list[SequenceState] = []
        for key in seq.keys[seq.num_registered if first is None else first :]:
            woken += self._settle(seq, key)
        return woken

    def next_full(self, seq: SequenceState) -> int:
        """Computed tokens at which the next block of `seq` can be committed; huge when none ever can."""
        if not self._enabled or (self._counted and seq.num_registered >= len(seq.keys)):
            return 1 << 62
        return (seq.num_registered + 1) * self._block_size

    def _reusable(self, seq: SequenceState) -> int:
        return min(len(seq.keys), (seq.num_tokens - 1) // self._block_size)

    def _settle(self, seq: SequenceState, key: bytes) -> list[SequenceState]:
        if self._computing.get(key) is not seq:
            return []
        del self._computing[key]
        return self._parked.pop(key, [])


def _root(salt: str) -> bytes:
    return block_key(ROOT, salt.encode()) if salt else ROOT
