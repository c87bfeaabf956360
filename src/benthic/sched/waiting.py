"""The queue of requests without a slot, ordered in two ways at once: by age and by length."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from benthic.sched.request import Phase, SequenceState

Entry = tuple[tuple[float, int], int, SequenceState]


class WaitingQueue:
    """Finds the oldest and the shortest waiting sequence in O(log n).

    "Oldest" is the smallest `rank` (arrival shifted by priority); "shortest" the fewest known tokens within
    the best priority. An entry dies when its sequence stops waiting or waits anew; dead entries are dropped
    when they surface.
    """

    __slots__ = ("_live", "_next_ticket", "_oldest", "_shortest")

    def __init__(self) -> None:
        self._oldest: list[Entry] = []
        self._shortest: list[Entry] = []
        self._live = 0
        self._next_ticket = 0

    def __len__(self) -> int:
        return self._live

    def push(self, seq: SequenceState) -> None:
        """Let `seq` wait."""
        seq.ticket = ticket = self._next_ticket
        self._next_ticket += 1
        self._live += 1
        heappush(self._oldest, (seq.rank, ticket, seq))
        heappush(self._shortest, ((seq.request.priority, seq.num_tokens), ticket, seq))
        self._compact(self._oldest)
        self._compact(self._shortest)

    def remove(self, seq: SequenceState) -> None:
        """Stop `seq` from waiting (it starts, is parked, or ended)."""
        if seq.ticket >= 0:
            seq.ticket = -1
            self._live -= 1

    def oldest(self) -> SequenceState | None:
        """The waiting sequence of smallest rank."""
        return _top(self._oldest)

    def shortest(self) -> SequenceState | None:
        """The waiting sequence of best priority and, within it, fewest tokens."""
        return _top(self._shortest)

    def _compact(self, heap: list[Entry]) -> None:
        if len(heap) > 64 + 2 * self._live:
            heap[:] = [entry for entry in heap if _is_live(entry)]
            heapify(heap)


def _is_live(entry: Entry) -> bool:
    seq = entry[2]
    return seq.ticket == entry[1] and seq.phase is Phase.WAITING


def _top(heap: list[Entry]) -> SequenceState | None:
    while heap:
        if _is_live(heap[0]):
            return heap[0][2]
        heappop(heap)
    return None
