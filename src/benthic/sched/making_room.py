"""A block for every decode that needs one, taken from the last in line when none is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.sched.plans import Preempted
from benthic.sched.request import Phase, SequenceState

if TYPE_CHECKING:
    from benthic.sched.decodes import Decodes
    from benthic.sched.flights import Flights
    from benthic.sched.leases import Leases
    from benthic.sched.plans import Totals
    from benthic.sched.prefills import Prefills
    from benthic.sched.residency import Residency


class MakingRoom:
    """Grows decoding sequences, and preempts for them."""

    def __init__(
        self,
        residency: Residency,
        decodes: Decodes,
        prefills: Prefills,
        leases: Leases,
        flights: Flights,
        totals: Totals,
    ) -> None:
        self._residency = residency
        self._decodes = decodes
        self._prefills = prefills
        self._leases = leases
        self._flights = flights
        self._totals = totals

    def plan(self) -> list[Preempted]:
        """Give every decode a block for its next position, preempting where none is free."""
        preempted = []
        for seq in self._decodes.short_of_blocks():
            while seq.phase is Phase.DECODING and not self._residency.pool.num_free:
                victim = max([*self._decodes.running, *self._prefills.running], key=_age)
                preempted.append(Preempted(victim.request.request_id, victim.slot))
                self.preempt(victim)
            if seq.phase is Phase.DECODING:
                self._residency.grow(seq)
        return preempted

    def preempt(self, seq: SequenceState) -> None:
        """Take slot and blocks away from `seq`, which waits from now on; nobody else starts in this plan."""
        self._prefills.leave(seq)
        self._decodes.changed()
        self._leases.take_back(seq.request.request_id)
        seq.phase = Phase.WAITING
        seq.ready_after = self._flights.newest
        seq.preemptions += 1
        self._totals.preemptions += 1
        self._prefills.wait([*self._residency.evict(seq), seq])
        self._prefills.close()


def _age(seq: SequenceState) -> tuple[float, int]:
    return seq.rank
