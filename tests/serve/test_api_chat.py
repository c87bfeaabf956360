from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import openai
import pytest
from running import fake_server

from benthic.serve.protocol_requests import INSTEAD, UNSUPPORTED
from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from running import Running

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def chat(client: openai.OpenAI, messages=USER, **options):
    return client.chat.completions.create(model="fake", messages=messages, **options)


def forced(tokenizer_folder: Path, text: str) -> dict[str, int]:
    return {str(token): 100 for token in Tokenizer.from_folder(tokenizer_folder).encode(text)}


def test_a_chat_answer_has_a_message_usage_and_a_reason(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=4)
    choice = answer.choices[0]
    assert (answer.object, choice.message.role, choice.finish_reason) == (
        "chat.completion",
        "assistant",
        "length",
    )
    assert choice.message.content
    assert answer.usage.prompt_tokens == 5  # <bos> <|user|> h i <|assistant|>
    assert answer.usage.completion_tokens == 4
    assert chat(client, max_tokens=4).choices[0].message.content == choice.message.content


def test_without_a_limit_the_answer_fills_the_context(client: openai.OpenAI) -> None:
    answer = chat(client, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256


def test_a_stream_names_the_role_once_then_adds_text_then_says_why_it_ended(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=6, n=2)
    chunks = list(chat(client, max_tokens=6, n=2, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.usage == whole.usage
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        text = "".join(choice.delta.content for choice in own)
        assert text == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_tokens_bytes_and_the_best(client: openai.OpenAI, *, stream: bool) -> None:
    options = {"max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    if stream:
        choices = [chunk.choices[0] for chunk in chat(client, stream=True, **options)]
        entries = [e for choice in choices if choice.logprobs for e in choice.logprobs.content]
        text = "".join(choice.delta.content for choice in choices)
    else:
        choice = chat(client, **options).choices[0]
        entries, text = choice.logprobs.content, choice.message.content
    assert "".join(entry.token for entry in entries) == text
    assert b"".join(bytes(entry.bytes) for entry in entries) == text.encode()
    assert all(
        len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in entries
    )
    bare = chat(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    assert bare.top_logprobs == []


def test_prompt_logprobs_come_with_the_answer(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == 5


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, tokenizer_folder: Path) -> None:
    bias = forced(tokenizer_folder, "xyz")
    answer = chat(client, max_tokens=40, stop=["yz"], logit_bias=bias)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("x", "stop")


def test_messages_may_be_lists_of_text_parts(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert chat(client, parts, max_tokens=1).usage == chat(client, max_tokens=1).usage


def test_the_template_decides_what_the_model_reads(server: Running) -> None:
    with server.http() as http:
        ask = lambda **body: http.post("/tokenize", json={"messages": USER, **body}).json()["count"]  # noqa: E731
        assert ask() == 5
        assert ask(add_generation_prompt=False) == 4
        assert ask(chat_template_kwargs={"shout": True}) == 8


@pytest.mark.parametrize("words", ["vllm", "deepseek"])
def test_the_answer_can_go_on_with_the_last_message(server: Running, words: str) -> None:
    last = {"role": "assistant", "content": "one, t"}
    fields: dict = {"model": "fake", "messages": [*USER, last]}
    if words == "vllm":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    else:
        last["prefix"] = True
    with server.http() as http:
        told = http.post("/tokenize", json=fields).json()
        assert http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"] == (
            "<bos><|user|>hi<|assistant|>one, t"
        )
        answer = http.post("/v1/chat/completions", json=fields | {"max_tokens": 1}).json()
        assert answer["usage"]["prompt_tokens"] == told["count"]
        for wrong, param in (
            ({"add_generation_prompt": True}, "add_generation_prompt"),
            ({"messages": [last, *USER], "continue_final_message": True}, "messages"),
        ):
            refused = http.post("/v1/chat/completions", json=fields | wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_ids_of_prompt_and_answer_come_if_asked_for(server: Running, path: str) -> None:
    body = {"model": "fake", "max_tokens": 3, "n": 2, "return_token_ids": True, "ignore_eos": True}
    body |= {"prompt": [40, 41]} if path == "completions" else {"messages": USER}
    with server.http() as http:
        whole = http.post(f"/v1/{path}", json=body).json()
        prompt = (whole if "chat" in path else whole["choices"][0])["prompt_token_ids"]
        if path == "completions":
            assert prompt == [40, 41]
        assert [choice["token_ids"] for choice in whole["choices"]] == [
            [prompt[-1] + 1, prompt[-1] + 2, prompt[-1] + 3]
        ] * 2
        with http.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    first = chunks[0] if "chat" in path else chunks[0]["choices"][0]
    assert first["prompt_token_ids"] == prompt
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        ids = [token for choice in own for token in choice.get("token_ids") or ()]
        assert ids == whole["choices"][index]["token_ids"]


def test_a_template_that_refuses_the_messages_is_a_400_with_its_words(client: openai.OpenAI) -> None:
    late = [*USER, {"role": "system", "content": "too late"}]
    with pytest.raises(openai.BadRequestError, match="system must come first") as caught:
        chat(client, late)
    assert caught.value.param == "messages"


def test_without_a_template_chat_is_refused_and_completions_work(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", template=False) as bare:
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*--chat-template"):
            chat(bare.client())
        assert bare.client().completions.create(model="fake", prompt="a", max_tokens=1).choices


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # the template shows none
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"echo": True}}, "echo"),
        ({"extra_body": {"regex": "a+"}}, "regex"),
        ({"extra_body": {"thinking": {"type": "enabled"}}}, "thinking"),
        ({"extra_body": {"max_new_tokens": 3}}, "max_new_tokens"),
        ({"extra_body": {"separate_reasoning": False}}, "separate_reasoning"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(client: openai.OpenAI, options: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **({"messages": USER} | options))
    assert caught.value.param == param
    assert INSTEAD.get(param, "") in caught.value.message
    assert INSTEAD.keys() <= UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": [*USER, {"role": "x", "content": "x"}]}, "messages.1.role: Input should be 'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content: must be text, or a list of text parts: this server reads text alone",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type: Input should be 'function'"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: Input should be less than or equal to 100 (got 101)"),
    ],
)
def test_a_wrong_value_inside_a_field_is_named_with_its_place(
    client: openai.OpenAI, options: dict, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **({"messages": USER} | options))
    assert words in caught.value.message


def test_values_of_unsupported_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    harmless = {"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True}
    assert chat(client, max_tokens=1, **harmless).choices


def test_special_tokens_beside_those_of_the_template_are_added_where_asked_for(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    config = {"bos_token": "<bos>", "add_bos_token": True, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with fake_server(folder, tmp_path / "log") as begun:
        counts = [
            chat(begun.client(), max_tokens=1, extra_body=fields).usage.prompt_tokens
            for fields in ({}, {"add_special_tokens": False}, {"add_special_tokens": True})
        ]
    assert counts == [2, 2, 3]
