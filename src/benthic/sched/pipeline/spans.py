"""What really happened when: spans that an executor measured, as lines of JSON, and as a timeline to draw.

One line a slot, `{"rank": 2, "slot": "3F7|4B2", "start": 0.0125, "end": 0.0142, "step": 40}`, in any order.
Times are seconds of one clock; on several hosts that is the executor's care. Every rank may write a file of
its own, for files one after the other are a file again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import DataError, ScheduleError
from benthic.sched.pipeline.simulate import Costs, Timed, Timeline
from benthic.sched.pipeline.table import Slot, parse_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benthic.sched.pipeline.table import Kind, Table


class Span(NamedTuple):
    """One slot as a rank worked through it, in seconds of the clock that all ranks share."""

    rank: int
    slot: Slot
    start: float
    end: float
    step: int = 0


def write_spans(spans: Iterable[Span]) -> str:
    """The lines of a spans file."""
    return "".join(json.dumps(span._asdict() | {"slot": str(span.slot)}) + "\n" for span in spans)


def read_spans(text: str) -> tuple[Span, ...]:
    """The spans of a file, in its order; a line without a step belongs to step 0.

    Raises:
        DataError: a line is no span; its number is named.
        ConfigError: a slot is none.
    """
    lines = enumerate(text.splitlines(), 1)
    return tuple(_span(number, line) for number, line in lines if line.strip())


def _span(number: int, line: str) -> Span:
    try:
        found = json.loads(line)
        rank, start, end = int(found["rank"]), float(found["start"]), float(found["end"])
        slot, step = str(found["slot"]), int(found.get("step", 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"line {number} of the spans, {line[:60]!r}, is none ({error!r}). {_WRITE}"
        raise DataError(message) from error
    if end < start:
        message = f"line {number} of the spans ends at {end}, before it starts at {start}. {_WRITE}"
        raise DataError(message)
    return Span(rank, parse_slot(slot), start, end, step)


_WRITE = 'Write {"rank": 0, "slot": "0F0", "start": seconds, "end": seconds} a line.'


def measured(table: Table, spans: Sequence[Span], *, step: int | None = None) -> Timeline:
    """What was measured of one `step` (None: the last) of `table`; time 0 is when the first slot starts.

    Raises:
        ScheduleError: a rank did not work through its slots of `table`, each once, in order; the first
            slot that differs is named.
    """
    wanted = max((span.step for span in spans), default=0) if step is None else step
    rows: list[list[Span]] = [[] for _ in range(table.ranks)]
    for span in spans:
        if span.step == wanted and 0 <= span.rank < table.ranks:
            rows[span.rank].append(span)
    for rank, row in enumerate(rows):
        row.sort(key=lambda span: (span.start, span.end))
        _refuse_other_slots(table, rank, row, wanted)
    zero = min((row[0].start for row in rows if row), default=0.0)
    return Timeline(
        table, tuple(tuple(Timed(s.slot, s.start - zero, s.end - zero) for s in row) for row in rows)
    )


def _refuse_other_slots(table: Table, rank: int, row: list[Span], step: int) -> None:
    planned = table.slots[rank]
    at = next((i for i, (s, p) in enumerate(zip(row, planned, strict=False)) if s.slot != p), None)
    if at is None and len(row) == len(planned):
        return
    if at is None:
        differ = f"has {len(row)} spans, but table {table.name!r} {len(planned)} slots"
    else:
        differ = f"ran {row[at].slot} as slot {at}, but table {table.name!r} says {planned[at]}"
    message = f"rank {rank} {differ} (step {step}). Draw the schedule and sizes that were run."
    raise ScheduleError(message)


def median_costs(timeline: Timeline) -> Costs:
    """Costs at which to simulate the table that was measured: the median time of each kind in each stage.

    A kind that a stage did only in overlapped pairs takes its median over the other stages, a B that none
    did alone the sum of I and W; pairs take what theirs took on average relative to the two alone.
    """
    alone: dict[Kind, dict[int, list[float]]] = {"F": {}, "B": {}, "I": {}, "W": {}}
    pairs: list[tuple[Slot, float]] = []
    for timed in (timed for row in timeline.slots for timed in row):
        took = timed.end - timed.start
        if timed.slot.second is None:
            alone[timed.slot.first.kind].setdefault(timed.slot.first.stage, []).append(took)
        else:
            pairs.append((timed.slot, took))
    part, weight = _by_stage(alone["I"], lambda _: 0.0), _by_stage(alone["W"], lambda _: 0.0)
    backward = _by_stage(alone["B"], lambda stage: part(stage) + weight(stage))
    costs = Costs(forward=_by_stage(alone["F"], lambda _: 0.0), backward=backward, input=part, weight=weight)
    if not pairs:
        return costs
    expected = sum(costs.of_slot(slot) for slot, _ in pairs)
    ratio = sum(took for _, took in pairs) / expected if expected else 1.0
    return replace(costs, overlap=lambda f, b: ratio * (f + b))


def _by_stage(times: dict[int, list[float]], otherwise: Callable[[int], float]) -> Callable[[int], float]:
    """The median of a stage, else of all stages, else what `otherwise` says."""
    if not times:
        return otherwise
    every = median(time for of_stage in times.values() for time in of_stage)
    medians = defaultdict(lambda: every, {stage: median(of_stage) for stage, of_stage in times.items()})
    return medians.__getitem__
