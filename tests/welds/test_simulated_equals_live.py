"""Weld: a simulation with the step times of a live run makes the same batches, step for step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from small_engine import prompts, request, serve, small_engine

from benthic.plan.serving.cluster import Cluster
from benthic.plan.serving.demand import Ask
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.steps import Measured
from benthic.sched.plans import BatchingConfig
from benthic.sched.replay import RecordingScheduler

if TYPE_CHECKING:
    from pathlib import Path


def record(path: Path) -> list[dict[str, Any]]:
    """A live run: more requests than fit at once, some of them late, all of them full length."""
    engine = small_engine(
        num_blocks=40,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
        record=str(path),
    )
    late = [request(f"late{i}", p, max_tokens=6 + i) for i, p in enumerate(prompts(6, seed=2))]

    def at_step(step: int) -> None:
        if step in {4, 5, 9}:
            engine.add(late.pop())
            engine.add(late.pop())

    serve(
        engine,
        [request(f"r{i}", p, max_tokens=5 + 3 * i) for i, p in enumerate(prompts(8, seed=1))],
        at_step=at_step,
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(events: list[dict[str, Any]]) -> list[tuple[int, int, list[list[int]]]]:
    plans = [event["plan"] for event in events if "plan" in event and event["plan"]["number"] >= 0]
    return [(p["num_tokens"], p["decodes"], [chunk[1:] for chunk in p["prefills"]]) for p in plans]


def test_step_times_of_a_live_run_bring_back_its_batches(tmp_path: Path):
    live = record(tmp_path / "run.jsonl")
    adds = [event for event in live if "add" in event]
    starts = [event["now"] for event in live if "plan" in event]
    ends = [event["now"] for event in live if "commit" in event]
    step_s = [after - before for before, after in zip(starts, [*starts[1:], ends[-1]], strict=True)]
    # what came before the first plan was there when it was made
    asks = [
        Ask(max(event["now"], starts[0]), len(event["add"]["prompt"]), event["add"]["max_tokens"])
        for event in adds
    ]
    config = live[0]["config"] | {"counted": True, "eos_token_ids": ()}
    lines: list[str] = []
    spec = GroupSpec(
        batching=BatchingConfig(**config),
        step=Measured(seconds=step_s),
        depth=1,
        make=lambda config: RecordingScheduler(config, lines.append),
    )
    outcome = Cluster([spec]).play(asks)
    assert len(outcome.served) == 14
    simulated = batches([json.loads(line) for line in lines])
    assert len(simulated) > 20
    assert simulated == batches(live)
