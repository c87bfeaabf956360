"""A recording replays to identical plans, and says where it does not."""

from __future__ import annotations

import json

import pytest

from benthic.errors import DataError, ServeError
from benthic.sched.batching import BatchingConfig, Request
from benthic.sched.replay import RecordingScheduler, replay


def recorded(*, counted: bool = False) -> list[str]:
    """A run with arrivals, an abort, a failed plan, preemption and a cache reset."""
    lines: list[str] = []
    config = BatchingConfig(
        num_blocks=8,
        block_size=4,
        max_model_len=24,
        max_num_seqs=3,
        max_num_batched_tokens=12,
        eos_token_ids=(2,),
        counted=counted,
    )
    sched = RecordingScheduler(config, lines.append)
    for i in range(6):
        prompt = None if counted else tuple(range(3 + i))
        request = Request(
            request_id=str(i), prompt=prompt, prompt_len=3 + i, max_tokens=9, stop_token_ids=(9,)
        )
        sched.add(request, 0.1 * i)
    now = 1.0
    while sched.has_work:
        plan = sched.plan(now)
        if now == 3.0:
            sched.abort("3", now)
        if now == 5.0:
            sched.fail(plan, now)
        elif counted:
            sched.commit_counts(plan, now)
        else:
            sched.commit(plan, [(int(now) % 11 + 3,)] * len(plan.sampled_ids), now)
        now += 1.0
    sched.reset_prefix_cache()
    return lines


@pytest.mark.parametrize("counted", [False, True])
def test_a_recording_replays_with_equal_totals(counted: bool) -> None:  # noqa: FBT001
    lines = recorded(counted=counted)
    replayed = replay(lines)
    assert replayed.requests == replayed.totals.finished == 6
    assert replayed.plans == sum('"plan"' in line for line in lines)
    assert replayed.config.counted is counted
    kinds = {next(iter(json.loads(line))) for line in lines[1:]}
    assert {"add", "plan", "abort", "fail", "reset_prefix_cache"} <= kinds


def test_an_altered_recording_is_caught_at_the_line_that_differs() -> None:
    lines = recorded()
    number = next(i for i, line in enumerate(lines) if line.startswith('{"commit"'))
    event = json.loads(lines[number])
    event["rows"] = [[9]] * len(event["rows"])  # a stop token nobody drew
    lines[number] = json.dumps(event)
    with pytest.raises(ServeError, match=rf"line {number + 1} of the recording: ends of plan 0 was"):
        replay(lines)


def test_another_configuration_is_caught_at_the_first_plan_it_changes() -> None:
    lines = recorded()
    header = json.loads(lines[0])
    header["config"]["max_num_batched_tokens"] = 4
    with pytest.raises(ServeError, match=r"plan num_tokens was 7, but the replay gives 4"):
        replay([json.dumps(header), *lines[1:]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"commit":0,"rows":[[', "line 8 of the recording is not JSON"),
        ("[]", "line 8 of the recording is a list"),
        ("{}", "is a 'nothing'"),
        ('{"dance":1}', "is a 'dance', but only"),
        ('{"add":{"request_id":"x","promt":[1]},"now":0}', "lacks or misspells a field"),
        ('{"commit":77,"rows":[],"now":0}', "lacks or misspells a field"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replay([*recorded()[:7], line])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "version None"),
        (['{"version":99}'], "version 99, but this replay reads version 2"),
        (['{"version":2,"config":{"num_block":3}}'], "no scheduler configuration"),
    ],
)
def test_a_recording_without_its_configuration_is_refused(header: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replay(header)
