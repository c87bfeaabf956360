"""What steps and hand-overs of live instances took, beside what the planner foretells for the same plans.

Reads what `disaggregate.py --record` (or `benthic serve --record`) left: every instance's calls to its
scheduler. They are replayed, so that each plan is known in full. A step's live time is from the end of the
step before to its own, where the instance had work all along; the host's part is from the beginning of a plan
to the end of its launch, and a step for whose end the host did not wait was late because of the host. A
hand-over goes from the prompt's first token to the next one, the end of the decode side's first step.

    python benchmarks/disaggregate.py --workloads prefill-heavy --fleets 1P1D --record steps
    python benchmarks/live_steps.py steps/1P1D --engine benthic --hardware h200
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final

from provenance import write_result

from benthic.plan.cost import machine as machines
from benthic.plan.serving import engines
from benthic.plan.serving.layout import ServingLayout
from benthic.plan.serving.priced import PricedStep
from benthic.plan.serving.steps import load_of
from benthic.sched.replay import replay
from benthic.spec import presets

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benthic.plan.serving.steps import StepTime
    from benthic.sched.plans import StepPlan

Row = dict[str, Any]

LATE_S: Final = 0.0001
"""A host that waits less for a step than this has not seen its end in time."""

FIRST_S: Final = 1.0
"""Steps that end so soon after the instance was idle are counted once more: clocks may fall under load."""

PARTS: Final = {
    "to the decode side": ("first_token", "added"),
    "to a plan": ("added", "pulling"),
    "on the way": ("pulling", "pulled"),
    "to a step": ("pulled", "planned"),
    "the step": ("planned", "ended"),
    "all": ("first_token", "ended"),
}
"""A hand-over by its moments: the prompt's step ended; its request came to the decode side's scheduler; its
pull was planned there, and was back; its first step was planned there, and ended."""


@dataclass
class Step:
    """A committed plan: seconds since the step before (None after idleness), of the host, and of its wait."""

    plan: StepPlan
    took_s: float | None
    host_s: float
    waited_s: float
    early: bool


@dataclass
class Recording:
    """One instance: its steps, their ends, and each request's moments in seconds."""

    name: str
    steps: list[Step] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    moments: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    decodes: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Both tables, printed and written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", help="a name or a file; nothing is foretold without it")
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--model", default="moonlight-16b-a3b")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    step = None
    if words.engine is not None:
        machine, engine = machines.get(words.hardware), engines.get(words.engine)
        step = PricedStep(presets.get(words.model), ServingLayout(), machine, engine)
    recordings = [read(path) for path in sorted(words.folder.glob("*.jsonl"))]
    found = {
        "steps": [row for each in recordings for row in step_rows(each, step)],
        "hand_overs": hand_over_rows(recordings),
    }
    for rows in found.values():
        print(table(rows), end="\n\n")
    asked = {"engine": words.engine, "hardware": words.hardware, "model": words.model}
    print(write_result("live_steps", found, out=words.out, **asked))


def read(path: Path) -> Recording:
    """One instance's recording, named after its file. Raises: DataError, ServeError; see `replay`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    plans: dict[int, StepPlan] = {}
    replay(lines, lambda plan: plans.update({plan.number: plan}))
    return Reader(path.stem, plans).read(map(json.loads, lines[1:]))


class Reader:
    """Goes through the events of one recording in order."""

    def __init__(self, name: str, plans: dict[int, StepPlan]) -> None:
        self.found = Recording(name)
        self._plans = plans
        self._asked: dict[str, Row] = {}
        self._planned: dict[int, float] = {}
        self._launched: dict[int, float] = {}
        self._newest_s = self._began_s = -math.inf
        self._transfers: dict[int, str] = {}

    def read(self, events: Iterable[Row]) -> Recording:
        """All of them."""
        for event in events:
            kind = next(iter(event))
            if kind == "add":
                self._asked[event["add"]["request_id"]] = event
                self._mark(event["add"]["request_id"], "added", event["now"])
            elif kind == "plan":
                self._planned[event["plan"]["number"]] = event["now"]
            elif kind == "launched":
                self._launched[event["launched"]] = self._newest_s = event["now"]
            elif kind == "transfers":
                for number, request_id, _, _, last in event["transfers"]:
                    self._mark(request_id, "pulling", event["at"])
                    self._transfers |= {number: request_id} if last else {}
            elif kind == "pulled" and event["pulled"] in self._transfers:
                self._mark(self._transfers[event["pulled"]], "pulled", event["at"])
            elif kind == "commit":
                self._commit(event["commit"], event["now"])
        return self.found

    def _mark(self, request_id: str, moment: str, seconds: float) -> None:
        """A moment of a request, if it is the first of its kind."""
        self.found.moments[request_id].setdefault(moment, seconds)

    def _commit(self, number: int, end_s: float) -> None:
        if number < 0:
            return
        plan, planned_s = self._plans[number], self._planned.pop(number)
        launched_s = self._launched.pop(number)
        for chunk in plan.prefills:
            moments = self.found.moments[chunk.request_id]
            if chunk.samples:
                moments["first_token"] = end_s
            if "ended" not in moments:
                moments |= {"planned": planned_s, "ended": end_s}
                self.found.decodes[chunk.request_id] = load_of(plan).decodes
        before = self.found.ends[-1] if self.found.ends else -math.inf
        busy = self._was_busy(plan, before)
        self._began_s = self._began_s if busy else end_s
        self.found.ends.append(end_s)
        self.found.steps.append(
            Step(
                plan,
                took_s=end_s - before if busy else None,
                host_s=launched_s - planned_s,
                waited_s=end_s - self._newest_s,
                early=end_s - self._began_s < FIRST_S,
            )
        )

    def _was_busy(self, plan: StepPlan, since_s: float) -> bool:
        """Whether something of a plan could have been computed since then: a pull could not."""
        asked = [self._asked[chunk.request_id] for chunk in plan.prefills]
        own = [each["now"] for each in asked if not each["add"].get("pull")]
        return bool(plan.decode_ids) or min(own, default=math.inf) <= since_s


def step_rows(recording: Recording, step: StepTime | None) -> list[Row]:
    """Steps by their prompt tokens and decode rows, each rounded up to a power of two."""
    kinds: dict[tuple[int, int], list[Step]] = defaultdict(list)
    for each in recording.steps:
        load = load_of(each.plan)
        if each.took_s is not None:
            kinds[rounded(load.prefill_tokens), rounded(load.decodes)].append(each)
    return [
        {"instance": recording.name, "prompt_tokens": tokens, "decodes": decodes, **summed(steps, step)}
        for (tokens, decodes), steps in sorted(kinds.items())
    ]


def summed(steps: Sequence[Step], step: StepTime | None) -> Row:
    """Live and foretold times of steps of one kind, in ms."""
    took = [each.took_s or 0.0 for each in steps]
    row: Row = {"steps": len(steps), "live_ms": in_ms(took)}
    if step is not None:
        told = [step([load_of(each.plan)]) for each in steps]
        row["foretold_ms"] = in_ms(told)
        row["live_over_foretold"] = round(median(a / b for a, b in zip(took, told, strict=True)), 3)
    first = [each.took_s or 0.0 for each in steps if each.early]
    return row | {
        "first_second_ms": in_ms(first),
        "host_ms": in_ms([each.host_s for each in steps]),
        "waited_ms": in_ms([each.waited_s for each in steps]),
        "host_late": round(sum(each.waited_s < LATE_S for each in steps) / len(steps), 3),
    }


def hand_over_rows(recordings: Sequence[Recording]) -> list[Row]:
    """Hand-overs by the rows of the decode side's first step, in ms; `decode_steps` ended meanwhile."""
    firsts = {
        name: moments["first_token"]
        for each in recordings
        for name, moments in each.moments.items()
        if "first_token" in moments and "pulled" not in moments
    }
    kinds: dict[int, list[Row]] = defaultdict(list)
    for each in recordings:
        for name, moments in each.moments.items():
            if name in firsts and "pulled" in moments and "ended" in moments:
                known = {**moments, "first_token": firsts[name]}
                parts = {part: known[end] - known[start] for part, (start, end) in PARTS.items()}
                meanwhile = sum(known["first_token"] < end <= known["ended"] for end in each.ends)
                kinds[rounded(each.decodes[name])].append(parts | {"steps": meanwhile})
    return [
        {
            "decodes": decodes,
            "hand_overs": len(found),
            "decode_steps": [median(each["steps"] for each in found), max(each["steps"] for each in found)],
            **{f"{part}_ms": in_ms([each[part] for each in found]) for part in PARTS},
        }
        for decodes, found in sorted(kinds.items())
    ]


def rounded(count: int) -> int:
    """Up to a power of two; 0 stays."""
    return 1 << (count - 1).bit_length() if count else 0


def in_ms(seconds: Sequence[float]) -> list[float] | None:
    """Median and 90th percentile in ms; None of nothing."""
    if not seconds:
        return None
    tenths = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    return [round(1e3 * median(seconds), 3), round(1e3 * tenths[-1], 3)]


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal; pairs are the median and the 90th percentile."""
    if not rows:
        return "nothing"
    names = list(rows[0])
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(names))]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def shown(value: object) -> str:
    """A cell."""
    if isinstance(value, list):
        return " / ".join(f"{each:.2f}" for each in value)
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
