"""The engine: requests in, deltas out, whatever else is going on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import (
    EOS,
    NANO,
    Answer,
    is_empty,
    poison,
    prompts,
    random_model,
    request,
    serve,
    small_engine,
)

from benthic.errors import AdmissionError, CheckpointError, ConfigError
from benthic.model.checkpoint import save_pretrained
from benthic.model.local import packed_sockets, plain_linear
from benthic.serve.engine import Engine
from benthic.serve.options import EngineOptions
from benthic.serve.runner import Runner
from benthic.serve.weights import eos_token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.model.network import DeepSeek


def packed_logits(model: DeepSeek, tokens: list[int]) -> torch.Tensor:
    """The training forward of one sequence: logits of every position."""
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    sockets = packed_sockets(bounds, len(tokens), n_routed_experts=model.config.n_routed_experts)
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), sockets)
        return model.logits(hidden.hidden_TD, plain_linear)


def greedy(model: DeepSeek, prompt: list[int], count: int) -> list[int]:
    """The slow way: one packed forward a token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(packed_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    return random_model()


def test_greedy_tokens_are_those_of_one_packed_forward_a_token(model: DeepSeek) -> None:
    asked = prompts(6, seed=3)
    answers = serve(small_engine(model), [request(str(i), p) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert answers[str(i)].tokens == greedy(model, prompt, 8)


def sampled(model: DeepSeek, **options: object) -> dict[str, list[int]]:
    engine = small_engine(model, **options)
    asked = [
        request(str(i), p, temperature=0.9, top_p=0.95, seed=i, max_tokens=12)
        for i, p in enumerate(prompts(10, seed=4))
    ]
    answers = serve(engine, asked)
    assert is_empty(engine)
    assert {answer.finish for answer in answers.values()} == {"length"}
    return {name: answer.tokens for name, answer in answers.items()}


def test_a_temperature_that_float32_rounds_to_zero_is_greedy(model: DeepSeek) -> None:
    asked = [request(str(i), [4, 5, 6], temperature=t) for i, t in enumerate((0.0, 5e-324, 1e-46))]
    answers = serve(small_engine(model), asked)
    assert answers["1"].tokens == answers["2"].tokens == answers["0"].tokens


def test_seeded_tokens_do_not_depend_on_batch_chunks_blocks_or_preemption(model: DeepSeek) -> None:
    expected = sampled(model, max_num_seqs=1)
    assert len({tuple(tokens) for tokens in expected.values()}) == 10
    assert sampled(model) == expected
    assert sampled(model, max_num_batched_tokens=9, block_size=3) == expected
    assert sampled(model, num_blocks=16, max_num_batched_tokens=16) == expected
    assert sampled(model, enable_prefix_caching=False) == expected


def test_preempted_request_resumes_with_the_same_tokens(model: DeepSeek) -> None:
    engine = small_engine(model, num_blocks=16)
    asked = [
        request(str(i), p, max_tokens=20) for i, p in enumerate(prompts(4, seed=8, shortest=12, longest=20))
    ]
    answers = serve(engine, asked)
    assert engine.stats().preemptions > 0
    for each in asked:
        assert answers[each.request_id].tokens == greedy(model, list(each.prompt), 20)


def test_requests_without_a_seed_get_different_ones_and_the_engine_seed_repeats_them(model: DeepSeek) -> None:
    def run(seed: int) -> list[list[int]]:
        asked = [request(str(i), [4, 5, 6], temperature=1.5, max_tokens=10) for i in range(4)]
        return [answer.tokens for answer in serve(small_engine(model, seed=seed), asked).values()]

    first = run(0)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert run(0) == first
    assert run(1) != first


def test_a_stop_token_ends_the_request_and_is_named(model: DeepSeek) -> None:
    prompt = prompts(1, seed=5, shortest=9)[0]
    tokens = greedy(model, prompt, 8)
    stop = tokens[3]
    first = tokens.index(stop)
    answer = serve(small_engine(model), [request("a", prompt, stop_token_ids=(stop,))])["a"]
    assert answer.tokens == tokens[: first + 1]
    assert (answer.finish, answer.deltas[-1].stop_token) == ("stop", stop)


def test_eos_ends_a_request_unless_it_ignores_it(model: DeepSeek) -> None:
    prompt = prompts(1, seed=5, shortest=9)[0]
    eos = greedy(model, prompt, 1)[0]
    ended = serve(small_engine(model, eos=(eos,)), [request("a", prompt, ignore_eos=False)])["a"]
    assert (ended.tokens, ended.finish, ended.deltas[-1].stop_token) == ([eos], "stop", eos)
    went_on = serve(small_engine(model, eos=(eos,)), [request("a", prompt)])["a"]
    assert (len(went_on.tokens), went_on.finish) == (8, "length")


def test_min_tokens_keeps_eos_from_being_drawn_too_early(model: DeepSeek) -> None:
    prompt = prompts(1, seed=5, shortest=9)[0]
    eos = greedy(model, prompt, 1)[0]
    engine = small_engine(model, eos=(eos,))
    answer = serve(engine, [request("a", prompt, ignore_eos=False, min_tokens=3, max_tokens=8)])["a"]
    assert len(answer.tokens) >= 3
    assert eos not in answer.tokens[:3]


def test_a_sequence_ends_at_the_longest_length(model: DeepSeek) -> None:
    answer = serve(small_engine(model, max_model_len=20), [request("a", range(2, 17), max_tokens=100)])["a"]
    assert (len(answer.tokens), answer.finish) == (5, "length")


def test_logprobs_are_those_of_the_packed_forward(model: DeepSeek) -> None:
    prompt = prompts(1, seed=6, shortest=12)[0]
    asked = [request("a", prompt, temperature=0.7, seed=3, logprobs=4), request("b", prompt, seed=1)]
    answer = serve(small_engine(model), asked)["a"]
    raw = packed_logits(model, prompt + answer.tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    assert len(answer.logprobs) == len(answer.tokens) == 8
    for row, token, logprobs_V in zip(answer.logprobs, answer.tokens, raw, strict=True):
        order = logprobs_V.argsort(descending=True).tolist()
        assert [entry.token for entry in row] == [token, *order[:4]]
        assert [entry.rank for entry in row] == [order.index(token) + 1, 1, 2, 3, 4]
        expected = [logprobs_V[entry.token].item() for entry in row]
        assert [entry.logprob for entry in row] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("budget", [8, 11, 64])
def test_prompt_logprobs_come_once_for_every_position_but_the_first(model: DeepSeek, budget: int) -> None:
    prompt = prompts(1, seed=7, shortest=30)[0]
    engine = small_engine(model, max_num_batched_tokens=budget)
    serve(engine, [request("warm", prompt)])  # a cached prefix must not swallow positions
    answers = serve(
        engine, [request("a", prompt, prompt_logprobs=2), *(request(f"x{i}", prompt) for i in range(3))]
    )
    first, *rest = answers["a"].deltas
    assert all(delta.prompt_logprobs is None for delta in rest)
    assert all(d.prompt_logprobs is None for name in ("x0", "x1", "x2") for d in answers[name].deltas)
    raw = packed_logits(model, prompt).log_softmax(-1)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] == ()
    assert len(first.prompt_logprobs) == len(prompt)
    for position in range(1, len(prompt)):
        row, expected = first.prompt_logprobs[position], raw[position - 1]
        best = expected.argsort(descending=True)[:2].tolist()
        assert [entry.token for entry in row] == [prompt[position], *best]
        assert row[0].logprob == pytest.approx(expected[prompt[position]].item(), abs=1e-4)


def test_max_tokens_zero_reads_the_prompt_and_generates_nothing(model: DeepSeek) -> None:
    answer = serve(small_engine(model), [request("a", range(2, 12), max_tokens=0, prompt_logprobs=0)])["a"]
    assert (answer.tokens, answer.finish) == ([], "length")
    (delta,) = answer.deltas
    assert delta.prompt_logprobs is not None
    assert [len(row) for row in delta.prompt_logprobs] == [0] + [1] * 9


def test_cached_tokens_are_reported_with_the_first_delta(model: DeepSeek) -> None:
    engine = small_engine(model)
    prompt = prompts(1, seed=9, shortest=21)[0]
    cold = serve(engine, [request("a", prompt)])["a"]
    warm = serve(engine, [request("b", prompt)])["b"]
    assert cold.deltas[0].cached_tokens == 0
    assert warm.deltas[0].cached_tokens == (len(prompt) - 1) // 4 * 4
    assert all(delta.cached_tokens == 0 for delta in warm.deltas[1:])
    assert warm.tokens == cold.tokens
    assert engine.stats().prefix_cache_hits == warm.deltas[0].cached_tokens


def test_an_aborted_request_says_nothing_more_and_leaves_no_block(model: DeepSeek) -> None:
    engine = small_engine(model)

    def at_step(step: int) -> None:
        if step == 3:
            engine.abort("1")
            engine.abort("unknown")

    asked = [request(str(i), p, max_tokens=20) for i, p in enumerate(prompts(3, seed=1))]
    answers = serve(engine, asked, at_step=at_step)
    assert len(answers["1"].tokens) <= 2
    assert answers["1"].finish is None
    assert [answers[name].finish for name in "02"] == ["length", "length"]
    assert answers["2"].tokens == greedy(model, list(asked[2].prompt), 20)
    assert is_empty(engine)


def test_an_id_can_be_used_again_after_its_request_ended(model: DeepSeek) -> None:
    engine = small_engine(model)
    first = serve(engine, [request("a", [5, 6, 7], repetition_penalty=1.5)])["a"]
    second = serve(engine, [request("a", [5, 6, 7], repetition_penalty=1.5)])["a"]
    assert first.tokens == second.tokens


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.1}])
def test_a_request_whose_distribution_is_not_finite_ends_alone(model: DeepSeek, how: dict) -> None:
    engine = small_engine(model)
    poison(engine, "sick")
    healthy = request("healthy", prompts(1, seed=2)[0])
    answers = serve(engine, [request("sick", [3, 4, 5], **how), healthy])
    assert answers["sick"].finish == "error"
    assert "not finite" in (answers["sick"].deltas[-1].error or "")
    assert answers["sick"].tokens == []
    assert answers["healthy"].tokens == greedy(model, list(healthy.prompt), 8)
    assert is_empty(engine)


def test_nans_left_behind_in_freed_blocks_reach_nobody(model: DeepSeek) -> None:
    engine = small_engine(model, num_blocks=12)
    engine._runner.cache.pages_LPBW.fill_(torch.nan)
    asked = [request(str(i), p) for i, p in enumerate(prompts(4, seed=11, longest=30))]
    answers = serve(engine, asked)
    for each in asked:
        assert answers[each.request_id].tokens == greedy(model, list(each.prompt), 8)


def test_a_step_that_runs_out_of_memory_ends_its_requests_and_the_next_ones_are_served(
    model: DeepSeek, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)
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
    assert "20 GiB" in (answers["0"].deltas[-1].error or "")
    assert is_empty(engine)
    after = request("after", prompts(1, seed=3)[0])
    assert serve(engine, [after])["after"].tokens == greedy(model, list(after.prompt), 8)


def test_a_bug_is_not_swallowed(model: DeepSeek, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(model)

    def broken(_plan: object, _drafts: object) -> None:
        msg = "index 7 is out of bounds"
        raise IndexError(msg)

    monkeypatch.setattr(engine._runner, "run", broken)
    engine.add(request("a", [3]))
    with pytest.raises(IndexError, match="out of bounds"):
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([2, 320], {}, ["prompt", "320", "319"]),
        ([2, -1], {}, ["prompt", "-1"]),
        ([], {}, ["prompt has 0 tokens"]),
        ([2], {"stop_token_ids": (400,)}, ["stop_token_ids", "400", "319"]),
        ([2], {"logit_bias": {999: 1.0}}, ["logit_bias", "999"]),
        ([2], {"logit_bias": {9: float("nan")}}, ["logit_bias", "token 9", "nan"]),
        ([2], {"logit_bias": {9: 1e39}}, ["logit_bias", "token 9", "1e+39"]),
        ([2], {"logprobs": 21}, ["logprobs = 21", "20"]),
        ([2], {"prompt_logprobs": 21}, ["prompt_logprobs = 21", "20"]),
        ([2], {"temperature": -0.5}, ["temperature = -0.5"]),
        ([2], {"temperature": float("inf")}, ["temperature = inf"]),
        ([2], {"temperature": 1e39}, ["temperature = 1e+39", "from 0 to 3.4e+38"]),
        ([2], {"top_p": 0.0}, ["top_p", "above 0"]),
        ([2], {"top_p": 1.5}, ["top_p = 1.5"]),
        ([2], {"min_p": float("nan")}, ["min_p"]),
        ([2], {"repetition_penalty": 0.0}, ["repetition_penalty", "above 0"]),
        ([2], {"presence_penalty": float("inf")}, ["presence_penalty"]),
        ([2], {"max_tokens": -1}, ["max_tokens = -1"]),
        ([2] * 257, {}, ["257", "256"]),
        ([2] * 200, {"max_tokens": 56}, ["blocks", "50"]),
    ],
)
def test_what_can_never_be_served_is_refused_with_both_numbers(
    model: DeepSeek, prompt: list[int], params: dict, words: list[str]
) -> None:
    engine = small_engine(model, num_blocks=50)
    with pytest.raises(AdmissionError) as refusal:
        engine.add(request("a", prompt, **params))
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert not engine.has_work


def test_a_refusal_names_every_wrong_field_at_once(model: DeepSeek) -> None:
    with pytest.raises(AdmissionError, match=r"top_p = 7.*min_p = -1"):
        small_engine(model).add(request("a", [2], top_p=7.0, min_p=-1.0))


def test_an_id_in_flight_is_refused_and_the_first_request_goes_on(model: DeepSeek) -> None:
    engine = small_engine(model)
    first = request("a", [5, 6, 7])
    engine.add(first)
    with pytest.raises(AdmissionError, match=r"in flight since"):
        engine.add(request("a", [9]))
    answers: dict[str, Answer] = {"a": Answer()}
    while engine.has_work:
        for delta in engine.step():
            answers["a"].tokens.extend(delta.tokens)
    assert answers["a"].tokens == greedy(model, [5, 6, 7], 8)


def test_stats_count_what_happened(model: DeepSeek) -> None:
    engine = small_engine(model)
    asked = prompts(5, seed=12)
    serve(engine, [request(str(i), p, max_tokens=6) for i, p in enumerate(asked)])
    stats = engine.stats()
    assert stats.prompt_tokens == sum(map(len, asked))
    assert stats.generation_tokens == 30
    assert stats.steps > 0
    assert stats.step_seconds == pytest.approx(2 * stats.steps)  # the test's clock ticks at every call


def test_a_saved_checkpoint_serves_the_same_tokens(tmp_path: Path, model: DeepSeek) -> None:
    save_pretrained(model, tmp_path / "nano", dtype=torch.float32)
    options = EngineOptions(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32, block_size=16)
    engine = Engine.from_pretrained(tmp_path / "nano", options)
    ready = engine.ready()
    assert (ready.model_name, ready.max_model_len, ready.vocab_size) == ("nano", 64, 320)
    assert ready.eos_token_ids == (EOS,)
    assert ready.num_blocks == 4 * 64 // 16
    prompt = prompts(1, seed=5)[0]
    assert serve(engine, [request("a", prompt)])["a"].tokens == greedy(model, prompt, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [7, 9]}', (7, 9)), ("{}", (EOS,))],
)
def test_generation_config_names_the_end_tokens(tmp_path: Path, text: str, expected: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert eos_token_ids(tmp_path, NANO) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}'])
def test_a_broken_generation_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path, NANO)


def test_options_that_contradict_the_model_or_each_other_are_refused(model: DeepSeek) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len = 1000.*256"):
        small_engine(model, max_model_len=1000)
    with pytest.raises(ConfigError, match=r"num_blocks.*kv_cache_memory"):
        EngineOptions(num_blocks=4, kv_cache_memory=1000)
    with pytest.raises(ConfigError, match=r"block_size = 0.*gpu_memory_utilization = 1.5"):
        EngineOptions(block_size=0, gpu_memory_utilization=1.5)
    with pytest.raises(ConfigError, match=r"900 bytes.*kv_cache_memory"):
        small_engine(model, num_blocks=None, kv_cache_memory=900)


def test_a_bfloat16_model_is_served_in_bfloat16(model: DeepSeek) -> None:
    engine = small_engine(random_model().to(torch.bfloat16))
    assert engine._runner.cache.pages_LPBW.dtype == torch.bfloat16
    answers = serve(engine, [request(str(i), p, logprobs=1) for i, p in enumerate(prompts(4, seed=1))])
    assert {answer.finish for answer in answers.values()} == {"length"}


def test_weights_are_not_recorded_by_autograd(model: DeepSeek) -> None:
    engine = small_engine(model)
    assert isinstance(engine._runner, Runner)
    engine.add(request("a", [3, 4]))
    plan = engine._scheduler.plan(0.0)
    result = engine._runner.run(plan)
    assert result.logits_SV.is_inference()


def test_a_model_with_one_layer_and_no_experts_in_it_is_served() -> None:
    dense = replace(NANO, num_hidden_layers=1)
    small = random_model(dense)
    prompt = prompts(1, seed=2)[0]
    assert serve(small_engine(small), [request("a", prompt)])["a"].tokens == greedy(small, prompt, 8)
