"""The request scheduler: which tokens of which requests the next step computes, and when a request is done.

It holds no tensors, reads no clock, draws no random numbers and logs nothing: the same calls give the same
plans. The live engine and the simulator are both a loop round it:

    scheduler = Scheduler(BatchingConfig(num_blocks=512, max_model_len=4096))
    scheduler.add(Request(request_id="a", prompt=(1, 2, 3)), now=0.0)
    while scheduler.has_work:
        plan = scheduler.plan(now)                    # StepPlan, a value
        rows = run(plan)                              # one row of new tokens for each of plan.sampled_ids
        ended = scheduler.commit(plan, rows, now)     # tuple of Finished

What the caller promises
  * Plans run in the order they were made and are committed (or failed) in that order. Several may be in
    flight.
  * Before running a plan it writes `plan.tables` into its block table; position p of a sequence lives at
    offset `p % block_size` of column `p // block_size`. A step writes all its positions before later plans
    read them.
  * Before that, and before transfers of `pulls` that are planned later, it makes the copies of
    `plan.to_host` and then those of `plan.from_host`, also of a plan that is idle or fails to run.
  * It feeds decode row i the newest token of that request, and prefill chunks their `tokens`.
  * Drafts, if any, sit behind the newest token; a row then holds the accepted drafts and one more token.

What the scheduler promises
  * A plan holds at most `max_num_batched_tokens` tokens, one row a request, distinct slots, and the table
    covers every position it computes. Decodes always take part; the rest of the budget goes to prefills.
  * Prefills share that rest: the first half goes by age (so every prompt moves on), the second by length (so
    a short prompt is not stuck behind a long one); what one half leaves, the other takes.
  * Requests start in order of arrival, a level of priority counting as `priority_seconds` of waiting. When
    the oldest does not fit into slots or blocks, nobody overtakes it into them, so nobody starves.
  * A prompt's whole blocks are reserved when it starts; a decode takes blocks as it grows. When none is free,
    the last in that line is preempted; it resumes with the same tokens, computing what is not
    cached.
  * Full committed blocks can be found by later requests; with `host_blocks`, also after their eviction. The
    last known token is always computed, never cached.
  * It alone ends requests: eos and stop ids, `max_tokens`, `max_model_len`, abort, error. Tokens past the end
    of a row (`Finished.kept`) do not count. Rows of requests that ended or were aborted since the plan are
    ignored.
  * Slots and blocks of an ended request come free when the newest plan in flight at its end is committed.
  * Blocks of rejected drafts are given back at the commit; only accepted tokens are ever hashed.
  * Blocks are conserved: `num_free_blocks == num_blocks` once nothing is left.
  * Between instances, `leases` keeps a held request's blocks for a reader and `pulls` plans such reading,
    `pulls.early` that of prompts that are still being computed.

While a sequence has uncommitted drafts, how many held decides its next position, so it sits out until they
are committed; without drafts, any number of plans may be made ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.errors import AdmissionError, ServeError
from benthic.sched.admission import refuse_impossible, total_limit
from benthic.sched.decodes import Decodes
from benthic.sched.drafting import DraftLength
from benthic.sched.flights import Flight, Flights
from benthic.sched.leases import Leases
from benthic.sched.making_room import MakingRoom
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
from benthic.sched.prefills import Prefills
from benthic.sched.pulls import Pulls
from benthic.sched.request import Phase, Request, SequenceState
from benthic.sched.residency import Residency

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class Scheduler:
    """Decides every step of one serving instance; the module's docstring is its contract.

    Cost: a decoding sequence costs a fixed fraction of a microsecond in `plan` and in `commit`; admission and
    preemption cost O(blocks of that request); the rest is O(1) a step.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.config = config
        self.totals = Totals()
        self._eos = frozenset(config.eos_token_ids)
        self._requests: dict[str, SequenceState] = {}
        self._residency = Residency(config)
        self.leases = Leases(config, self._residency.pool)
        self.pulls = Pulls(config, self._residency, self.totals, self._begin_prefilling)
        self._prefills = Prefills(config, self._residency, self.totals, self.pulls)
        self._drafting = DraftLength(config, self.totals)
        self._decodes = Decodes(config, self._residency, self._drafting)
        self._flights = Flights()
        self._making_room = MakingRoom(
            self._residency, self._decodes, self._prefills, self.leases, self._flights, self.totals
        )
        self._finished: list[Finished] = []
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a plan or transfer uncommitted, or an early pull to plan."""
        return bool(self._requests or self._flights or self.pulls.has_work)

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
    def num_host_blocks(self) -> int:
        """Evicted blocks that host memory holds."""
        return self._residency.host.num_held

    @property
    def num_in_flight(self) -> int:
        """Plans made and not committed."""
        return len(self._flights)

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """Prompt and committed output of an unfinished request."""
        return tuple(self._requests[request_id].tokens)

    def reset_prefix_cache(self) -> int:
        """Forget every cached block that nobody uses (say, weights changed); returns how many there were.

        Those in host memory are counted and forgotten too.
        """
        return self._residency.pool.clear() + self._residency.host.clear()

    def add(self, request: Request, now: float) -> None:
        """Queue a request; `now` is its arrival in seconds.

        Raises:
            AdmissionError: it can never fit, its id is taken, or it is counted where token ids are needed.
            OverloadedError: it is to be held, and what is held already leaves no room.
        """
        known = self._requests.get(request.request_id)
        if known is not None:
            msg = (
                f"request {request.request_id!r} added at {now} is in flight since {known.arrived}. "
                "Give every request its own id."
            )
            raise AdmissionError(msg)
        refuse_impossible(request, self.config)
        self.leases.promise(request)
        stops = frozenset(request.stop_token_ids)
        seq = SequenceState(
            request,
            limit=total_limit(request, self.config),
            rank=(now + request.priority * self.config.priority_seconds, self._num_added),
            stops=stops if request.ignore_eos else stops | self._eos,
            arrived=now,
        )
        self._num_added += 1
        self.totals.requests += 1
        self._residency.prefix.add_keys(seq, seq.num_tokens)
        self._requests[request.request_id] = seq
        self._prefills.wait([seq])

    def abort(self, request_id: str, now: float) -> Finished | None:
        """End a request; None if no such request is in flight (it may just have ended)."""
        seq = self._requests.get(request_id)
        if seq is None:
            return None
        self._finished = []
        self._finish(seq, "abort", now)
        return self._finished[0]

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work; see the module's docstring for what a plan promises.

        An idle plan (`num_tokens == 0`, `number == -1`) has nothing to run, but may have copies to make;
        committing it does nothing.
        """
        home, budget = self._residency, self.config.max_num_batched_tokens
        home.begin_plan()
        self._prefills.begin_plan()
        preempted = self._making_room.plan()
        rows = self._decodes.plan(budget // 2 if self._prefills.has_work else budget)
        num_tokens = len(rows.seqs) + sum(rows.drafts)
        prefills, chunks = self._prefills.plan(budget - num_tokens, landed=self._flights.landed, now=now)
        num_tokens += sum([chunk.length for chunk in prefills])
        self._decodes.join([chunk.seq for chunk in chunks if chunk.seq.phase is Phase.DECODING])
        if not preempted:
            self.pulls.early.reserve()
        self.totals.steps += num_tokens > 0
        self.totals.scheduled_tokens += num_tokens
        to_host, from_host = home.host.to_host, home.host.from_host
        self.totals.host_blocks_out += len(to_host)
        self.totals.host_blocks_in += len(from_host)
        return StepPlan(
            number=self._flights.depart(rows.seqs, rows.drafts, chunks) if num_tokens else -1,
            num_tokens=num_tokens,
            decode_ids=rows.ids,
            decode_slots=rows.slots,
            decode_positions=rows.positions,
            decode_drafts=rows.drafts,
            prefills=tuple(prefills),
            tables=tuple(home.writes),
            events=(*preempted, *self._prefills.started),
            to_host=to_host,
            from_host=from_host,
        )

    def _begin_prefilling(self, seq: SequenceState | None, woken: list[SequenceState]) -> None:
        """A pull has ended (None: an early one): compute what it did not bring, at least the last token."""
        if seq is not None:
            self._prefills.resume(seq)
        self._prefills.wait(woken)

    def commit(
        self,
        plan: StepPlan,
        accepted: Sequence[Sequence[int]],
        now: float,
        given: Sequence[int] | None = None,
    ) -> tuple[Finished, ...]:
        """Report the tokens of a plan that ran: one row for each of `plan.sampled_ids`.

        A row holds one token, or up to `1 + drafts` when drafts held. `given` says how many drafts each
        decode really had, where that was fewer than `plan.decode_drafts`.

        Raises:
            ServeError: the plan is not the oldest in flight, or the rows do not fit it.
        """
        if self.config.counted:
            msg = "commit takes token ids, but with counted=True requests carry 0 of them. Use commit_counts."
            raise ServeError(msg)
        self._finished = []
        flight = self._flights.arrive(plan, [len(row) for row in accepted])
        self._drafting.note(flight, map(len, accepted), flight.drafts if given is None else given, now)
        if flight.drafted:
            self._settle_drafted(flight, accepted, now)
        else:
            self._settle_decodes(flight.decodes, accepted, now)
        return self._land(flight, accepted[len(flight.decodes) :], now)

    def commit_counts(
        self, plan: StepPlan, now: float, counts: Sequence[int] | None = None
    ) -> tuple[Finished, ...]:
        """As `commit` for counted requests: `counts[i]` tokens held in row i, one each when None.

        Raises:
            ServeError: the plan is not the oldest in flight, or the counts do not fit it.
        """
        if not self.config.counted:
            msg = "commit_counts takes 0 token ids, but counted=False needs 1 or more a row. Use commit."
            raise ServeError(msg)
        self._finished = []
        flight = self._flights.arrive(plan, counts)
        if counts is None and self.config.num_speculative_tokens:
            counts = [1] * flight.num_rows
        if counts is None:
            self._count_decodes(flight.decodes, now)
        else:
            self._drafting.note(flight, counts, flight.drafts, now)
            self._settle_drafted(flight, [range(count) for count in counts], now)
        return self._land(flight, [(0,)] * (flight.num_rows - len(flight.decodes)), now)

    def fail(self, plan: StepPlan, now: float) -> tuple[Finished, ...]:
        """Report that a plan could not be run: its requests end with "error", nothing it wrote is reused.

        Raises:
            ServeError: the plan is not the oldest in flight.
        """
        self._finished = []
        flight = self._flights.arrive(plan, None)
        for seq in [*flight.decodes, *(chunk.seq for chunk in flight.chunks)]:
            if seq.phase is not Phase.FINISHED:
                self._finish(seq, "error", now)
        return self._land(flight._replace(chunks=[]), [], now)

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

    def _settle_drafted(self, flight: Flight, rows: Sequence[Sequence[int]], now: float) -> None:
        """Any number of tokens a row; a sequence that had drafts goes on behind those that held."""
        for seq, row, drafts in zip(flight.decodes, rows, flight.drafts, strict=False):
            self._settle(seq, row, now)
            if drafts and seq.phase is Phase.DECODING:
                seq.planned = seq.num_tokens - 1
                seq.busy = False
                self._residency.trim(seq)

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
                    self._finish(seq, "stop", now, stop_token=token, kept=kept)
                    return
            if seq.num_tokens >= seq.limit:
                self._finish(seq, "length", now, kept=kept)
                return
        if seq.phase is Phase.DECODING or seq.phase is Phase.DRAINING:
            self._prefills.wait(self._residency.settle(seq, seq.num_tokens - 1))

    def _land(self, flight: Flight, rows: Sequence[Sequence[int]], now: float) -> tuple[Finished, ...]:
        """Settle the prefills of a plan, then hand on what waited for it."""
        row = iter(rows)
        for seq, end, samples in flight.chunks:
            if seq.phase in _RESIDENT:
                self._prefills.wait(self._residency.settle(seq, end))
                if end < seq.num_tokens:
                    self.leases.lend(seq, end)
            if samples:
                self._settle(seq, next(row), now)
            elif end == seq.limit and seq.phase is not Phase.FINISHED:
                self._finish(seq, "length", now)
        if flight.number >= 0:
            self._residency.land(flight.number)
        return tuple(self._finished)

    def _finish(
        self,
        seq: SequenceState,
        reason: FinishReason,
        now: float,
        *,
        stop_token: int | None = None,
        kept: int = 0,
    ) -> None:
        self._finished.append(seq.ended(reason, now, stop_token=stop_token, kept=kept))
        self.totals.finished += 1
        del self._requests[seq.request.request_id]
        self._prefills.leave(seq)
        self.pulls.leave(seq)
        self.leases.grant(seq, now, keep=reason == "length")
        if seq.phase is not Phase.WAITING:
            self._let_go(seq, keep=reason in ("stop", "length"))
        seq.phase = Phase.FINISHED

    def _let_go(self, seq: SequenceState, *, keep: bool) -> None:
        self._decodes.changed()
        woken = self._residency.settle(seq, seq.num_tokens - 1) if keep else []
        newest = self._flights.newest if self._flights else None
        self._prefills.wait([*woken, *self._residency.leave(seq, newest)])


_RESIDENT = (Phase.PREFILLING, Phase.DECODING, Phase.DRAINING)
