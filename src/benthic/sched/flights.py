"""Plans that were made and not committed yet, in order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.sched.plans import StepPlan
    from benthic.sched.request import SequenceState


class Chunk(NamedTuple):
    """A prefill of a plan: positions of `seq` up to `end`; `samples` when the last one gives a token."""

    seq: SequenceState
    end: int
    samples: bool


class Flight(NamedTuple):
    """The sequences behind the rows of plan `number`; `drafts` are reserved, one count a decode."""

    number: int
    decodes: list[SequenceState]
    drafts: tuple[int, ...]
    chunks: list[Chunk]
    num_rows: int

    @property
    def drafted(self) -> bool:
        """Whether some decode had drafts, so that its next position depends on how many held."""
        return any(self.drafts)


class Flights:
    """Numbers plans from 0 and insists that they come back once and in order."""

    def __init__(self) -> None:
        self._queue: deque[Flight] = deque()
        self._next_number = 0
        self.landed = -1

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def newest(self) -> int:
        """Number of the newest plan made; -1 before the first."""
        return self._next_number - 1

    def depart(self, decodes: list[SequenceState], drafts: tuple[int, ...], chunks: list[Chunk]) -> int:
        """Number a plan and remember its sequences."""
        number = self._next_number
        self._next_number += 1
        num_rows = len(decodes) + sum([chunk.samples for chunk in chunks])
        self._queue.append(Flight(number, decodes, drafts, chunks, num_rows))
        return number

    def arrive(self, plan: StepPlan, row_lengths: Sequence[int] | None) -> Flight:
        """The sequences behind `plan`, which leaves the queue; an idle plan has none.

        Raises:
            ServeError: `plan` is not the oldest in flight, or the rows do not fit it. Nothing has changed
                then.
        """
        flight = self._oldest(plan)
        if row_lengths is not None:
            _check_rows(plan, flight.num_rows, row_lengths)
        if plan.number >= 0:
            self._queue.popleft()
            self.landed = plan.number
        return flight

    def _oldest(self, plan: StepPlan) -> Flight:
        if plan.number < 0:
            return Flight(-1, [], (), [], 0)
        if self._queue and self._queue[0].number == plan.number:
            return self._queue[0]
        oldest = f"plan {self._queue[0].number}" if self._queue else "none"
        msg = f"plan {plan.number} came back, but the oldest in flight is {oldest}. Commit once and in order."
        raise ServeError(msg)


def _check_rows(plan: StepPlan, num_rows: int, row_lengths: Sequence[int]) -> None:
    if len(row_lengths) != num_rows:
        msg = (
            f"plan {plan.number} draws tokens for {num_rows} requests, but {len(row_lengths)} rows came. "
            "Give one row for each of plan.sampled_ids."
        )
        raise ServeError(msg)
    if set(row_lengths) <= {1}:
        return
    most = [1 + drafts for drafts in plan.decode_drafts] + [1] * (num_rows - len(plan.decode_drafts))
    for name, length, top in zip(plan.sampled_ids, row_lengths, most, strict=True):
        if not 1 <= length <= top:
            msg = (
                f"request {name!r}: {length} accepted tokens, but plan {plan.number} reserved 1 to {top}. "
                "A row holds the accepted drafts and one more token."
            )
            raise ServeError(msg)
