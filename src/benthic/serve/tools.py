"""What tools mean for one chat request: what the template sees, what binds the answer, how it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benthic.serve import api_errors
from benthic.serve.chat_parts import (
    SEPARATOR,
    THINK,
    THINK_END,
    CallPart,
    PartReader,
    PartRules,
    Parts,
    joined,
)
from benthic.serve.protocol_tools import NamedTool
from benthic.serve.structured import Form, after_thought, check_endings, compile_form

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.serve.chat_parts import ToolFormat
    from benthic.serve.protocol_requests import ChatBody, TemplateBody
    from benthic.serve.protocol_tools import Tool

ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class AnswerFormats:
    """How the served model writes tool calls and reasoning; None and False mean that it does not.

    Attributes:
        tools: the format of calls that the model makes by itself.
        reasoning: whether `<think>` begins reasoning.
        renders_tools: whether the chat template shows the model which tools there are.
    """

    tools: ToolFormat | None = None
    reasoning: bool = False
    renders_tools: bool = False

    @classmethod
    def of_template(cls, source: str | None) -> AnswerFormats:
        """Read off a chat template: DeepSeek's writes markers of earlier calls and strips old reasoning."""
        if source is None:
            return cls()
        fenced = "```json" in source or "```' + 'json" in source
        format_: ToolFormat | None = "deepseek_v3" if fenced else "deepseek_v31"
        return cls(
            tools=format_ if SEPARATOR in source else None,
            reasoning=THINK in source or THINK_END in source,
            renders_tools="tools" in source,
        )


Manner = Literal["free", "one", "some"]


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """How one request's answers come about.

    Attributes:
        manner: `free` answers may call; `one` is the arguments of `name`; `some` is a JSON list of calls.
        name: the function that must be called.
        grammar: what binds the answer, or None.
        rules: how a free answer is read.
    """

    manner: Manner
    name: str | None
    grammar: str | None
    rules: PartRules

    def reader(self) -> AnswerParts:
        """Reads one answer."""
        if self.manner == "free":
            return PartReader(self.rules)
        calls = NamedCall(self.name or "") if self.manner == "one" else CallList()
        return ThoughtFirst(calls) if self.rules.thinking else calls


def shown_tools(body: TemplateBody, formats: AnswerFormats) -> list[dict[str, Any]] | None:
    """What the template is given.

    Raises:
        ApiError: 400 for tools that the template cannot show, or whose calls nobody could read.
    """
    if not body.tools or body.tool_choice == "none":
        return None
    if not formats.renders_tools:
        msg = (
            "the served model's chat template shows no tools, so the model would not know them. Start the "
            "server with --chat-template FILE of one that does."
        )
        raise api_errors.invalid(msg, param="tools", code="no_tool_template")
    if formats.tools is None and body.tool_choice in (None, "auto"):
        msg = (
            "the format of the served model's tool calls is unknown. Start the server with "
            "--tool-call-parser, or set tool_choice to required or a function."
        )
        raise api_errors.invalid(msg, param="tool_choice", code="no_tool_parser")
    return [tool.as_template_input() for tool in body.tools]


def forces(body: ChatBody) -> bool:
    """Whether the answer must be a call."""
    return body.tool_choice not in (None, "none", "auto")


def plan_tools(
    body: ChatBody, formats: AnswerFormats, *, grammar: str | None, prompt_text: str | None
) -> ToolPlan:
    """How to bind and read the answers.

    Raises:
        ApiError: 400 when a forced call meets structured output, `ignore_eos` or `min_tokens`, names no tool,
            or has a schema that is none.
    """
    thinking = formats.reasoning and _is_open(body, prompt_text or "")
    calls = formats.tools if body.tools and body.tool_choice != "none" else None
    reasons = thinking or (formats.reasoning and grammar is None)
    rules = PartRules(tools=calls, reasoning=reasons, thinking=thinking)

    def bound(manner: Manner, name: str | None, grammar: str | None) -> ToolPlan:
        bind = after_thought(grammar) if grammar is not None and thinking else grammar
        return ToolPlan(manner=manner, name=name, grammar=bind, rules=rules)

    choice = body.tool_choice
    if not forces(body):
        return bound("free", None, grammar)
    if grammar is not None:
        msg = "tool_choice forces a call, but the answer's form is given too. Leave one of them out."
        raise api_errors.invalid(msg, param="tool_choice")
    check_endings(body, "tool_choice")
    tools = list(body.tools or ())
    if isinstance(choice, NamedTool):
        named = _named(tools, choice.function.name)
        schema = named.function.parameters or ANY_ARGUMENTS
        return bound("one", named.function.name, _compiled(schema))
    if not tools:
        msg = "tool_choice is required, but there are 0 tools"
        raise api_errors.invalid(msg, param="tool_choice")
    each = [_call_schema(tool, place) for place, tool in enumerate(tools)]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": each}}
    if body.parallel_tool_calls is False:
        schema["maxItems"] = 1
    return bound("some", None, _compiled(schema))


def _is_open(body: ChatBody, prompt_text: str) -> bool:
    """Whether the answer begins inside reasoning."""
    if not body.continues:
        return prompt_text.rstrip().endswith(THINK)
    last = body.messages[-1].as_template_input()["content"]
    return last.rfind(THINK) > last.rfind(THINK_END)


def _named(tools: Sequence[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools) or "none"
    msg = f"tool_choice names {name}, but the tools are: {known}"
    raise api_errors.invalid(msg, param="tool_choice")


def _call_schema(tool: Tool, place: int) -> dict[str, Any]:
    """A call of the tool at `place`; its schema's own pointers (`#/$defs/..`) lead to where they now are."""
    parameters = _moved(
        tool.function.parameters or ANY_ARGUMENTS, f"#/items/anyOf/{place}/properties/parameters"
    )
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "parameters": parameters,
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """A copy whose `$ref`s into itself start at `root`."""

    def lead(found: dict[str, Any]) -> dict[str, Any]:
        pointer = found.get("$ref")
        if isinstance(pointer, str) and (pointer == "#" or pointer.startswith("#/")):
            return found | {"$ref": root + pointer[1:]}
        return found

    moved: dict[str, Any] = json.loads(json.dumps(schema), object_hook=lead)
    return moved


def _compiled(schema: dict[str, Any]) -> str:
    return compile_form(Form(field="tools", kind="json", text=json.dumps(schema), compact=True))


class NamedCall:
    """An answer that is the arguments of one function: its text streams as they come."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    called = True

    def push(self, text: str) -> Parts:
        """More of the arguments, with the name the first time."""
        if not text and self._name is None:
            return Parts()
        part, self._name = CallPart(0, name=self._name, arguments=text), None
        return Parts(calls=[part])

    def finish(self) -> Parts:
        """Nothing is held back, but the name when there was no text at all."""
        return Parts() if self._name is None else self.push("")


class CallList:
    """An answer that is a JSON list of calls: shown when it is whole, or as text when cut short."""

    def __init__(self) -> None:
        self._text = ""
        self.called = False

    def push(self, text: str) -> Parts:
        """Nothing yet."""
        self._text += text
        return Parts()

    def finish(self) -> Parts:
        """Every call, arguments written as compact JSON."""
        try:
            found = json.loads(self._text)
        except ValueError:
            return Parts(content=self._text)
        self.called = True
        return Parts(calls=[_call_part(index, call) for index, call in enumerate(found)])


def _call_part(index: int, call: dict[str, Any]) -> CallPart:
    arguments = json.dumps(call["parameters"], ensure_ascii=False)
    return CallPart(index, name=call["name"], arguments=arguments)


class ThoughtFirst:
    """An answer that thinks, and then is calls."""

    def __init__(self, calls: NamedCall | CallList) -> None:
        self._thought = PartReader(PartRules(reasoning=True, thinking=True))
        self._calls = calls
        self._began = False

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return not self._thought.thinking and self._calls.called

    def push(self, text: str) -> Parts:
        """More of the thought, or of the calls."""
        return self._passed(self._thought.push(text))

    def finish(self) -> Parts:
        """What was held back; a thought that has not ended calls nothing."""
        parts = self._passed(self._thought.finish())
        return parts if self._thought.thinking else joined([parts, self._calls.finish()])

    def _passed(self, parts: Parts) -> Parts:
        """Content is the calls' text, without the white space before it."""
        text = parts.content if self._began else parts.content.lstrip()
        self._began = self._began or bool(text)
        found = self._calls.push(text) if text else Parts()
        return Parts(reasoning=parts.reasoning, content=found.content, calls=found.calls)


AnswerParts = PartReader | NamedCall | CallList | ThoughtFirst
