"""The decoding sequences of a scheduler, as the rows of its plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benthic.sched.request import Phase, SequenceState

if TYPE_CHECKING:
    from benthic.sched.drafting import DraftLength
    from benthic.sched.plans import BatchingConfig
    from benthic.sched.residency import Residency


class Rows(NamedTuple):
    """Parallel columns of a step's decodes; see `StepPlan`."""

    seqs: list[SequenceState]
    ids: tuple[str, ...]
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    drafts: tuple[int, ...]


class Decodes:
    """Keeps the rows between steps: ids and slots are rebuilt only when a sequence comes or goes."""

    def __init__(self, config: BatchingConfig, residency: Residency, drafting: DraftLength) -> None:
        self._config = config
        self._drafting = drafting
        self._residency = residency
        self._seqs: list[SequenceState] = []
        self._ids: tuple[str, ...] = ()
        self._slots: tuple[int, ...] = ()
        self._stale = False

    @property
    def running(self) -> list[SequenceState]:
        """Decoding sequences."""
        return [seq for seq in self._seqs if seq.phase is Phase.DECODING]

    def join(self, seqs: list[SequenceState]) -> None:
        """Add sequences whose last known token is planned; they decode from the next plan on."""
        if seqs:
            self._seqs = self._seqs + seqs
            self._stale = True

    def changed(self) -> None:
        """A decoding sequence left: rebuild the rows before they are used again."""
        self._stale = True

    def short_of_blocks(self) -> list[SequenceState]:
        """Sequences whose next position needs a block; those with no token left to plan drain instead."""
        due = [seq for seq in self._seqs if seq.planned >= seq.horizon]
        short = []
        for seq in due:
            if seq.phase is not Phase.DECODING or seq.busy:
                continue
            if seq.planned >= seq.limit - 1:
                seq.phase = Phase.DRAINING
                self._stale = True
            else:
                short.append(seq)
        return short

    def plan(self, draft_budget: int) -> Rows:
        """One token for every sequence; with speculation, drafts as far as `draft_budget` tokens go."""
        if self._stale:
            self._seqs = self.running
            self._ids = tuple([seq.request.request_id for seq in self._seqs])
            self._slots = tuple([seq.slot for seq in self._seqs])
            self._stale = False
        if self._config.num_speculative_tokens:
            seqs = [seq for seq in self._seqs if not seq.busy]
            wanted = self._drafting.choose(len(seqs))
            share = min(wanted, max(0, draft_budget // len(seqs) - 1)) if seqs else 0
            if share or len(seqs) < len(self._seqs):
                return self._plan_drafted(seqs, share)
        seqs = self._seqs
        positions = tuple([seq.planned for seq in seqs])
        for seq in seqs:
            seq.planned += 1
        return Rows(seqs, self._ids, self._slots, positions, (0,) * len(seqs))

    def _plan_drafted(self, seqs: list[SequenceState], share: int) -> Rows:
        """Up to `share` drafts each; a sequence that has some sits out until it is known how many held."""
        positions, drafts = [], []
        for seq in seqs:
            reserved = self._reserve(seq, share) if share and seq.request.speculate else 0
            positions.append(seq.planned)
            drafts.append(reserved)
            seq.planned += 1 + reserved
            seq.busy = reserved > 0
        ids = tuple([seq.request.request_id for seq in seqs])
        return Rows(seqs, ids, tuple([seq.slot for seq in seqs]), tuple(positions), tuple(drafts))

    def _reserve(self, seq: SequenceState, wanted: int) -> int:
        """Cover up to `wanted` positions behind the next one; drafts preempt nobody."""
        home = self._residency
        wanted = min(wanted, seq.limit - 2 - seq.planned)
        while seq.planned + 1 + wanted > home.covered(seq) and home.pool.num_free:
            home.grow(seq)
        return min(wanted, home.covered(seq) - 1 - seq.planned)
