"""The request scheduler: which tokens of which requests the next step computes, and when a request is done.

It holds no tensors, reads no clock, draws no random numbers and logs nothing: the same calls give the same plans. The
live engine and the simulator are both a loop round it:

    scheduler = Scheduler(BatchingConfig(num_blocks=512, max_model_len=4096))
    scheduler.add(Request(request_id="a", prompt=(1, 2, 3)), now=0.0)
    while scheduler.has_work:
        plan = scheduler.plan(now)                    # StepPlan, a value
        rows = run(plan)                              # one row of new tokens for each of plan.sampled_ids
        ended = scheduler.commit(plan, rows, now)     # tuple of Finished

What the caller promises
  * Plans run in the order they were made and are committed (or failed) in that order. Several may be in flight.
  * Before running a plan it writes `plan.tables` into its block table; position p of a sequence lives at offset
    `p % block_size` of column `p // block_size`. A step writes all its positions before later plans read them.
  * It feeds decode row i the newest token of that request, and prefill chunks their `tokens`.
  * Drafts, if any, sit behind the newest token; a row then holds the accepted drafts and one more token.

What the scheduler promises
  * A plan holds at most `max_num_batched_tokens` tokens, one row a request, distinct slots, and the table covers every
    position it computes. Decodes always take part; the rest of the budget goes to prefills.
  * Prefills share that rest: the first half goes by age (so every prompt moves on), the second by length (so a short
    prompt is not stuck behind a long one); what one half leaves, the other takes.
  * Requests start in order of arrival, a level of priority counting as `priority_seconds` of waiting. When the oldest
    does not fit into slots or blocks, nobody overtakes it into them, so nobody starves.
  * A prompt's whole blocks are reserved when it starts; a decode takes blocks as it grows. When none is free, the
    latest of the lowest priority is preempted; it resumes with the same tokens, computing what is not cached.
  * Full committed blocks can be found by later requests. The last known token is always computed, never cached.
  * It alone ends requests: eos and stop ids, `max_tokens`, `max_model_len`, abort, error. Tokens past the end of a
    row (`Finished.kept`) do not count. Rows of requests that ended or were aborted since the plan are ignored.
  * Slots and blocks of an ended request come free when the newest plan in flight at its end is committed.
  * Blocks are conserved: `num_free_blocks == num_blocks` once nothing is left.

While a sequence has uncommitted drafts, how many held decides its next position, so it sits out until they are
committed; without drafts, any number of plans may be made ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benthic.errors import AdmissionError, ServeError
from benthic.sched.admission import refuse_impossible, total_limit
from benthic.sched.plans import (
    BatchingConfig,
    Finished,
    FinishReason,
    Preempted,
    Prefill,
    Started,
    StepPlan,
    TableWrite,
    Totals,
)
from benthic.sched.request import Phase, Request, SequenceState
from benthic.sched.residency import Residency
from benthic.sched.waiting import WaitingQueue

__all__ = [
    "BatchingConfig",
    "Finished",
    "Preempted",
    "Prefill",
    "Request",
    "Scheduler",
    "Started",
    "StepPlan",
    "TableWrite",
    "Totals",
]


_RESIDENT = (Phase.PREFILLING, Phase.DECODING, Phase.DRAINING)
_PREEMPTIBLE = (Phase.PREFILLING, Phase.DECODING)


class _Chunk(NamedTuple):
    seq: SequenceState
    end: int
    samples: bool


class _Flight(NamedTuple):
    """A plan that was made and not committed yet, with the sequences behind its rows."""

    number: int
    decodes: list[SequenceState]
    chunks: list[_Chunk]
    num_rows: int


class Scheduler:
    """Decides every step of one serving instance; the module's docstring is its contract.

    Cost: a decoding sequence costs a fixed fraction of a microsecond in `plan` and in `commit`; admission and
    preemption cost O(blocks of that request); the rest is O(1) a step.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.config = config
        self.totals = Totals()
        self._eos = frozenset(config.eos_token_ids)
        self._residency = Residency(config)
        self._requests: dict[str, SequenceState] = {}
        self._queue = WaitingQueue()
        self._prefilling: list[SequenceState] = []
        self._decodes: list[SequenceState] = []
        self._decode_ids: tuple[str, ...] = ()
        self._decode_slots: tuple[int, ...] = ()
        self._decodes_changed = False
        self._new_decodes: list[SequenceState] = []
        self._num_added = 0
        self._next_number = 0
        self._committed = -1
        self._flights: deque[_Flight] = deque()
        self._closed = False
        self._events: list[Started | Preempted] = []
        self._finished: list[Finished] = []

    # ---- what callers ask

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a plan uncommitted."""
        return bool(self._requests or self._flights)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and are not finished."""
        return self._residency.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold no slot."""
        return len(self._requests) - self._residency.num_running

    @property
    def num_free_blocks(self) -> int:
        """Blocks without users; some may still hold a cached prefix."""
        return self._residency.pool.num_free

    @property
    def num_in_flight(self) -> int:
        """Plans made and not committed."""
        return len(self._flights)

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """Prompt and committed output of an unfinished request."""
        return tuple(self._requests[request_id].tokens)

    def reset_prefix_cache(self) -> int:
        """Forget every cached block that nobody uses (weights changed); returns how many there were."""
        return self._residency.pool.clear()

    # ---- requests come and go

    def add(self, request: Request, now: float) -> None:
        """Queue a request; `now` is its arrival in seconds.

        Raises:
            AdmissionError: it can never fit, its id is taken, or it is counted where token ids are needed.
        """
        config = self.config
        if request.request_id in self._requests:
            raise AdmissionError(
                f"request {request.request_id!r} is already in flight since {self._requests[request.request_id].arrived}; "
                f"now is {now}. Give every request its own id."
            )
        refuse_impossible(request, config)
        stops = frozenset(request.stop_token_ids)
        seq = SequenceState(
            request,
            limit=total_limit(request, config),
            rank=(now + request.priority * config.priority_seconds, self._num_added),
            stops=stops if request.ignore_eos else stops | self._eos,
            arrived=now,
        )
        self._num_added += 1
        self.totals.requests += 1
        self._residency.prefix.add_keys(seq, seq.num_tokens)
        self._requests[request.request_id] = seq
        self._queue.push(seq)

    def abort(self, request_id: str, now: float) -> Finished | None:
        """End a request; None if no such request is in flight (it may just have ended)."""
        seq = self._requests.get(request_id)
        if seq is None:
            return None
        self._finished = []
        self._finish(seq, "abort", None, 0, now)
        return self._finished[0]

    # ---- plan

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work; see the module's docstring for what a plan promises.

        An idle plan (`num_tokens == 0`, `number == -1`) has nothing to run; committing it does nothing.
        """
        self._residency.writes, self._events, self._closed = [], [], False
        self._grow_decodes()
        decodes, positions, drafts = self._plan_decodes()
        num_decode_tokens = len(decodes) + sum(drafts)
        prefills, chunks = self._plan_prefills(self.config.max_num_batched_tokens - num_decode_tokens, now)
        num_tokens = num_decode_tokens + sum(chunk.length for chunk in prefills)
        number = self._record(decodes, chunks, num_tokens)
        whole = decodes is self._decodes
        return StepPlan(
            number=number,
            num_tokens=num_tokens,
            decode_ids=self._decode_ids if whole else tuple([seq.request.request_id for seq in decodes]),
            decode_slots=self._decode_slots if whole else tuple([seq.slot for seq in decodes]),
            decode_positions=positions,
            decode_drafts=drafts,
            prefills=prefills,
            tables=tuple(self._residency.writes),
            events=tuple(self._events),
        )

    def _record(self, decodes: list[SequenceState], chunks: list[_Chunk], num_tokens: int) -> int:
        if not num_tokens:
            return -1
        number = self._next_number
        self._next_number += 1
        num_rows = len(decodes) + sum(chunk.samples for chunk in chunks)
        self._flights.append(_Flight(number, decodes, chunks, num_rows))
        self.totals.steps += 1
        self.totals.scheduled_tokens += num_tokens
        return number

    def _grow_decodes(self) -> None:
        """Give every decode a block for its next position, preempting where none is free; then fix the rows."""
        if self._new_decodes:
            self._decodes = self._decodes + self._new_decodes
            self._new_decodes = []
            self._decodes_changed = True
        for seq in [seq for seq in self._decodes if seq.planned >= seq.horizon]:
            if seq.phase is Phase.DECODING and not seq.busy:
                self._grow(seq)
        if self._decodes_changed:
            self._decodes = [seq for seq in self._decodes if seq.phase is Phase.DECODING]
            self._decode_ids = tuple([seq.request.request_id for seq in self._decodes])
            self._decode_slots = tuple([seq.slot for seq in self._decodes])
            self._decodes_changed = False

    def _grow(self, seq: SequenceState) -> None:
        if seq.planned >= seq.limit - 1:
            seq.phase = Phase.DRAINING
            self._decodes_changed = True
            return
        while not self._residency.pool.num_free:
            running = [*self._decodes, *self._prefilling]
            victim = max([s for s in running if s.phase in _PREEMPTIBLE], key=_age)
            self._preempt(victim)
            if victim is seq:
                return
        self._residency.grow(seq)

    def _preempt(self, seq: SequenceState) -> None:
        self._events.append(Preempted(seq.request.request_id, seq.slot))
        self._closed = True
        self._leave_lists(seq)
        self._unpark(self._residency.evict(seq))
        seq.preemptions += 1
        self.totals.preemptions += 1
        seq.phase = Phase.WAITING
        seq.ready_after = self._next_number - 1
        self._queue.push(seq)

    def _leave_lists(self, seq: SequenceState) -> None:
        if seq.phase is Phase.PREFILLING:
            self._prefilling.remove(seq)
        self._decodes_changed = True

    def _unpark(self, woken: Iterable[SequenceState]) -> None:
        for seq in woken:
            if seq.phase is Phase.WAITING:
                self._queue.push(seq)

    def _plan_decodes(self) -> tuple[list[SequenceState], tuple[int, ...], tuple[int, ...]]:
        """Rows, first positions and reserved drafts of this step's decodes."""
        if self.config.num_speculative_tokens:
            return self._plan_drafted()
        decodes = self._decodes
        positions = tuple([seq.planned for seq in decodes])
        for seq in decodes:
            seq.planned += 1
        return decodes, positions, (0,) * len(decodes)

    def _plan_drafted(self) -> tuple[list[SequenceState], tuple[int, ...], tuple[int, ...]]:
        """As many drafts as budget, length and free blocks allow; half the budget is left to prefills."""
        config, home = self.config, self._residency
        decodes = [seq for seq in self._decodes if not seq.busy]
        prefills_wait = bool(self._prefilling or len(self._queue))
        budget = config.max_num_batched_tokens // 2 if prefills_wait else config.max_num_batched_tokens
        share = max(0, budget // len(decodes) - 1) if decodes else 0
        positions, drafts = [], []
        for seq in decodes:
            wanted = min(share, config.num_speculative_tokens, seq.limit - 2 - seq.planned)
            while seq.planned + 1 + wanted > home.covered(seq) and home.pool.num_free:
                home.grow(seq)
            reserved = min(wanted, home.covered(seq) - 1 - seq.planned)
            positions.append(seq.planned)
            drafts.append(reserved)
            seq.planned += 1 + reserved
            seq.busy = True
        self.totals.drafted += sum(drafts)
        return decodes, tuple(positions), tuple(drafts)

    def _plan_prefills(self, budget: int, now: float) -> tuple[tuple[Prefill, ...], list[_Chunk]]:
        """Share the budget among prompts: half by age, half by length, each taking what the other leaves."""
        if not self._prefilling and not len(self._queue):
            return (), []
        grants: dict[SequenceState, int] = {}
        by_age = self._grant((budget + 1) // 2, grants, _age, self._queue.oldest, now)
        self._grant(budget - by_age, grants, _length, self._queue.shortest, now)
        prefills, chunks = [], []
        for seq, length in grants.items():
            start, end = seq.planned, seq.planned + length
            done = end == seq.num_tokens
            samples = done and seq.limit > seq.num_tokens
            tokens = None if self.config.counted else tuple(seq.tokens[start:end])
            prefills.append(Prefill(seq.request.request_id, seq.slot, start, length, tokens, samples))
            chunks.append(_Chunk(seq, end, samples))
            seq.planned = end
            if done:
                self._start_decoding(seq)
        return tuple(prefills), chunks

    def _start_decoding(self, seq: SequenceState) -> None:
        self._prefilling.remove(seq)
        seq.phase = Phase.DECODING
        seq.busy = self.config.num_speculative_tokens > 0
        self._new_decodes.append(seq)

    def _grant(
        self,
        quota: int,
        grants: dict[SequenceState, int],
        rank: Callable[[SequenceState], tuple[float, int]],
        best_waiting: Callable[[], SequenceState | None],
        now: float,
    ) -> int:
        """Give up to `quota` tokens away in the order of `rank`, starting requests on the way; returns how many."""
        candidates = deque(sorted(self._prefilling, key=rank))
        left = quota
        while left > 0:
            head = None if self._closed else best_waiting()
            if head is not None and (not candidates or rank(head) < rank(candidates[0])):
                if not self._start(head, now):
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

    def _start(self, seq: SequenceState, now: float) -> bool:
        """Give a waiting request a slot and blocks; otherwise park it or close admission for this plan."""
        home = self._residency
        if not home.has_slot or seq.ready_after > self._committed:
            self._closed = True
            return False
        cached = home.prefix.match(seq)
        computing = home.prefix.next_computing(seq, len(cached))
        if computing is not None:
            self._queue.remove(seq)
            home.prefix.park(seq, computing)
            return False
        if not home.enter(seq, cached):
            self._closed = True
            return False
        seq.phase = Phase.PREFILLING
        self._queue.remove(seq)
        self._prefilling.append(seq)
        self._events.append(Started(seq.request.request_id, seq.slot, seq.planned, seq.started is not None))
        self._count_start(seq, now)
        return True

    def _count_start(self, seq: SequenceState, now: float) -> None:
        if seq.started is not None:
            self.totals.recomputed += max(0, seq.lost - seq.planned)
            return
        seq.started = now
        seq.cached_tokens = seq.planned
        self.totals.prompt_tokens += seq.request.prompt_len
        self.totals.prefix_queries += seq.request.prompt_len
        self.totals.prefix_hits += seq.planned

    # ---- commit

    def commit(self, plan: StepPlan, accepted: Sequence[Sequence[int]], now: float) -> tuple[Finished, ...]:
        """Report the tokens of a plan that ran: one row for each of `plan.sampled_ids`.

        A row holds one token, or up to `1 + drafts` when drafts held.

        Raises:
            ServeError: the plan is not the oldest in flight, or the rows do not fit it.
        """
        if self.config.counted:
            raise ServeError(
                "commit takes token ids, but counted=True: requests carry 0 of them. Use commit_counts."
            )
        flight = self._take_off(plan, [len(row) for row in accepted])
        split = len(flight.decodes)
        if self.config.num_speculative_tokens:
            for seq, row in zip(flight.decodes, accepted, strict=False):
                self._settle(seq, row, now)
        else:
            self._settle_decodes(flight.decodes, accepted, now)
        return self._land(flight, accepted[split:], now)

    def commit_counts(
        self, plan: StepPlan, now: float, counts: Sequence[int] | None = None
    ) -> tuple[Finished, ...]:
        """As `commit` for counted requests: `counts[i]` tokens held in row i, one each when None.

        Raises:
            ServeError: the plan is not the oldest in flight, or the counts do not fit it.
        """
        if not self.config.counted:
            raise ServeError(
                "commit_counts takes 0 token ids, but counted=False: one a row is needed. Use commit."
            )
        flight = self._take_off(plan, counts)
        split = len(flight.decodes)
        if counts is None:
            self._count_decodes(flight.decodes, now)
        else:
            for seq, count in zip(flight.decodes, counts, strict=False):
                self._settle(seq, range(count), now)
        return self._land(flight, [(0,)] * (flight.num_rows - split), now)

    def fail(self, plan: StepPlan, now: float) -> tuple[Finished, ...]:
        """Report that a plan could not be run: its requests end with reason "error"; nothing it wrote is reused.

        Raises:
            ServeError: the plan is not the oldest in flight.
        """
        flight = self._take_off(plan, None)
        for seq in [*flight.decodes, *(chunk.seq for chunk in flight.chunks)]:
            if seq.phase is not Phase.FINISHED:
                self._finish(seq, "error", None, 0, now)
        return self._land(flight._replace(chunks=[]), [], now)

    def _take_off(self, plan: StepPlan, row_lengths: Sequence[int] | None) -> _Flight:
        """The sequences behind the oldest plan in flight, if that is `plan` and the rows fit it."""
        self._finished = []
        if plan.number < 0:
            flight = _Flight(-1, [], [], 0)
        elif not self._flights or self._flights[0].number != plan.number:
            oldest = self._flights[0].number if self._flights else None
            raise ServeError(
                f"plan {plan.number} was given back, but the oldest in flight is {oldest}. Commit plans once and in order."
            )
        else:
            flight = self._flights[0]
        if row_lengths is not None:
            _check_rows(plan, flight.num_rows, row_lengths)
        if plan.number >= 0:
            self._flights.popleft()
        return flight

    def _settle_decodes(
        self, decodes: list[SequenceState], rows: Sequence[Sequence[int]], now: float
    ) -> None:
        """One token a row; all but a few are an append and a comparison."""
        quick = 0
        for seq, (token,) in zip(decodes, rows, strict=False):
            known = seq.num_tokens + 1
            if known >= seq.next_check or token in seq.stops_now:
                self._settle(seq, (token,), now)
            else:
                seq.tokens.append(token)
                seq.num_tokens = known
                quick += 1
        self.totals.generated_tokens += quick

    def _count_decodes(self, decodes: list[SequenceState], now: float) -> None:
        quick = 0
        for seq in decodes:
            known = seq.num_tokens + 1
            if known >= seq.next_check:
                self._settle(seq, (0,), now)
            else:
                seq.num_tokens = known
                quick += 1
        self.totals.generated_tokens += quick

    def _settle(self, seq: SequenceState, row: Sequence[int], now: float) -> None:
        """Take the tokens of one row until one of them ends the sequence."""
        if seq.phase is Phase.FINISHED:
            return
        if seq.first_token is None:
            seq.first_token = now
        counted = self.config.counted
        for kept, token in enumerate(row, start=1):
            seq.num_tokens += 1
            self.totals.generated_tokens += 1
            if not counted:
                seq.tokens.append(token)
                if token in seq.stops and seq.num_tokens > seq.min_total:
                    self._finish(seq, "stop", token, kept, now)
                    return
            if seq.num_tokens >= seq.limit:
                self._finish(seq, "length", None, kept, now)
                return
        self.totals.accepted_drafts += len(row) - 1
        if seq.phase is Phase.DECODING or seq.phase is Phase.DRAINING:
            self._unpark(self._residency.settle(seq, seq.num_tokens - 1))
            if self.config.num_speculative_tokens:
                seq.planned = seq.num_tokens - 1
                seq.busy = False

    def _land(self, flight: _Flight, rows: Sequence[Sequence[int]], now: float) -> tuple[Finished, ...]:
        """Settle the prefills of a plan, then hand on what waited for it."""
        row = iter(rows)
        for chunk in flight.chunks:
            tokens = next(row) if chunk.samples else ()
            if chunk.seq.phase in _RESIDENT:
                self._unpark(self._residency.settle(chunk.seq, chunk.end))
            if chunk.samples:
                self._settle(chunk.seq, tokens, now)
            elif chunk.end == chunk.seq.limit and chunk.seq.phase is not Phase.FINISHED:
                self._finish(chunk.seq, "length", None, 0, now)
        if flight.number >= 0:
            self._committed = flight.number
            self._residency.land(flight.number)
        return tuple(self._finished)

    def _finish(
        self, seq: SequenceState, reason: FinishReason, stop_token: int | None, kept: int, now: float
    ) -> None:
        request = seq.request
        ended = Finished(
            request_id=request.request_id,
            slot=seq.slot,
            reason=reason,
            stop_token=stop_token,
            kept=kept,
            num_generated=seq.num_generated,
            cached_tokens=seq.cached_tokens,
            preemptions=seq.preemptions,
            arrived=seq.arrived,
            started=seq.started,
            first_token=seq.first_token,
            finished=now,
        )
        self._finished.append(ended)
        self.totals.finished += 1
        del self._requests[request.request_id]
        if seq.phase is Phase.WAITING:
            self._queue.remove(seq)
        else:
            self._unpark(self._let_go(seq, keep=reason in ("stop", "length")))
        seq.phase = Phase.FINISHED

    def _let_go(self, seq: SequenceState, *, keep: bool) -> list[SequenceState]:
        self._leave_lists(seq)
        woken = self._residency.settle(seq, seq.num_tokens - 1) if keep else []
        newest = self._next_number - 1
        return woken + self._residency.leave(seq, newest if newest > self._committed else None)


def _age(seq: SequenceState) -> tuple[float, int]:
    return seq.rank


def _length(seq: SequenceState) -> tuple[float, int]:
    return (seq.request.priority, seq.num_tokens - seq.planned)


def _check_rows(plan: StepPlan, num_rows: int, row_lengths: Sequence[int]) -> None:
    if len(row_lengths) != num_rows:
        raise ServeError(
            f"plan {plan.number} draws tokens for {num_rows} requests, but {len(row_lengths)} rows were committed. "
            "Give one row for each of plan.sampled_ids."
        )
    if set(row_lengths) <= {1}:
        return
    most = [1 + drafts for drafts in plan.decode_drafts] + [1] * (num_rows - len(plan.decode_drafts))
    for name, length, top in zip(plan.sampled_ids, row_lengths, most, strict=True):
        if not 1 <= length <= top:
            raise ServeError(
                f"request {name!r} has {length} accepted tokens in plan {plan.number}, which reserved 1 to {top}. "
                "A row holds the accepted drafts and one more token."
            )
