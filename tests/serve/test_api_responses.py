"""/v1/responses through the openai client: items, events in the documented order, refusals in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import openai
import pytest

from benthic.serve.api_responses import as_chat
from benthic.serve.chat_parts import CallPart, Parts
from benthic.serve.protocol_items import ResponsesBody
from benthic.serve.protocol_responses import ChatLogprob
from benthic.serve.response_items import Output

if TYPE_CHECKING:
    from running import Running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def respond(client: openai.OpenAI, **fields):
    body = {"model": "fake", "input": "hi", "max_output_tokens": 4}
    return client.responses.create(**(body | fields))


def test_an_answer_is_a_message_that_says_what_a_chat_says(client: openai.OpenAI) -> None:
    answer = respond(client, instructions="be brief", temperature=0.5, metadata={"a": "b"})
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="fake", messages=messages, max_tokens=4)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.object, answer.status, answer.incomplete_details.reason) == (
        "response", "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert [(item.type, item.status) for item in answer.output] == [("message", "incomplete")]
    assert (answer.temperature, answer.top_p, answer.metadata, answer.store) == (0.5, 1.0, {"a": "b"}, False)
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (4, 0)


def test_a_stream_has_the_documented_events_in_their_order(client: openai.OpenAI) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert deltas
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[0].response.output == []
    last = events[-1].response
    assert (last.output_text, last.usage) == (whole.output_text, whole.usage)
    assert {event.item_id for event in deltas} == {last.output[0].id}


def test_log_probabilities_come_with_the_text(client: openai.OpenAI) -> None:
    include = ["message.output_text.logprobs"]
    rows = respond(client, include=include, top_logprobs=2).output[0].content[0].logprobs
    assert [len(row.top_logprobs) for row in rows] == [2, 2, 2, 2]
    assert rows[0].logprob == pytest.approx(-0.1)
    events = respond(client, include=include, stream=True)
    streamed = [
        row for event in events if event.type == "response.output_text.delta" for row in event.logprobs
    ]
    assert [row.token for row in streamed] == [row.token for row in rows]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("previous_response_id", "resp_1", "stores no responses"),
        ("store", True, "stores no responses"),
        ("conversation", "conv_1", "stores no responses"),
        ("background", True, "not supported"),
        ("truncation", "auto", "not supported"),
        ("input", [], "must be text, or a non-empty list"),
        ("input", [{"type": "reasoning"}], "0 messages"),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}], "must be text"),
        ("tools", [{"type": "web_search"}], "function"),
        ("max_output_tokens", 0, "greater than or equal to 1"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    server: Running, field: str, value: object, words: str
) -> None:
    with server.http() as http:
        answer = http.post("/v1/responses", json={"model": "fake", "input": "hi", field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"] == field


def test_nobody_finds_a_stored_response(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        client.responses.retrieve("resp_1")


def test_failures_are_statuses_before_the_stream_and_events_in_it(server: Running) -> None:
    with server.http() as http:
        body = {"model": "fake", "input": "hi", "stream": True}
        wrong = http.post("/v1/responses", json=body | {"model": "other"})
        assert wrong.status_code == 404
        late = http.post("/v1/responses", json=body | {"timeout_s": 0.0001})
        assert late.status_code == 408


def test_a_conversation_becomes_the_messages_of_a_chat() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "let me look", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"role": "developer", "content": "be brief"},
    ]
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}
    body = ResponsesBody.model_validate(
        {
            "model": "m", "input": items, "instructions": "system", "tools": [tool],
            "tool_choice": {"type": "function", "name": "look"}, "text": {"format": schema},
        }
    )  # fmt: skip
    chat = as_chat(body)
    assert [message.role for message in chat.messages] == [
        "system", "user", "assistant", "tool", "developer",
    ]  # fmt: skip
    assert chat.messages[2].content == "let me look"
    assert [call.id for call in chat.messages[2].tool_calls] == ["c1", "c2"]
    assert chat.messages[3].tool_call_id == "c1"
    assert chat.tools[0].function.name == chat.tool_choice.function.name == "look"
    assert chat.response_format.json_schema.schema_ == {"type": "object"}


def test_reasoning_text_and_calls_are_items_one_after_another() -> None:
    output = Output()
    row = ChatLogprob.model_validate({"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []})
    events = [
        *output.push(Parts(reasoning="hm"), 3, [row]),
        *output.push(Parts(content="let "), 1, []),
        *output.push(Parts(content="me", calls=[CallPart(0, name="f")]), 2, [row, row]),
        *output.push(Parts(calls=[CallPart(0, arguments="{}"), CallPart(1, name="g")]), 2, []),
        *output.finish(complete=True),
    ]
    assert [item.type for item in output.items] == ["reasoning", "message", "function_call", "function_call"]
    assert {item.status for item in output.items} == {"completed"}
    assert output.reasoning_tokens == 3
    assert output.items[1].content[0].text == "let me"
    assert len(output.items[1].content[0].logprobs) == 2
    assert [(item.name, item.arguments) for item in output.items[2:]] == [("f", "{}"), ("g", "")]
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert opened == closed == [0, 1, 2, 3]


def test_best_of_returns_the_likeliest_of_what_it_counts(client: openai.OpenAI) -> None:
    ask = SimpleNamespace(model="fake", prompt="a", max_tokens=3)
    plain = client.completions.create(**vars(ask), n=2)
    best = client.completions.create(**vars(ask), n=2, best_of=4)
    assert [choice.index for choice in best.choices] == [0, 1]
    assert [choice.text for choice in best.choices] == [choice.text for choice in plain.choices]
    assert best.choices[0].logprobs is None
    assert (plain.usage.completion_tokens, best.usage.completion_tokens) == (6, 12)
    for fields, words in (
        ({"best_of": 1, "n": 2}, "below n = 2"),
        ({"best_of": 3, "stream": True}, "streamed"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(**vars(ask), **fields)
