"""Pulls ahead of their requests: what is computed of a prompt moves while the rest is still being computed.

An early pull fills free blocks with full columns and leaves them in the prefix cache, where its request finds
them once the first token is there. It has no slot and nobody waits for its end, and between two transfers it
holds no block: under pressure what it brought is evicted, and pulled again. So it can only save time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benthic.errors import AdmissionError, ServeError
from benthic.sched.leases import Journal, ignore
from benthic.sched.request import Request, SequenceState

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.plans import BatchingConfig, Totals, TransferPlan
    from benthic.sched.residency import Residency

SKIPPED = -1
"""In a table: a column that was cached here and is not pulled."""


@dataclass(eq=False)
class EarlyPull:
    """One prompt's columns: `ready` of them may be read, those before `next_column` are planned.

    The table of `seq` goes as far as blocks were reserved; the first `seq.num_registered` are done with. When
    it is `over`, nothing more is planned, and after it `failed`, nothing counts that comes.
    """

    seq: SequenceState
    ready: int
    next_column: int = 0
    flying: deque[int] = field(default_factory=deque)
    over: bool = False
    failed: bool = False

    @property
    def reserved(self) -> list[int]:
        """Blocks that no transfer is planned for yet."""
        return self.seq.table[self.next_column :]

    @property
    def holdings(self) -> list[int]:
        """Blocks that it uses."""
        return self.seq.table[self.seq.num_registered :]


class EarlyPulls:
    """Those of one instance. At most `transfer_blocks` blocks are used by all of them at a time.

    Args:
        config: without prefix caching nothing is pulled early.
        residency: whose free blocks beyond the watermark are filled.
        totals: `early_blocks` counts what came.
        wake: takes sequences that waited for a column and are to look again.
    """

    def __init__(
        self,
        config: BatchingConfig,
        residency: Residency,
        totals: Totals,
        wake: Callable[[list[SequenceState]], None],
    ) -> None:
        self._config = config
        self._residency = residency
        self._totals = totals
        self._wake = wake
        self._pulls: dict[str, EarlyPull] = {}
        self._flying: dict[int, EarlyPull] = {}
        self._news = False
        self.journal: Journal = ignore

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._pulls

    @property
    def running(self) -> list[EarlyPull]:
        """Those that have not ended, in order of arrival."""
        return list(self._pulls.values())

    @property
    def has_work(self) -> bool:
        """Whether a plan may reserve blocks, or blocks wait for a transfer."""
        return self._news or any(pull.reserved for pull in self._pulls.values())

    @property
    def num_in_flight(self) -> int:
        """Transfers planned and not back."""
        return len(self._flying)

    @property
    def tables(self) -> list[list[int]]:
        """Blocks in use (for checking that blocks are conserved)."""
        return [pull.holdings for pull in self._pulls.values()]

    def begin(self, request: Request, num_tokens: int, now: float) -> None:
        """Pull what is ready of a prompt that another instance computes, `num_tokens` so far.

        Raises:
            AdmissionError: one of that name has begun.
        """
        if request.request_id in self._pulls:
            msg = f"the early pull {request.request_id!r} has begun. Give every one its own id."
            raise AdmissionError(msg)
        if not self._config.enable_prefix_caching:
            return
        self.journal({"early": request.changed(), "num_tokens": num_tokens, "now": now})
        rank = (now + request.priority * self._config.priority_seconds, -1)
        seq = SequenceState(request, limit=0, rank=rank, stops=frozenset(), arrived=now)
        self._residency.prefix.add_keys(seq, seq.num_tokens)
        self._pulls[request.request_id] = EarlyPull(seq, 0)
        self._grow(self._pulls[request.request_id], num_tokens)

    def grow(self, request_id: str, num_tokens: int) -> None:
        """More of the prompt is ready; an unknown name (of a pull that failed) is ignored."""
        pull = self._pulls.get(request_id)
        if pull is not None and not pull.over:
            self.journal({"grown": request_id, "num_tokens": num_tokens})
            self._grow(pull, num_tokens)

    def drop(self, request_id: str) -> None:
        """Plan nothing more for it; what is on its way still counts. An unknown name is ignored."""
        pull = self._pulls.get(request_id)
        if pull is not None and not pull.over:
            self.journal({"dropped": request_id})
            self._end(pull, pull.next_column)

    def reserve(self) -> None:
        """Take blocks for columns that are ready; part of a plan, whose copies to the host go first."""
        self._news = False
        if not self._pulls:
            return
        pool, prefix = self._residency.pool, self._residency.prefix
        room = self._config.transfer_blocks - sum([len(table) for table in self.tables])
        for pull in self._pulls.values():
            if pull.over:
                continue
            seq = pull.seq
            self._skip(pull)
            first = len(seq.table)
            while min(room, self._residency.spare, pull.ready - len(seq.table)) > 0:
                if prefix.has(seq.keys[len(seq.table)]):
                    break
                seq.table.append(pool.take())
                room -= 1
            prefix.begin(seq, first, len(seq.table))

    def depart(self, pull: EarlyPull, plan: TransferPlan) -> None:
        """Note that a transfer fills the next blocks that are reserved."""
        pull.next_column += len(plan.blocks)
        pull.flying.append(plan.number)
        self._flying[plan.number] = pull

    def flies(self, number: int) -> bool:
        """Whether transfer `number` is one of these and in flight."""
        return number in self._flying

    def land(self, plan: TransferPlan, *, brought: bool) -> None:
        """A transfer is back. After one that failed its pull ends, and nothing else of it counts.

        Raises:
            ServeError: it is not the oldest of its pull in flight.
        """
        pull = self._flying[plan.number]
        take_oldest(plan, pull.flying)
        del self._flying[plan.number]
        end = plan.first + len(plan.blocks)
        if brought and not pull.failed:
            self._totals.early_blocks += len(plan.blocks)
            self._totals.pulled_blocks += len(plan.blocks)
            self._wake(self._residency.prefix.commit(pull.seq, end * self._config.block_size))
        elif not pull.failed:
            pull.failed = True
            self._end(pull, pull.seq.num_registered)
        pull.seq.num_registered = end
        self._residency.pool.give_back(list(plan.blocks))
        self._forget_if_done(pull)
        self._news = bool(self._pulls)

    def _grow(self, pull: EarlyPull, num_tokens: int) -> None:
        pull.ready = min(num_tokens // self._config.block_size, len(pull.seq.keys))
        self._news = True

    def _skip(self, pull: EarlyPull) -> None:
        """Pass over columns that are cached here, as far as they follow what is done with."""
        seq = pull.seq
        while seq.num_registered == len(seq.table) < pull.ready:
            if not self._residency.prefix.cached(seq.keys[seq.num_registered]):
                return
            seq.table.append(SKIPPED)
            seq.num_registered += 1
            pull.next_column += 1

    def _end(self, pull: EarlyPull, first: int) -> None:
        """Plan nothing more; nobody waits any longer for columns from `first` on."""
        pull.over = True
        self._residency.pool.give_back(pull.reserved)
        del pull.seq.table[pull.next_column :]
        self._wake(self._residency.prefix.end(pull.seq, first))
        self._forget_if_done(pull)

    def _forget_if_done(self, pull: EarlyPull) -> None:
        if pull.over and not pull.flying:
            self._pulls.pop(pull.seq.request.request_id, None)


def take_oldest(plan: TransferPlan, flying: deque[int]) -> None:
    """Take a transfer that came back from those in flight of its pull. Raises: ServeError."""
    if not flying or flying[0] != plan.number:
        oldest = f"transfer {flying[0]}" if flying else "none"
        msg = (
            f"transfer {plan.number} of {plan.request_id!r} came back, but the oldest of it in flight "
            f"is {oldest}. Report each once and in order."
        )
        raise ServeError(msg)
    flying.popleft()
