"""Weld: a recorded run of the live engine replays to identical plans."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from small_engine import is_empty, poison, prompts, request, serve, small_engine

from benthic.errors import ServeError
from benthic.sched.replay import replay

if TYPE_CHECKING:
    from pathlib import Path


def record(path: Path) -> list[str]:
    """A run with everything in it: shared prefixes, chunks, preemptions, stops, aborts, errors."""
    engine = small_engine(
        eos=tuple(range(5, 25)), num_blocks=22, max_num_seqs=6, max_num_batched_tokens=24, record=str(path)
    )
    shared = list(range(10, 30))
    late = [
        request(f"late{i}", shared + tail, max_tokens=6)
        for i, tail in enumerate(prompts(4, seed=2, longest=9))
    ]

    def at_step(step: int) -> None:
        if step == 4:
            for each in late:
                engine.add(each)
        if step == 6:
            engine.abort("r3")
            engine.abort("r11")
            engine.abort("nobody")

    requests = [
        request(
            f"r{i}",
            prompt,
            max_tokens=5 + 3 * i,
            temperature=1.0,
            ignore_eos=i % 2 == 0,
            seed=i,
            priority=i % 3,
        )
        for i, prompt in enumerate(prompts(12, seed=1))
    ]
    requests.append(request("sick", shared, max_tokens=4))
    poison(engine, "sick")
    answers = serve(engine, [request("first", shared, max_tokens=2), *requests], at_step=at_step)
    assert is_empty(engine)
    assert answers["sick"].finish == "error"
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert "stop" in {answer.finish for answer in answers.values() if answer.deltas}
    return path.read_text().splitlines()


def test_a_recorded_live_run_replays_to_identical_plans(tmp_path: Path) -> None:
    lines = record(tmp_path / "run.jsonl")
    kinds = {next(iter(json.loads(line))) for line in lines[1:]}
    assert kinds >= {"add", "plan", "commit", "abort"}
    replayed = replay(lines)
    assert replayed.plans == sum("plan" in json.loads(line) for line in lines)
    assert replayed.requests == 18


def test_a_replay_notices_one_altered_token(tmp_path: Path) -> None:
    lines = record(tmp_path / "run.jsonl")
    at = next(i for i, line in enumerate(lines) if '"late0"' in line)
    event = json.loads(lines[at])
    event["add"]["prompt"] = [299] * 40
    lines[at] = json.dumps(event)
    with pytest.raises(ServeError, match=r"line \d+ of the recording"):
        replay(lines)
