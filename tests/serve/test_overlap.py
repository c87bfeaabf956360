"""The overlapped loop beside the plain one: the same tokens, whatever ends, fails or is preempted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import Answer, is_empty, poison, prompts, random_model, request, serve, small_engine

from benthic.errors import ConfigError
from benthic.sched.replay import replay
from benthic.sched.tempo import Tempo

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.model.network import DeepSeek
    from benthic.sched.batching import StepPlan
    from benthic.serve.engine import Engine
    from benthic.serve.messages import Generate


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    return random_model()


def mixed_requests(count: int = 14) -> list[Generate]:
    """Greedy and seeded, filtered and penalised, with log-probabilities of outputs and of prompts."""
    kinds: list[dict] = [
        {},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.1, "top_k": 7, "repetition_penalty": 1.3},
        {"logprobs": 2},
        {"temperature": 0.7, "presence_penalty": 0.8, "logprobs": 0},
        {"prompt_logprobs": 1},
        {"min_tokens": 3, "stop_token_ids": tuple(range(2, 240)), "temperature": 1.0},
        {"logit_bias": {9: 3.0}, "temperature": 1.0},
    ]
    asked = prompts(count, seed=31)
    return [
        request(str(i), prompt, seed=i, max_tokens=4 + 3 * (i % 5), **kinds[i % len(kinds)])
        for i, prompt in enumerate(asked)
    ]


def both(model: DeepSeek, **options: object) -> tuple[dict[str, Answer], dict[str, Answer]]:
    answers = []
    for overlapped in (False, True):
        engine = small_engine(model, async_scheduling=overlapped, **options)
        answers.append(serve(engine, mixed_requests()))
        assert is_empty(engine)
    return answers[0], answers[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"num_blocks": 24},
        {"max_num_batched_tokens": 9, "block_size": 3},
        {"enable_prefix_caching": False, "max_num_seqs": 2},
    ],
    ids=str,
)
def test_overlapped_steps_give_the_tokens_of_the_plain_loop(model: DeepSeek, options: dict) -> None:
    plain, overlapped = both(model, **options)
    assert any(answer.finish == "stop" for answer in plain.values())
    for name, answer in plain.items():
        assert overlapped[name].tokens == answer.tokens, name
        assert overlapped[name].finish == answer.finish
        ids = [[entry.token for entry in row] for row in answer.logprobs]
        assert [[entry.token for entry in row] for row in overlapped[name].logprobs] == ids
        first = answer.deltas[0].prompt_logprobs
        assert (first is None) == (overlapped[name].deltas[0].prompt_logprobs is None)
        if first is not None:
            found = overlapped[name].deltas[0].prompt_logprobs
            assert found is not None
            assert [[entry.token for entry in row] for row in found] == [
                [entry.token for entry in row] for row in first
            ]


def test_preempted_requests_resume_with_the_same_tokens_when_steps_overlap(model: DeepSeek) -> None:
    asked = [
        request(str(i), p, max_tokens=20) for i, p in enumerate(prompts(4, seed=8, shortest=12, longest=20))
    ]
    expected = serve(small_engine(model), asked)
    engine = small_engine(model, num_blocks=16, async_scheduling=True)
    found = serve(engine, asked)
    assert engine.stats().preemptions > 0
    assert {n: a.tokens for n, a in found.items()} == {n: a.tokens for n, a in expected.items()}


def launches(engine: Engine) -> list[tuple[str, ...]]:
    """From now on, the requests that draw a token in each step that runs."""
    run, seen = engine._runner.run, []

    def noted(plan, drafts):
        seen.append(plan.sampled_ids)
        return run(plan, drafts)

    engine._runner.run = noted
    return seen


def test_a_step_is_launched_before_the_one_before_it_lands(model: DeepSeek) -> None:
    engine = small_engine(model, async_scheduling=True)
    seen = launches(engine)
    engine.add(request("a", [3, 4, 5], max_tokens=3))
    assert engine.step() == []
    assert len(seen) == 1
    (delta,) = engine.step()
    assert len(delta.tokens) == 1
    assert len(seen) == 2


def test_a_stop_is_found_one_step_late_and_its_surplus_row_is_dropped(model: DeepSeek) -> None:
    prompt = prompts(1, seed=5, shortest=9)[0]
    tokens = serve(small_engine(model), [request("a", prompt)])["a"].tokens
    stop = tokens[3]
    engine = small_engine(model, async_scheduling=True)
    seen = launches(engine)
    answer = serve(engine, [request("a", prompt, stop_token_ids=(stop,))])["a"]
    assert answer.tokens == tokens[: tokens.index(stop) + 1]
    assert answer.finish == "stop"
    assert len(seen) == len(answer.tokens) + 1
    assert is_empty(engine)


def test_a_length_is_known_ahead_and_costs_no_surplus_row(model: DeepSeek) -> None:
    engine = small_engine(model, async_scheduling=True)
    seen = launches(engine)
    serve(engine, [request("a", [3, 4, 5], max_tokens=6)])
    assert len(seen) == 6


def test_an_id_used_again_at_once_does_not_get_the_row_of_its_predecessor(model: DeepSeek) -> None:
    first, second = prompts(2, seed=5, shortest=9)
    alone = serve(small_engine(model), [request("a", second, max_tokens=5)])["a"].tokens
    stop = serve(small_engine(model), [request("a", first)])["a"].tokens[2]
    engine = small_engine(model, async_scheduling=True)
    engine.add(request("a", first, stop_token_ids=(stop,)))
    while not (found := engine.step()) or found[-1].finish_reason is None:
        pass
    assert engine.has_work, "the surplus row is in flight"
    assert serve(engine, [request("a", second, max_tokens=5)])["a"].tokens == alone
    assert is_empty(engine)


def test_an_aborted_request_says_nothing_more_though_its_row_is_in_flight(model: DeepSeek) -> None:
    engine = small_engine(model, async_scheduling=True)
    asked = [request(str(i), p, max_tokens=12) for i, p in enumerate(prompts(3, seed=1))]
    expected = serve(small_engine(model), asked)

    def at_step(step: int) -> None:
        if step == 4:
            engine.abort("1")

    answers = serve(engine, asked, at_step=at_step)
    assert answers["1"].finish is None
    assert [answers[name].tokens for name in "02"] == [expected[name].tokens for name in "02"]
    assert is_empty(engine)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.1}])
def test_a_distribution_that_is_not_finite_ends_one_request_and_feeds_no_invalid_token(
    model: DeepSeek, how: dict
) -> None:
    engine = small_engine(model, async_scheduling=True)
    poison(engine, "sick")
    healthy = request("healthy", prompts(1, seed=2)[0])
    expected = serve(small_engine(model), [healthy])["healthy"].tokens
    answers = serve(engine, [request("sick", [3, 4, 5], **how), healthy])
    assert (answers["sick"].finish, answers["sick"].tokens) == ("error", [])
    assert answers["healthy"].tokens == expected
    assert is_empty(engine)


def test_a_step_that_cannot_be_launched_ends_its_requests_after_the_step_before_has_landed(
    model: DeepSeek, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model, async_scheduling=True)
    run, calls = engine._runner.run, []

    def fail_once(plan: object, drafts: object) -> object:
        calls.append(plan)
        if len(calls) == 3:
            msg = "tried to allocate 20 GiB"
            raise torch.OutOfMemoryError(msg)
        return run(plan, drafts)

    monkeypatch.setattr(engine._runner, "run", fail_once)
    answers = serve(engine, [request(str(i), p) for i, p in enumerate(prompts(3, seed=2))])
    assert [answer.finish for answer in answers.values()] == ["error"] * 3
    assert [len(answer.tokens) for answer in answers.values()] == [2] * 3
    assert is_empty(engine)
    after = request("after", prompts(1, seed=3)[0])
    assert serve(engine, [after])["after"].tokens == serve(small_engine(model), [after])["after"].tokens


def test_a_recorded_overlapped_run_replays_to_the_same_plans(model: DeepSeek, tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    engine = small_engine(model, async_scheduling=True, num_blocks=24, record=str(file))
    serve(engine, mixed_requests())
    replayed = replay(file.read_text().splitlines())
    assert replayed.totals.steps == engine.stats().steps
    assert replayed.requests == 14


class Heard(Tempo):
    """Notes what it is told; the next plan is due when a test says so."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.told: list[str] = []
        self.due_s = 0.0

    def launched(self, plan: StepPlan, began_s: float, now: float) -> None:
        assert began_s < now
        self.told.append(f"launched {plan.number}")
        super().launched(plan, began_s, now)

    def waits(self, now: float) -> None:
        self.told.append("waits")
        super().waits(now)

    def landed(self, now: float) -> None:
        self.told.append("landed")
        super().landed(now)

    def due(self) -> float:
        return self.due_s


def test_late_planning_changes_when_a_step_is_planned_and_no_token(model: DeepSeek) -> None:
    engine = small_engine(model, async_scheduling=True, late_planning_ms=2.0)
    engine._tempo = heard = Heard()
    answers = serve(engine, mixed_requests())
    plain = serve(small_engine(model, async_scheduling=True), mixed_requests())
    assert {name: answer.tokens for name, answer in answers.items()} == {
        name: answer.tokens for name, answer in plain.items()
    }
    launches = [told for told in heard.told if told.startswith("launched")]
    assert launches == [f"launched {number}" for number in range(engine.stats().steps)]
    assert heard.told.count("waits") == heard.told.count("landed") == len(launches)
    assert heard.told[:5] == ["launched 0", "launched 1", "waits", "landed", "launched 2"]
    heard.due_s = engine._clock() + 100.0
    assert 90.0 < engine.patience_s < 100.0


def test_a_failed_step_is_heard_of_too(model: DeepSeek) -> None:
    engine = small_engine(model, async_scheduling=True, late_planning_ms=2.0)
    engine._runner.run = out_of_memory  # type: ignore[method-assign]
    engine.add(request("a", (3, 4, 5)))
    ends = []
    while engine.has_work or engine._launched:
        ends += [delta.finish_reason for delta in engine.step()]
    assert ends == ["error"]
    assert not engine._tempo._departed  # type: ignore[union-attr]


def out_of_memory(*_: object) -> None:
    msg = "no room"
    raise torch.OutOfMemoryError(msg)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"async_scheduling": False, "late_planning_ms": 2.0}, "late_planning_ms = 2.0 waits while"),
        ({"late_planning_ms": 2.0}, "late_planning_ms = 2.0 waits while"),
        ({"async_scheduling": True, "late_planning_ms": 0.0}, "margin_s = 0.0"),
    ],
)
def test_late_planning_that_cannot_be_is_refused(model: DeepSeek, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_engine(model, **options)
