from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import BLOCK, EOS

from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import openai
    from running import Running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


def complete(client: openai.OpenAI, prompt="a", **options):
    return client.completions.create(model="fake", prompt=prompt, **options)


def streamed(client: openai.OpenAI, prompt="a", **options) -> list:
    return list(complete(client, prompt, stream=True, **options))


def forced(tokens: list[int]) -> dict[str, int]:
    """The fake engine cycles through tokens whose bias is 100."""
    return {str(token): 100 for token in tokens}


def test_a_completion_has_text_usage_and_a_reason(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = complete(client, [40, 41], max_tokens=3)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == tokenizer.decode([42, 43, 44])
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 3, 5)


def test_sixteen_tokens_are_generated_unless_asked_otherwise_or_the_context_ends(
    client: openai.OpenAI,
) -> None:
    assert complete(client, "a").usage.completion_tokens == 16
    assert complete(client, [40] * 250).usage.completion_tokens == 6


def test_a_stream_carries_the_same_text_and_ends_with_reason_and_usage(client: openai.OpenAI) -> None:
    whole = complete(client, "the quick", max_tokens=9)
    chunks = streamed(client, "the quick", max_tokens=9, stream_options={"include_usage": True})
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage == whole.usage


def test_usage_can_come_with_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(client, [40], max_tokens=3, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts), "tokens that were waiting come in one chunk"
    assert counts[-2:] == [3, 3]


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([40, 41], 1), ([[40], [50, 51], [60]], 3)]
)
def test_prompts_may_be_text_or_token_ids_alone_or_in_lists(
    client: openai.OpenAI, tokenizer: Tokenizer, prompt: object, count: int
) -> None:
    answer = complete(client, prompt, max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(count))
    lists = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    last = [(tokenizer.encode(each) if isinstance(each, str) else each)[-1] for each in lists]
    assert [c.text for c in answer.choices] == [tokenizer.decode([t + 1, t + 2]) for t in last]


def test_n_sequences_of_each_prompt_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    answer = complete(client, [[40], [50]], n=3, max_tokens=2)
    texts = [choice.text for choice in answer.choices]
    assert texts == [texts[0]] * 3 + [texts[3]] * 3
    assert texts[0] != texts[3]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 12
    indices = {chunk.choices[0].index for chunk in streamed(client, [[40], [50]], n=3, max_tokens=2)}
    assert indices == set(range(6))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(client: openai.OpenAI, tokenizer: Tokenizer, *, stream: bool) -> None:
    def text(prompt, **options) -> str:
        if stream:
            return "".join(chunk.choices[0].text for chunk in streamed(client, prompt, echo=True, **options))
        return complete(client, prompt, echo=True, **options).choices[0].text

    plain = complete(client, "the dog", max_tokens=3).choices[0].text
    assert text("the dog", max_tokens=3) == "the dog" + plain
    assert text([40, 41], max_tokens=1) == tokenizer.decode([40, 41, 42])
    assert text("the dog", max_tokens=0) == "the dog"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_parallel_lists_whose_offsets_point_into_the_text(
    client: openai.OpenAI, *, stream: bool
) -> None:
    options = {"max_tokens": 4, "logprobs": 2, "echo": True}
    if stream:
        chunks = [chunk.choices[0] for chunk in streamed(client, "the quick", **options)]
        text = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks]
        merge = lambda name: [value for part in parts for value in getattr(part, name)]  # noqa: E731
    else:
        choice = complete(client, "the quick", **options).choices[0]
        text = choice.text
        merge = lambda name: getattr(choice.logprobs, name)  # noqa: E731
    tokens, offsets = merge("tokens"), merge("text_offset")
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    values, tops = merge("token_logprobs"), merge("top_logprobs")
    assert values == [None] + [-0.1] * (len(tokens) - 1)
    assert tops[0] is None
    assert all(top[token] == -0.1 and len(top) == 2 for top, token in zip(tops[1:], tokens[1:], strict=True))


def test_tokens_of_logprobs_can_be_written_as_ids(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    answer = complete(client, [40], max_tokens=2, logprobs=0, extra_body=extra)
    assert answer.choices[0].logprobs.tokens == ["token_id:41", "token_id:42"]


def test_prompt_logprobs_give_every_prompt_position_but_the_first(client: openai.OpenAI) -> None:
    answer = complete(client, [40, 41, 42], max_tokens=1, extra_body={"prompt_logprobs": 1})
    rows = answer.choices[0].prompt_logprobs
    assert rows[0] is None
    assert [list(row) for row in rows[1:]] == [["41"], ["42"]]
    assert rows[1]["41"]["rank"] == 1


def test_a_stop_string_over_token_borders_cuts_text_and_counts_tokens(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    cycle = [tokenizer.encode(char)[0] for char in "xyz"]
    bias = forced(cycle)
    answer = complete(client, "a", max_tokens=50, stop=["zx", "never"], logit_bias=bias)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("xy", "stop", "zx")
    assert answer.usage.completion_tokens == 4
    chunks = streamed(client, "a", max_tokens=50, stop="zx", logit_bias=bias)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "xy"
    assert chunks[-1].choices[0].finish_reason == "stop"
    extra = {"include_stop_str_in_output": True}
    shown = complete(client, "a", max_tokens=50, stop="zx", logit_bias=bias, extra_body=extra)
    assert shown.choices[0].text == "xyzx"


def test_stop_strings_wait_for_min_tokens(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    bias = forced([tokenizer.encode(char)[0] for char in "xyz"])
    answer = complete(client, "a", max_tokens=50, stop="zx", logit_bias=bias, extra_body={"min_tokens": 5})
    assert answer.choices[0].text == "xyzxy"
    assert answer.usage.completion_tokens == 7


def test_a_stop_token_is_counted_but_not_shown_and_named_unless_it_is_the_models_end(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    own = complete(client, [40], max_tokens=9, extra_body={"stop_token_ids": [43]})
    assert (own.choices[0].text, own.choices[0].stop_reason) == (tokenizer.decode([41, 42]), 43)
    assert own.usage.completion_tokens == 3
    bias = forced([60, EOS])
    end = complete(client, [40], max_tokens=9, logit_bias=bias)
    assert (end.choices[0].text, end.choices[0].finish_reason) == (tokenizer.decode([60]), "stop")
    assert end.choices[0].stop_reason is None
    more = complete(client, [40], max_tokens=4, logit_bias=bias, extra_body={"ignore_eos": True})
    assert more.choices[0].text == tokenizer.decode([60, 60])
    assert more.choices[0].finish_reason == "length"
    shown = {"ignore_eos": True, "skip_special_tokens": False}
    raw = complete(client, [40], max_tokens=4, logit_bias=bias, extra_body=shown)
    assert raw.choices[0].text == tokenizer.decode([60, EOS, 60, EOS], skip_special_tokens=False)


def test_a_character_split_over_tokens_streams_whole(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    wave = tokenizer.encode("🌊")
    assert len(wave) > 1
    chunks = streamed(client, "a", max_tokens=2 * len(wave), logit_bias=forced(wave))
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == "🌊🌊"
    assert not any("\ufffd" in text for text in texts)
    cut = complete(client, "a", max_tokens=2 * len(wave) - 1, logit_bias=forced(wave))
    assert cut.choices[0].text == "🌊\ufffd"


def test_cached_prompt_tokens_are_reported(client: openai.OpenAI) -> None:
    answer = complete(client, [40] * (BLOCK + 1), max_tokens=1, n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == BLOCK


def test_every_sampling_field_is_taken(client: openai.OpenAI) -> None:
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True,
        "stop_token_ids": [300], "priority": -3, "add_special_tokens": False, "some_future_field": {"x": 1},
    }  # fmt: skip
    options = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": -0.1,
        "seed": -5, "logit_bias": {"5": -100}, "stop": ["\n"], "user": "me", "n": 2,
    }  # fmt: skip
    assert len(complete(client, "the", extra_body=extra, **options).choices) == 2
    chunks = streamed(client, "the", extra_body=extra, **options)
    assert {chunk.choices[0].index: chunk.choices[0].finish_reason for chunk in chunks} == {
        0: "length",
        1: "length",
    }
