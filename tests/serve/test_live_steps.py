"""What `benchmarks/live_steps.py` says of recordings of two instances whose clock moves by hand."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from small_engine import request
from small_fleet import pair, replace_params

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from small_fleet import Pair

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "live_steps.py"
PROMPT = list(range(20, 51))
PARTS = {"to the decode side": 1, "to a plan": 2, "on the way": 4, "to a step": 8, "the step": 16, "all": 31}


@dataclass
class Clock:
    """Milliseconds that pass when they are told to."""

    ms: float = 0.0

    def __call__(self) -> float:
        return self.ms / 1e3


class Held:
    """A copy that has not come before `open`."""

    def __init__(self) -> None:
        self.open = False

    def ended(self) -> bool:
        return self.open

    def wait(self) -> None:
        self.open = True


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, imported as it is run: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("live_steps", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "live_steps", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of engines and of what they record."""
    clock = Clock()
    monkeypatch.setattr("benthic.serve.build.time", SimpleNamespace(monotonic=clock))
    return clock


def recorded(folder: Path, clock: Clock, **options: object):
    """Two instances of that clock that record."""
    record = {name: {"record": str(folder / f"{name}.jsonl")} for name in ("prefill-0", "decode-1")}
    return pair(
        clock=clock,
        enable_prefix_caching=False,
        owner=record["prefill-0"],
        reader=record["decode-1"] | options,
    )


def held(both: Pair) -> list[Held]:
    """Copies of the reader wait to be let go."""
    made, enter = [], both.reader._reader._enter

    def entered(owner, welcome) -> None:
        enter(owner, welcome)
        start = owner.source.start

        def begin(theirs, ours) -> Held:
            start(theirs, ours)
            made.append(Held())
            return made[-1]

        owner.source.start = begin

    both.reader._reader._enter = entered
    return made


def test_each_part_of_a_hand_over_is_what_passed_in_it(
    script: ModuleType, clock: Clock, tmp_path: Path
) -> None:
    asked = request("a", PROMPT, max_tokens=3)
    with recorded(tmp_path, clock) as both:
        made, pulls = held(both), both.reader._scheduler.pulls
        clock.ms = 100.0
        first = both.prefill(asked)
        clock.ms += PARTS["to the decode side"]
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        clock.ms += PARTS["to a plan"]
        while not made:
            both.reader.step()
        clock.ms += PARTS["on the way"]
        made[0].open = True
        while "a" in pulls:
            both.reader._finish_pulls()
        clock.ms += PARTS["to a step"]

        def step(plan) -> None:
            clock.ms += PARTS["the step"] if plan.prefills else 1

        both.reader.engine.observers.append(step)
        while both.reader.has_work:
            both.reader.step()
    (row,) = script.hand_over_rows([script.read(path) for path in sorted(tmp_path.glob("*.jsonl"))])
    assert row["hand_overs"] == 1
    assert row["decodes"] == 1
    assert row["decode_steps"] == [1, 1]
    assert {part: row[f"{part}_ms"][0] for part in PARTS} == pytest.approx(PARTS)


@pytest.mark.parametrize("options", [{"async_scheduling": False}, {"async_scheduling": True}])
def test_steps_are_sorted_by_what_they_hold_and_idleness_is_no_step(
    script: ModuleType, clock: Clock, tmp_path: Path, options: dict
) -> None:
    with recorded(tmp_path, clock, **options) as both:
        engine = both.reader.engine

        def step(plan) -> None:
            clock.ms += 40.0 if plan.prefills else 3.0 if plan.decode_ids else 0.0

        engine.observers.append(step)
        for start in (20, 40):
            engine.add(request(f"r{start}", range(start, start + 20), max_tokens=6))
            while engine.has_work:
                both.reader.step()
            clock.ms += 500.0
    steps = script.read(tmp_path / "decode-1.jsonl")
    (decodes,) = script.step_rows(steps, lambda loads: 1e-3 * loads[0].tokens)
    assert (decodes["prompt_tokens"], decodes["decodes"]) == (0, 1)
    assert decodes["steps"] == 10
    assert decodes["live_ms"][0] == pytest.approx(3.0)
    assert decodes["foretold_ms"] == [1.0, 1.0]
    assert decodes["live_over_foretold"] == pytest.approx(3.0)
    assert [row.took_s for row in steps.steps].count(None) == 2


def test_a_prompt_that_waited_for_the_step_before_is_a_step_of_its_own_kind(
    script: ModuleType, clock: Clock, tmp_path: Path
) -> None:
    with recorded(tmp_path, clock) as both:
        engine = both.owner.engine

        def step(plan) -> None:
            clock.ms += sum(chunk.length for chunk in plan.prefills)

        engine.observers.append(step)
        for name in "abc":
            both.owner.add(replace_params(request(name, range(20, 84), max_tokens=1), hold=True))
        while engine.has_work:
            both.owner.step()
    (row,) = script.step_rows(script.read(tmp_path / "prefill-0.jsonl"), None)
    assert (row["prompt_tokens"], row["decodes"], row["steps"]) == (64, 0, 2)
    assert row["live_ms"] == [64.0, 64.0]
