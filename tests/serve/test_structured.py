"""Structured output: from fields to grammars, and from grammars to tokens."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch
from running import Running, benthic_server

from benthic.errors import AdmissionError
from benthic.serve.api_errors import ApiError
from benthic.serve.grammar import Grammars, matcher_for
from benthic.serve.messages import SamplingParams
from benthic.serve.protocol_requests import ChatBody, CompletionBody
from benthic.serve.sampler import Sampler
from benthic.serve.service import Prompt, Service, ServiceSettings
from benthic.serve.structured import FIELDS, after_thought, binds, grammar_of
from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VOCAB, EOS = 320, 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "alan"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def grammar(**fields: Any) -> str | None:
    return grammar_of(CompletionBody.model_validate({"model": "m", "prompt": "a", **fields}))


def test_free_text_has_no_grammar() -> None:
    assert grammar() is None
    assert grammar(response_format={"type": "text"}) is None


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_may_fix_the_form_is_known(field: str) -> None:
    given = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    given |= {"guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": 'start: "a"'}
    body = CompletionBody.model_validate({"model": "m", "prompt": "a", field: given[field]})
    assert binds(body)
    assert grammar_of(body) is not None
    assert set(given) == set(FIELDS)


def test_free_text_waits_for_no_thread() -> None:
    """A thread gets the interpreter only when the loop rests: behind all that a busy front has to write."""
    service = Service.__new__(Service)
    service.settings = ServiceSettings(served_names=("m",), root="m", max_num_seqs=1, max_waiting=1)
    threads: list[object] = []

    async def in_thread(work: Callable[[], Any]) -> Any:
        threads.append(work)
        return work()

    service.in_thread = in_thread  # type: ignore[method-assign]
    said = [{"role": "user", "content": "hi"}]

    async def grammars(**fields: Any) -> list[str | None]:
        chat = ChatBody.model_validate({"messages": said, **fields})
        plan = await service.tool_plan(chat, Prompt(ids=(40,), text="hi"))
        return [await service.grammar(CompletionBody.model_validate({"prompt": "a", **fields})), plan.grammar]

    assert asyncio.run(grammars()) == [None, None]
    assert not threads
    assert asyncio.run(grammars(guided_regex="a")) == [grammar(guided_regex="a")] * 2
    assert len(threads) == 2


def test_the_same_schema_by_every_name_is_the_same_grammar() -> None:
    by_name = [
        grammar(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
        grammar(structured_outputs={"json": SCHEMA}),
        grammar(structured_outputs={"json": json.dumps(SCHEMA)}),
        grammar(guided_json=SCHEMA),
    ]
    assert len(set(by_name)) == 1
    assert grammar(response_format={"type": "json_object"}) == grammar(
        structured_outputs={"json_object": True}
    )
    assert grammar(guided_regex="a+") == grammar(structured_outputs={"regex": "a+"})
    assert grammar(guided_choice=["a", "b"]) == grammar(structured_outputs={"choice": ["a", "b"]})
    assert grammar(guided_grammar='start: "a"') == grammar(structured_outputs={"grammar": 'start: "a"'})


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_json": {"type": "wrong"}}, "guided_json", "Invalid type: wrong"),
        ({"guided_json": "{"}, "guided_json", "is not a JSON schema that"),
        ({"guided_grammar": "start: missing"}, "guided_grammar", "missing"),
        ({"guided_regex": "\ud800"}, "guided_regex", ""),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one answer"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "says where the answer ends"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "says where the answer ends"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_by_name(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises((ApiError, ValueError)) as refused:
        grammar(**fields)
    if isinstance(refused.value, ApiError):
        assert (refused.value.status, refused.value.param) == (400, param)
    assert words in str(refused.value)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture(scope="module")
def grammars(tokenizer_folder: Path) -> Grammars:
    found = Grammars.from_folder(tokenizer_folder, vocab_size=VOCAB, eos=(EOS,))
    assert found is not None
    return found


def sample(grammars: Grammars, params: list[SamplingParams], steps: int, seed: int = 0) -> list[list[int]]:
    """Tokens of rows with random logits, until their end token; finished rows leave the batch."""
    sampler = Sampler(VOCAB, torch.device("cpu"))
    for i, each in enumerate(params):
        matcher = matcher_for(grammars, each.grammar)
        sampler.admit(str(i), each, (5, 6), seed=i, stop_tokens=(EOS,), matcher=matcher)
    found: list[list[int]] = [[] for _ in params]
    live = list(range(len(params)))
    for step in range(steps):
        logits_SV = torch.stack([random_row(seed, i, step) for i in live])
        tokens = sampler.sample(logits_SV, tuple(map(str, live)), [step] * len(live)).tokens
        for i, token in zip(tuple(live), tokens, strict=True):
            found[i].append(token)
            if token == EOS:
                live.remove(i)
                sampler.release(str(i))
        if not live:
            break
    return found


def random_row(seed: int, row: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, row, step)))
    return 3.0 * torch.randn(VOCAB, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"top_k": 2},
        {"top_p": 0.3, "min_p": 0.1},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
        {"logit_bias": {40: 100.0, 41: 100.0}},
    ],
)
def test_whatever_else_shapes_the_distribution_the_output_matches(
    grammars: Grammars, tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    pattern = "[a-f]{3}-(yes|no) [0-9]{1,4}!"
    params = SamplingParams(grammar=grammar(guided_regex=pattern), **settings)
    for seed in range(5):
        (tokens,) = sample(grammars, [params], 40, seed)
        assert tokens[-1] == EOS
        assert re.fullmatch(pattern, tokenizer.decode(tokens[:-1], skip_special_tokens=False))


def test_rows_with_a_grammar_leave_the_others_as_they_were(grammars: Grammars, tokenizer: Tokenizer) -> None:
    free = SamplingParams(temperature=0.8, top_k=20)
    compact = {"json": SCHEMA, "disable_any_whitespace": True}
    bound = SamplingParams(temperature=0.8, grammar=grammar(structured_outputs=compact))
    mixed = sample(grammars, [free, bound, free, bound], 30)
    alone = sample(grammars, [free, free, free, free], 30)
    assert (mixed[0], mixed[2]) == (alone[0], alone[2])
    for row in (1, 3):
        answer = json.loads(tokenizer.decode(mixed[row][:-1], skip_special_tokens=False))
        assert answer["name"] in ("ada", "alan")
        assert 0 <= answer["age"] <= 99


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ({"guided_json": {"enum": [7]}}, "7"),
        ({"guided_regex": "[a-z]+!"}, "so!"),
        ({"guided_choice": ["yes", "no"]}, "yes"),
        ({"guided_grammar": 'start: "a" b\nb: "c"'}, "ac"),
        ({"guided_grammar": 'root ::= "x" "y"'}, "xy"),
        ({"structured_outputs": {"json": {"enum": [7]}, "disable_any_whitespace": True}}, "7"),
    ],
)
def test_behind_a_thought_every_form_is_followed(
    form: dict[str, Any], answer: str, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    thought = 'say {"a": 世}\n</thin\n or </ think>'
    for gap in ("", "\n\n"):
        matcher = grammars.matcher(after_thought(grammar(**form)))
        for token in tokenizer.encode(f"{thought}</think>{gap}{answer}"):
            assert not matcher.is_accepting()
            assert matcher.consume_token(token), matcher.get_error()
        assert matcher.is_accepting() or answer == "so!"
        assert matcher.consume_token(EOS)
    matcher = grammars.matcher(after_thought(grammar(**form)))
    tokens = tokenizer.encode("ok</think>OTHER")
    assert matcher.try_consume_tokens(tokens) < len(tokens)
    matcher = grammars.matcher(after_thought(grammar(**form)))
    assert matcher.try_consume_tokens([*tokenizer.encode(thought), EOS]) == len(tokenizer.encode(thought))


def test_a_vocabulary_that_cannot_be_read_is_said_at_the_start_and_refuses_requests_later(
    grammars: Grammars, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grammars.warm_up()
    assert not caplog.text
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = Grammars(tmp_path / "tokenizer.json", vocab_size=VOCAB, eos=(EOS,))
    broken.warm_up()
    assert "requests with structured output will be refused" in caplog.text
    with pytest.raises(AdmissionError, match="cannot be read as a vocabulary"):
        broken.matcher(str(grammar(guided_regex="a")))


def test_a_grammar_without_a_vocabulary_is_refused(grammars: Grammars, tmp_path: Path) -> None:
    assert Grammars.from_folder(tmp_path, vocab_size=VOCAB, eos=(EOS,)) is None
    with pytest.raises(AdmissionError, match=r"no tokenizer\.json"):
        matcher_for(None, grammar(guided_regex="a"))
    with pytest.raises(AdmissionError, match="cannot be followed"):
        grammars.matcher("{broken")


@pytest.fixture(scope="module")
def client(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("serve") / "log"
    flags = ("--served-model-name", "nano", "--block-size", "16", "--disable-log-requests")
    with benthic_server(nano_checkpoint, log, *flags) as running:
        assert isinstance(running, Running)
        yield running.client()


def test_a_streamed_chat_answer_is_json_of_the_schema(client: openai.OpenAI) -> None:
    schema = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    options = {"model": "nano", "messages": [{"role": "user", "content": "who?"}], "seed": 3}
    whole = client.chat.completions.create(**options, response_format=asked)
    chunks = client.chat.completions.create(**options, response_format=asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert set(json.loads(text)) == {"name", "age"}


def test_choices_and_regexes_of_several_sequences_in_one_batch(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="nano", prompt=["a", "b"], n=2, max_tokens=30, extra_body={"guided_choice": ["left", "right"]}
    )
    assert {choice.text for choice in made.choices} <= {"left", "right"}
    assert {choice.finish_reason for choice in made.choices} == {"stop"}
    made = client.completions.create(
        model="nano", prompt="a", max_tokens=30, logprobs=1,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
    )  # fmt: skip
    assert re.fullmatch("[0-9]{4}", made.choices[0].text)


def test_what_the_server_refuses_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="guided_regex is not a regex") as refused:
        client.completions.create(model="nano", prompt="a", extra_body={"guided_regex": "("})
    assert refused.value.param == "guided_regex"
    with pytest.raises(openai.BadRequestError, match="json_schema must be given"):
        client.completions.create(
            model="nano", prompt="a", extra_body={"response_format": {"type": "json_schema"}}
        )
    both = {"structured_outputs": {"regex": "a", "choice": ["b"]}}
    with pytest.raises(openai.BadRequestError, match="2 of json, regex"):
        client.completions.create(model="nano", prompt="a", extra_body=both)
