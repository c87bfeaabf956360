"""Who holds which slot and which blocks: starting, growing, preempting and leaving."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import ceil

from benthic.sched.blocks import BlockPool
from benthic.sched.host_tier import HostTier
from benthic.sched.plans import BatchingConfig, TableWrite
from benthic.sched.prefix import PrefixIndex
from benthic.sched.request import Phase, SequenceState


class Residency:
    """Slots, blocks and the prefix index of one instance; table writes and copies of the plan being made.

    What an ended sequence held is handed on only when every plan that was in flight at its end is committed.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.host = HostTier(config.host_blocks)
        self.pool = BlockPool(config.num_blocks, self.host.keep if config.host_blocks else None)
        self.prefix = PrefixIndex(
            self.pool,
            self.host,
            block_size=config.block_size,
            enabled=config.enable_prefix_caching,
            counted=config.counted,
        )
        self.writes: list[TableWrite] = []
        self.num_running = 0
        self._block_size = config.block_size
        self._watermark = ceil(config.watermark * config.num_blocks)
        self._free_slots = list(range(config.max_num_seqs))
        self._leaving: deque[tuple[int, int, list[int]]] = deque()

    @property
    def has_slot(self) -> bool:
        """Whether another sequence could get a slot now."""
        return bool(self._free_slots)

    @property
    def spare(self) -> int:
        """Free blocks beyond the watermark's."""
        return self.pool.num_free - self._watermark

    def begin_plan(self) -> None:
        """A new plan: nothing is written or moved yet."""
        self.writes = []
        self.host.begin_plan()

    def enter(self, seq: SequenceState, cached: list[int | None]) -> bool:
        """Give `seq` a slot and blocks for its known tokens, `cached` ones first; False if they do not fit.

        Beside running sequences, the watermark's blocks stay free for them to grow into.
        """
        here = [block for block in cached if block is not None]
        num_blocks = -(-seq.num_tokens // self._block_size)
        revived = sum([self.pool.users(block) == 0 for block in here])
        left = self.pool.num_free - revived - (num_blocks - len(here))
        if left < (self._watermark if self.num_running else 0):
            return False
        for block in here:
            self.pool.share(block)
        table = here if len(here) == len(cached) else self._bring_back(seq, cached)
        seq.table = table + [self.pool.take() for _ in range(num_blocks - len(cached))]
        seq.slot = heappop(self._free_slots)
        seq.planned = len(cached) * self._block_size
        seq.num_registered = len(cached)
        self._set_horizon(seq)
        seq.unwritten = True
        self.prefix.begin(seq, len(cached))
        self.num_running += 1
        return True

    def _bring_back(self, seq: SequenceState, cached: list[int | None]) -> list[int]:
        """The cached blocks of `seq`, those that only the host holds in free blocks that this plan fills.

        They can be found at once: whoever shares them reads them in this plan or later. All are reserved on
        the host before the first free block is taken, for that may evict another to the host.
        """
        missing = [key for key, block in zip(seq.keys, cached, strict=False) if block is None]
        self.host.reserve(missing)
        table = []
        for key, block in zip(seq.keys, cached, strict=False):
            if block is None:
                block = self.pool.take()  # noqa: PLW2901 (the block that the host's goes to)
                self.host.bring_back(key, block)
                self.pool.remember(block, key)
            table.append(block)
        return table

    def write(self, seq: SequenceState) -> None:
        """Put the whole table of `seq` into the plan, unless an earlier plan has it."""
        if seq.unwritten:
            self.writes.append(TableWrite(seq.slot, 0, tuple(seq.table)))
            seq.unwritten = False

    def covered(self, seq: SequenceState) -> int:
        """Positions that the blocks of `seq` can hold."""
        return len(seq.table) * self._block_size

    def grow(self, seq: SequenceState) -> None:
        """Append one block to the table of `seq`; the caller has checked that one is free."""
        block = self.pool.take()
        self.writes.append(TableWrite(seq.slot, len(seq.table), (block,)))
        seq.table.append(block)
        self._set_horizon(seq)

    def trim(self, seq: SequenceState) -> None:
        """Give back the blocks behind the known tokens of `seq`: they held drafts that were rejected."""
        known = -(-seq.num_tokens // self._block_size)
        if known < len(seq.table):
            self.pool.give_back(seq.table[known:])
            del seq.table[known:]
            self._set_horizon(seq)

    def evict(self, seq: SequenceState) -> list[SequenceState]:
        """Take slot and blocks away from a running sequence at once; returns whom this unparks.

        Safe beside plans in flight because plans run in order: whoever gets the blocks writes to them later.
        """
        self.writes = [write for write in self.writes if write.slot != seq.slot]
        self.num_running -= 1
        woken = self.prefix.end(seq)
        self._hand_on(seq.slot, seq.table)
        seq.lost = min(seq.planned, seq.num_tokens)
        seq.vacate()
        return woken

    def leave(self, seq: SequenceState, newest_in_flight: int | None) -> list[SequenceState]:
        """Let an ended sequence go, at once or after plan `newest_in_flight`; returns whom this unparks."""
        self.num_running -= 1
        woken = self.prefix.end(seq)
        if newest_in_flight is None:
            self._hand_on(seq.slot, seq.table)
        else:
            self._leaving.append((newest_in_flight, seq.slot, seq.table))
        seq.vacate()
        return woken

    def land(self, number: int) -> None:
        """Plan `number` is committed: hand on what waited for it."""
        while self._leaving and self._leaving[0][0] <= number:
            _, slot, table = self._leaving.popleft()
            self._hand_on(slot, table)

    def settle(self, seq: SequenceState, num_computed: int) -> list[SequenceState]:
        """Make full blocks among the first `num_computed` positions findable; returns whom this unparks.

        Also sets the token count at which committing `seq` needs its next decision.
        """
        woken: list[SequenceState] = []
        if num_computed >= self.prefix.next_full(seq):
            self.prefix.add_keys(seq, num_computed)
            woken = self.prefix.commit(seq, num_computed)
        check = min(seq.limit, self.prefix.next_full(seq) + 1)
        if seq.num_tokens >= seq.min_total:
            seq.stops_now = seq.stops
        else:
            check = min(check, seq.min_total)
        seq.next_check = check
        return woken

    def holdings(self, running: list[SequenceState]) -> list[list[int]]:
        """Tables of running and of leaving sequences (for checking that blocks are conserved)."""
        return [seq.table for seq in running if seq.phase is not Phase.FINISHED] + [
            t for _, _, t in self._leaving
        ]

    def _set_horizon(self, seq: SequenceState) -> None:
        seq.horizon = min(self.covered(seq), seq.limit - 1)

    def _hand_on(self, slot: int, table: list[int]) -> None:
        heappush(self._free_slots, slot)
        self.pool.give_back(table)
