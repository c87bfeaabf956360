"""The decode side of a transfer: a request that holds its blocks while their contents are on the way.

A request that another instance has prefilled starts like any other: it waits its turn, gets a slot and all
its blocks, and keeps what the prefix cache has. The rest is pulled column by column:

    for transfer in scheduler.pulls.plan():         # TransferPlan, a value
        copy(transfer)                               # remote blocks of the same columns -> transfer.blocks
        scheduler.pulls.commit(transfer)             # or .fail(transfer)

When all is there, the last known token is computed as a prefill of one, which gives the next token. What did
not arrive is computed instead: a failed transfer costs time, never a token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from benthic.sched.early import EarlyPulls, take_oldest
from benthic.sched.leases import Journal, ignore
from benthic.sched.plans import TransferPlan
from benthic.sched.request import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.plans import BatchingConfig, Totals
    from benthic.sched.request import SequenceState
    from benthic.sched.residency import Residency


AWAIT_S: Final = 0.002
"""How long a plan may wait for transfers that are about to come, while the device has a step to run."""


@dataclass(eq=False)
class Pull:
    """One request's pull: columns up to `next_column` are planned, those from `end` on will not come."""

    seq: SequenceState
    next_column: int
    end: int
    flying: deque[int] = field(default_factory=deque)
    kept: list[int] | None = None


class Pulls:
    """Plans transfers and takes them back; blocks of an aborted request stay until its last one is back.

    A transfer that is still running would otherwise write into blocks that belong to somebody else by then.
    """

    def __init__(
        self,
        config: BatchingConfig,
        residency: Residency,
        totals: Totals,
        arrived: Callable[[SequenceState | None, list[SequenceState]], None],
    ) -> None:
        self.early = EarlyPulls(config, residency, totals, partial(arrived, None))
        self._block_size = config.block_size
        self._most = config.transfer_blocks
        self._residency = residency
        self._totals = totals
        self._arrived = arrived
        self._pulls: dict[str, Pull] = {}
        self._flying: dict[int, tuple[TransferPlan, Pull]] = {}
        self._next_number = 0
        self.journal: Journal = ignore

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pulls

    @property
    def num_in_flight(self) -> int:
        """Transfers planned and not back."""
        return len(self._flying) + self.early.num_in_flight

    @property
    def has_work(self) -> bool:
        """Whether transfers are in flight, or an early pull has more to plan."""
        return bool(self._flying or self.early.num_in_flight or self.early.has_work)

    @property
    def tables(self) -> list[list[int]]:
        """Blocks of early pulls, and those that wait for a transfer of an aborted request.

        For checking that blocks are conserved.
        """
        pulls = {id(pull): pull for _, pull in self._flying.values()}
        return [*self.early.tables, *[pull.kept for pull in pulls.values() if pull.kept is not None]]

    def start(self, seq: SequenceState) -> bool:
        """Begin to pull what `seq`, which has its blocks, does not have; False when it has everything."""
        first = seq.planned // self._block_size
        end = -(-(seq.num_tokens - 1) // self._block_size)
        if first >= end:
            return False
        seq.phase = Phase.PULLING
        self._pulls[seq.request.request_id] = Pull(seq, first, end)
        return True

    def plan(self) -> tuple[TransferPlan, ...]:
        """The transfers to start now: at most `transfer_blocks` blocks, the longest-pulling request first.

        What they leave of that goes to early pulls.
        """
        plans: list[TransferPlan] = []
        left = self._most
        for request_id, pull in self._pulls.items():
            count = min(left, pull.end - pull.next_column)
            if count <= 0:
                continue
            first, left = pull.next_column, left - count
            pull.next_column += count
            blocks = tuple(pull.seq.table[first : pull.next_column])
            last = pull.next_column == pull.end
            plan = TransferPlan(self._next_number, request_id, first, blocks, last)
            self._next_number += 1
            self._flying[plan.number] = (plan, pull)
            pull.flying.append(plan.number)
            plans.append(plan)
        plans += self._plan_early(left)
        if plans:
            self.journal({"transfers": [list(plan) for plan in plans]})
        return tuple(plans)

    def _plan_early(self, left: int) -> list[TransferPlan]:
        plans: list[TransferPlan] = []
        for pull in self.early.running:
            blocks = tuple(pull.reserved[:left])
            if blocks:
                name = pull.seq.request.request_id
                plans.append(TransferPlan(self._next_number, name, pull.next_column, blocks, last=False))
                self._next_number += 1
                left -= len(blocks)
                self.early.depart(pull, plans[-1])
        return plans

    def commit(self, plan: TransferPlan) -> None:
        """Report that a transfer's blocks are filled.

        Raises:
            ServeError: it is not the oldest of its request in flight.
        """
        if self.early.flies(plan.number):
            self.early.land(plan, brought=True)
        else:
            pull = self._land(plan)
            if plan.first < pull.end:
                self._totals.pulled_blocks += len(plan.blocks)
            self._end_if_done(pull)
        self.journal({"pulled": plan.number})

    def fail(self, plan: TransferPlan) -> None:
        """Report that a transfer did not happen: its columns and those behind it are computed instead.

        An early pull ends with that; its request pulls them again.

        Raises:
            ServeError: it is not the oldest of its request in flight.
        """
        if self.early.flies(plan.number):
            self.early.land(plan, brought=False)
        else:
            pull = self._land(plan)
            pull.end = min(pull.end, plan.first)
            self._end_if_done(pull)
        self.journal({"pull_failed": plan.number})

    def leave(self, seq: SequenceState) -> None:
        """Forget a request that ended; its blocks gain a user until its transfers are back."""
        pull = self._pulls.pop(seq.request.request_id, None)
        if pull is None or not pull.flying:
            return
        pull.kept = list(seq.table)
        for block in pull.kept:
            self._residency.pool.share(block)

    def _land(self, plan: TransferPlan) -> Pull:
        _, pull = self._flying.get(plan.number, (plan, None))
        take_oldest(plan, deque() if pull is None else pull.flying)
        assert pull is not None  # noqa: S101 (it had flights)
        del self._flying[plan.number]
        return pull

    def _end_if_done(self, pull: Pull) -> None:
        if pull.flying:
            return
        if pull.kept is not None:
            self._residency.pool.give_back(pull.kept)
            pull.kept = None
        elif pull.next_column >= pull.end:
            seq = pull.seq
            del self._pulls[seq.request.request_id]
            seq.planned = max(seq.planned, min(pull.end * self._block_size, seq.num_tokens - 1))
            self._arrived(seq, self._residency.settle(seq, seq.planned))
