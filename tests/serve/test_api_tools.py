"""Tool calls and reasoning over HTTP: a real model whose text is forced by a grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from running import benthic_server

from benthic.serve.chat_parts import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    CallPart,
    PartRules,
    Parts,
    joined,
)
from benthic.serve.launch import answer_formats
from benthic.serve.protocol_requests import ChatBody
from benthic.serve.tools import AnswerFormats, Manner, ToolPlan, plan_tools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for message in messages %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    f"{SEPARATOR}"
    "{{ call.function.name + call.function.arguments }}"
    "{% endfor %}{% endfor %}{% if think %}<think>{% endif %}"
)
CALL = f"ok{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_END}{CALLS_END}"
USER = [{"role": "user", "content": "a"}]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("f"), tool("g", x={"enum": ["left", "right"]})]


@pytest.fixture(scope="module")
def client(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "template.jinja").write_text(TEMPLATE)
    flags = (
        "--served-model-name",
        "nano",
        "--block-size",
        "16",
        "--chat-template",
        str(folder / "template.jinja"),
    )
    with benthic_server(nano_checkpoint, folder / "log", *flags) as running:
        yield running.client()


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**({"model": "nano", "messages": USER, "tools": TOOLS} | options))


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, dict[int, list[str]], str | None]:
    """Content, calls as [name, arguments], and the reason of a stream."""
    content, calls, reason = "", {}, None
    for chunk in chat(client, stream=True, **options):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.function.name is not None:
                assert call.id.startswith("call-")
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


def test_a_call_that_the_model_makes_itself_is_read(client: openai.OpenAI) -> None:
    forced = {"extra_body": {"guided_choice": [CALL]}}
    choice = chat(client, **forced).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "f", "{}")
    assert (choice.message.content, choice.finish_reason) == ("ok", "tool_calls")
    assert streamed(client, **forced) == ("ok", {0: ["f", "{}"]}, "tool_calls")


def test_without_tools_the_same_text_is_content(client: openai.OpenAI) -> None:
    forced = {"extra_body": {"guided_choice": [CALL]}}
    choice = chat(client, tools=openai.omit, **forced).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    choice = chat(client, tool_choice="none", **forced).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)


def test_a_named_function_gets_arguments_of_its_schema(client: openai.OpenAI) -> None:
    named = {"tool_choice": {"type": "function", "function": {"name": "g"}}, "seed": 1}
    choice = chat(client, **named).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "g"
    assert json.loads(call.function.arguments)["x"] in ("left", "right")
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert streamed(client, **named) == ("", {0: ["g", call.function.arguments]}, "tool_calls")


def test_required_calls_are_a_list_of_known_functions(client: openai.OpenAI) -> None:
    required = {"tool_choice": "required", "seed": 5, "parallel_tool_calls": False}
    choice = chat(client, **required).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name in ("f", "g")
    assert choice.finish_reason == "tool_calls"
    content, calls, reason = streamed(client, **required)
    assert (content, reason) == ("", "tool_calls")
    assert calls == {0: [call.function.name, call.function.arguments]}


def test_required_calls_follow_pointers_into_their_own_schemas(client: openai.OpenAI) -> None:
    """As pydantic writes models: every tool has `$defs` of the same names."""

    def pointing(name: str, *values: str) -> dict[str, Any]:
        made = tool(name, x={"$ref": "#/$defs/Side"})
        made["function"]["parameters"]["$defs"] = {"Side": {"enum": list(values)}}
        return made

    tools = [pointing("f", "left", "right"), pointing("g", "up", "down")]
    allowed = {"f": ("left", "right"), "g": ("up", "down")}
    seen = set()
    for seed in range(12):
        answer = chat(client, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["x"] in allowed[call.function.name]
        seen.add(call.function.name)
    assert seen == {"f", "g"}


def test_pointers_of_a_tool_lead_to_where_its_schema_is() -> None:
    tree = tool("g", child={"$ref": "#"})
    body = ChatBody.model_validate({"messages": USER, "tools": [tool("f"), tree], "tool_choice": "required"})
    grammar = plan_tools(body, AnswerFormats(), grammar=None, prompt_text="").grammar
    assert grammar is not None
    (part,) = json.loads(grammar)["grammars"]
    parameters = part["json_schema"]["items"]["anyOf"][1]["properties"]["parameters"]
    assert parameters["properties"] == {"child": {"$ref": "#/items/anyOf/1/properties/parameters"}}


def test_a_schema_nested_too_deeply_is_refused(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"x": schema}}
    with pytest.raises(openai.BadRequestError, match="recursion limit"):
        chat(client, tools=[tool("f", x=schema)], tool_choice="required")


def test_earlier_calls_and_their_results_reach_the_template(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "result"},
    ]
    longer = chat(client, messages=messages, max_tokens=1).usage.prompt_tokens
    assert longer > chat(client, max_tokens=1).usage.prompt_tokens + len("result") // 2


def test_earlier_thoughts_reach_the_template_where_they_are_given() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    body = ChatBody.model_validate({"messages": [*USER, message, *USER]})
    assert body.messages[1].as_template_input() == message
    assert "reasoning_content" not in body.messages[0].as_template_input()


def test_reasoning_is_a_field_of_its_own(client: openai.OpenAI) -> None:
    options = {"max_tokens": 12, "seed": 2, "tools": openai.omit}
    thinking = {"extra_body": {"chat_template_kwargs": {"think": True}, "ignore_eos": True}}
    message = chat(client, **options, **thinking).choices[0].message
    assert message.content == ""
    assert message.reasoning_content
    parts = [chunk.choices[0].delta for chunk in chat(client, **options, **thinking, stream=True)]
    assert (
        "".join(getattr(part, "reasoning_content", None) or "" for part in parts) == message.reasoning_content
    )
    assert not "".join(part.content or "" for part in parts)
    thinking["extra_body"]["include_reasoning"] = False
    without = chat(client, **options, **thinking).choices[0].message
    assert (without.content, without.reasoning_content) == ("", None)
    parts = [chunk.choices[0].delta for chunk in chat(client, **options, **thinking, stream=True)]
    assert not any(getattr(part, "reasoning_content", None) for part in parts)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_forced_calls_come_behind_the_thought(size: int) -> None:
    def read(manner: Manner, text: str) -> tuple[Parts, bool]:
        rules = PartRules(reasoning=True, thinking=True)
        reader = ToolPlan(manner=manner, name="f", grammar=None, rules=rules).reader()
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        return joined([*(reader.push(piece) for piece in pieces), reader.finish()]), reader.called

    called = Parts(reasoning="so", calls=[CallPart(0, name="f", arguments='{"x": 1}')])
    assert read("one", 'so</think>\n\n{"x": 1}') == (called, True)
    assert read("some", 'so</think>[{"name": "f", "parameters": {"x": 1}}]') == (called, True)
    for manner in ("one", "some"):
        assert read(manner, "so</thi") == (Parts(reasoning="so</thi"), False)


def test_a_bound_answer_thinks_first_where_the_prompt_says_so(client: openai.OpenAI) -> None:
    fields = {"chat_template_kwargs": {"think": True}, "guided_choice": ["yes", "no"]}
    options = {"max_tokens": 9, "seed": 2, "tools": openai.omit}
    choice = chat(client, **options, extra_body=fields).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.reasoning_content
    forced = chat(
        client, max_tokens=9, seed=2, tool_choice="required", extra_body=fields | {"guided_choice": None}
    )
    assert forced.choices[0].message.reasoning_content
    assert not forced.choices[0].message.tool_calls
    fields["chat_template_kwargs"] = {}
    assert chat(client, **options, extra_body=fields).choices[0].message.content in ("yes", "no")


def test_a_message_that_goes_on_in_the_middle_of_a_thought_goes_on_thinking(client: openai.OpenAI) -> None:
    def answer(content: str) -> Any:
        last = {"role": "assistant", "content": content, "prefix": True}
        options = {"max_tokens": 6, "tools": openai.omit, "extra_body": {"ignore_eos": True}}
        return chat(client, messages=[*USER, last], **options).choices[0].message

    assert answer("<think>so").reasoning_content
    assert answer("<think>so</think>b").reasoning_content is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "h"}}},
            "names h, but the tools are: f, g",
        ),
        ({"tool_choice": "required", "extra_body": {"guided_regex": "a"}}, "forces a call"),
        (
            {"tool_choice": "required", "extra_body": {"ignore_eos": True}},
            "tool_choice says where the answer",
        ),
        ({"tool_choice": "required", "extra_body": {"min_tokens": 3}}, "tool_choice says where the answer"),
        ({"tools": [tool("f", x={"type": "wrong"})], "tool_choice": "required"}, "Invalid type: wrong"),
    ],
)
def test_tools_that_cannot_be_meant_are_refused(
    client: openai.OpenAI, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, **options)


def test_formats_are_read_off_the_template_or_named() -> None:
    from benthic.serve.chat_template import ChatTemplate

    assert AnswerFormats.of_template(TEMPLATE) == AnswerFormats(
        tools="deepseek_v31", reasoning=True, renders_tools=True
    )
    assert AnswerFormats.of_template(TEMPLATE + "```json").tools == "deepseek_v3"
    assert AnswerFormats.of_template("{{ messages }}") == AnswerFormats()
    template = ChatTemplate(TEMPLATE, {})
    named = answer_formats(template, "deepseek_v3", "none")
    assert (named.tools, named.reasoning, named.renders_tools) == ("deepseek_v3", False, True)
    assert answer_formats(None, "none", "auto") == AnswerFormats()
