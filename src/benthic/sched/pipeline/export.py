"""Write a simulated table for other tools: the Perfetto trace viewer, and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.simulate import Timeline

_CATEGORY: Final = {"F": "forward", "B": "backward", "I": "backward input", "W": "backward weight"}


def perfetto(*timelines: Timeline, microseconds: float = 1000.0) -> str:
    """A trace in Chrome's JSON format, as ui.perfetto.dev and chrome://tracing open it; one thread per rank.

    Args:
        timelines: what to write, each a process of its own, all from the same time 0.
        microseconds: how long one unit of cost is; the default shows it as a millisecond.
    """
    events = [event for pid, one in enumerate(timelines) for event in _events(one, pid, microseconds)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=1) + "\n"


def _events(timeline: Timeline, pid: int, microseconds: float) -> Iterator[dict[str, object]]:
    yield _named("process_name", pid, 0, timeline.table.name)
    for rank, slots in enumerate(timeline.slots):
        yield _named("thread_name", pid, rank, f"rank {rank}")
        for timed in slots:
            actions = timed.slot.actions
            yield {
                "ph": "X",
                "pid": pid,
                "tid": rank,
                "name": str(timed.slot),
                "cat": ",".join(_CATEGORY[a.kind] for a in actions),
                "ts": timed.start * microseconds,
                "dur": (timed.end - timed.start) * microseconds,
                "args": {"stage": [a.stage for a in actions], "microbatch": [a.microbatch for a in actions]},
            }


def _named(what: str, pid: int, rank: int, name: str) -> dict[str, object]:
    return {"ph": "M", "pid": pid, "tid": rank, "name": what, "args": {"name": name}}


def as_csv(timeline: Timeline) -> str:
    """One line per action: rank, slot, kind, stage, microbatch, start, end; a pair is two lines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("rank", "slot", "kind", "stage", "microbatch", "start", "end"))
    for rank, slots in enumerate(timeline.slots):
        for index, timed in enumerate(slots):
            for action in timed.slot.actions:
                writer.writerow((rank, index, *action, timed.start, timed.end))
    return text.getvalue()
