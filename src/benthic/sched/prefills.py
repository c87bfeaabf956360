"""Which prompts a step works on: starting waiting requests and sharing the budget that decodes leave."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from benthic.sched.flights import Chunk
from benthic.sched.plans import BatchingConfig, Prefill, Started, Totals
from benthic.sched.request import Phase, SequenceState
from benthic.sched.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benthic.sched.pulls import Pulls
    from benthic.sched.residency import Residency


class Prefills:
    """The waiting and the prefilling sequences of one scheduler.

    The first half of the budget goes by age: the oldest prompt always moves on. The second goes by length: a
    short prompt is not stuck behind a long one, and the mean time to first token is near that of
    shortest-remaining-first. What one half leaves, the other takes. A request that does not fit closes the
    door for the rest of the plan, so later ones cannot starve it of slots and blocks.
    """

    def __init__(self, config: BatchingConfig, residency: Residency, totals: Totals, pulls: Pulls) -> None:
        self._pulls = pulls
        self._counted = config.counted
        self._mtp_depth = config.mtp_depth
        self._caching = config.enable_prefix_caching
        self._residency = residency
        self._totals = totals
        self._queue = WaitingQueue()
        self._running: list[SequenceState] = []
        self._open = True
        self._blocked = (-1, 0)
        self.started: list[Started] = []

    @property
    def running(self) -> list[SequenceState]:
        """Sequences whose known tokens are not all planned."""
        return self._running

    @property
    def has_work(self) -> bool:
        """Whether a prompt is being computed or waits in the queue."""
        return bool(self._running or len(self._queue))

    def wait(self, seqs: Iterable[SequenceState]) -> None:
        """Queue sequences; those that ended meanwhile are dropped."""
        for seq in seqs:
            if seq.phase is Phase.WAITING:
                self._queue.push(seq)

    def resume(self, seq: SequenceState) -> None:
        """Compute what a pull did not bring of a sequence that has its slot and blocks."""
        seq.phase = Phase.PREFILLING
        self._running.append(seq)

    def leave(self, seq: SequenceState) -> None:
        """Forget a sequence that waits or prefills (it ended or was preempted)."""
        if seq.phase is Phase.WAITING:
            self._queue.remove(seq)
        elif seq.phase is Phase.PREFILLING:
            self._running.remove(seq)

    def begin_plan(self) -> None:
        """Open the door for a new plan."""
        self._open = True
        self.started = []

    def close(self) -> None:
        """Start nobody else in this plan."""
        self._open = False

    def plan(self, budget: int, *, landed: int, now: float) -> tuple[list[Prefill], list[Chunk]]:
        """Choose this step's chunks, at most `budget` tokens; `landed` is the newest committed plan."""
        if not self.has_work or not budget:
            return [], []
        grants: dict[SequenceState, int] = {}
        spent = self._grant((budget + 1) // 2, grants, _age, self._queue.oldest, (landed, now))
        spent += self._grant(budget - spent, grants, _length, self._queue.shortest, (landed, now))
        if spent < budget:
            self._grant(budget - spent, grants, _age, self._queue.oldest, (landed, now))
        prefills, chunks = [], []
        for seq, length in grants.items():
            prefill, chunk = self._cut(seq, length)
            prefills.append(prefill)
            chunks.append(chunk)
        return prefills, chunks

    def _cut(self, seq: SequenceState, length: int) -> tuple[Prefill, Chunk]:
        start, end = seq.planned, seq.planned + length
        done = end == seq.num_tokens
        samples = done and seq.limit > seq.num_tokens
        tokens = None if self._counted else tuple(seq.tokens[start:end])
        ahead = () if self._counted else tuple(seq.tokens[end : end + self._mtp_depth])
        seq.planned = end
        self._residency.write(seq)
        if done:
            self._running.remove(seq)
            seq.phase = Phase.DECODING
        prefill = Prefill(seq.request.request_id, seq.slot, start, length, tokens, samples, ahead)
        return prefill, Chunk(seq, end, samples)

    def _grant(
        self,
        quota: int,
        grants: dict[SequenceState, int],
        rank: Callable[[SequenceState], tuple[float, int]],
        best_waiting: Callable[[], SequenceState | None],
        at: tuple[int, float],
    ) -> int:
        """Give up to `quota` tokens away in the order of `rank`, starting requests; returns how many."""
        candidates = deque(sorted(self._running, key=rank))
        left = quota
        while left > 0:
            head = best_waiting() if self._open else None
            if head is not None and (not candidates or rank(head) < rank(candidates[0])):
                if not self._start(head, *at):
                    continue
                seq = head
            elif candidates:
                seq = candidates.popleft()
            else:
                break
            granted = grants.get(seq, 0)
            length = min(left, seq.num_tokens - seq.planned - granted)
            if length:
                grants[seq] = granted + length
                left -= length
        return quota - left

    def _start(self, seq: SequenceState, landed: int, now: float) -> bool:
        """Give a waiting request a slot and blocks; otherwise park it or close the door for this plan.

        True when it has tokens to compute now.
        """
        home = self._residency
        if not home.has_slot or seq.ready_after > landed or self._still_blocked(seq):
            self._open = False
            return False
        cached = home.prefix.match(seq)
        computing = home.prefix.next_computing(seq, len(cached))
        if computing is not None:
            self._queue.remove(seq)
            home.prefix.park(seq, computing)
            return False
        if not home.enter(seq, cached):
            self._open = False
            self._blocked = (seq.ticket, home.pool.num_free)
            return False
        self._queue.remove(seq)
        self.started.append(Started(seq.request.request_id, seq.slot, seq.planned, seq.started is not None))
        pulling = seq.request.pull and seq.started is None and self._pulls.start(seq)
        self._count_start(seq, now)
        if not pulling:
            self.resume(seq)
        return not pulling

    def _still_blocked(self, seq: SequenceState) -> bool:
        """Whether `seq` did not fit before and no block came free since (spares matching its prefix anew)."""
        ticket, num_free = self._blocked
        return seq.ticket == ticket and self._residency.pool.num_free <= num_free

    def _count_start(self, seq: SequenceState, now: float) -> None:
        totals = self._totals
        if seq.started is not None:
            totals.recomputed += max(0, seq.lost - seq.planned)
            return
        seq.started = now
        seq.cached_tokens = seq.planned
        if seq.request.pull:
            return
        totals.prompt_tokens += seq.request.prompt_len
        if self._caching and seq.request.reuse_prefix:
            totals.prefix_queries += seq.request.prompt_len
        totals.prefix_hits += seq.planned


def _age(seq: SequenceState) -> tuple[float, int]:
    return seq.rank


def _length(seq: SequenceState) -> tuple[float, int]:
    return (seq.request.priority, seq.num_tokens - seq.planned)
