"""POST /v1/responses: a chat whose answer is a list of items, or events about them."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from benthic.errors import BenthicError
from benthic.serve import api_errors
from benthic.serve.protocol_items import (
    IncompleteDetails,
    InputCall,
    InputCallOutput,
    InputDetails,
    InputMessage,
    InputReasoning,
    OutputDetails,
    ResponseObject,
    ResponseUsage,
)
from benthic.serve.protocol_requests import ChatBody
from benthic.serve.response_items import Output
from benthic.serve.service import new_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from benthic.serve.api_chat import ChatJob
    from benthic.serve.protocol_items import InputItem, ResponsesBody, ResponseTool, Status, TextFormat
    from benthic.serve.protocol_responses import Usage
    from benthic.serve.response_items import Event
    from benthic.serve.service import Service

Fields = dict[str, Any]

SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "priority", "timeout_s",
    "parallel_tool_calls", "stream",
)  # fmt: skip
"""Fields that mean the same in a chat."""


def as_chat(body: ResponsesBody) -> ChatBody:
    """What would have been sent to /v1/chat/completions. Raises: ApiError 400 when nothing is said in it."""
    messages = list(_messages(body))
    if not messages:
        msg = "input holds 0 messages, but at least 1 is needed"
        raise api_errors.invalid(msg, param="input")
    text_format = None if body.text is None else body.text.format
    return ChatBody.model_validate(
        {
            **{name: getattr(body, name) for name in SAME},
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": body.wants_logprobs or None,
            "top_logprobs": body.top_logprobs,
            "tools": [_tool(tool) for tool in body.tools or ()] or None,
            "tool_choice": _tool_choice(body),
            "response_format": None if text_format is None else _response_format(text_format),
        }
    )


def _messages(body: ResponsesBody) -> Iterator[Fields]:
    if body.instructions is not None:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
    else:
        yield from _conversation(body.input)


def _conversation(items: Sequence[InputItem]) -> Iterator[Fields]:
    """Messages of items; calls in a row belong to one message, with the assistant's words before them."""
    said: str | None = None
    calls: list[Fields] = []
    for item in items:
        if isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
            continue
        if calls or (said is not None and not isinstance(item, InputReasoning)):
            yield {"role": "assistant", "content": said, "tool_calls": calls or None}
            said, calls = None, []
        if isinstance(item, InputCallOutput):
            yield {"role": "tool", "content": item.text, "tool_call_id": item.call_id}
        elif isinstance(item, InputMessage) and item.role == "assistant":
            said = item.text
        elif isinstance(item, InputMessage):
            yield {"role": item.role, "content": item.text}
    if calls or said is not None:
        yield {"role": "assistant", "content": said, "tool_calls": calls or None}


def _tool(tool: ResponseTool) -> Fields:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _tool_choice(body: ResponsesBody) -> str | Fields | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(asked: TextFormat) -> Fields:
    if asked.schema_ is None:
        return {"type": asked.type}
    return {"type": asked.type, "json_schema": {"name": asked.name, "schema": asked.schema_}}


class ResponseJob:
    """One request: its chat, and how the chat's pieces become items.

    Args:
        service: the server's state.
        body: the request.
        chat: the chat that it asks for.
    """

    def __init__(self, service: Service, body: ResponsesBody, chat: ChatJob) -> None:
        self._service = service
        self._body = body
        self._chat = chat
        self._id = new_id("resp")
        self._created = int(service.wall())
        self._output = Output()
        self._usage: Usage | None = None
        self._cut = False
        self._number = 0
        self._encode = msgspec.json.Encoder().encode

    async def collect(self, arrival_s: float) -> ResponseObject:
        """The whole answer."""
        async with aclosing(self._events(arrival_s)) as events:
            async for _ in events:
                pass
        return self._response(self._status)

    async def events(self, arrival_s: float) -> AsyncGenerator[bytes]:
        """Frames of server-sent events. What fails before the first one is raised, later it is an event."""
        began = False
        try:
            async with aclosing(self._events(arrival_s)) as events:
                async for event in events:
                    if not began:
                        began = True
                        yield self._frame(self._about("response.created", "in_progress"))
                        yield self._frame(self._about("response.in_progress", "in_progress"))
                    yield self._frame(event)
        except BenthicError as error:
            if not began:
                raise
            failure = api_errors.of(error)
            self._service.metrics.refused(failure.status)
            words = {"code": failure.code, "message": str(failure), "param": failure.param}
            yield self._frame({"type": "error", **words})
            return
        yield self._frame(self._about(f"response.{self._status}", self._status))

    async def _events(self, arrival_s: float) -> AsyncGenerator[Event]:
        async with aclosing(self._chat.pieces(arrival_s)) as pieces:
            async for piece in pieces:
                self._usage = self._chat.count(piece)
                parts, rows = self._chat.read(piece), self._chat.rows(piece)
                for event in self._output.push(parts, len(piece.tokens), rows):
                    yield event
                self._cut = piece.finish_reason == "length"
        for event in self._output.finish(complete=not self._cut):
            yield event

    @property
    def _status(self) -> Status:
        return "incomplete" if self._cut else "completed"

    def _about(self, kind: str, status: Status) -> Event:
        """An event that carries the whole response, as it was at the beginning or as it is at the end."""
        response = self._response(status)
        if status == "in_progress":
            response.output, response.usage = [], None
        return {"type": kind, "response": response.model_dump()}

    def _frame(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\ndata: ".encode() + self._encode(numbered) + b"\n\n"

    def _response(self, status: Status) -> ResponseObject:
        body, defaults = self._body, self._service.settings.defaults
        choice = body.tool_choice
        text_format = None if body.text is None else body.text.format
        shown = {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True)
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=self._service.model_name,
            output=list(self._output.items),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            text={"format": _without_none(shown)},
            tool_choice=choice if isinstance(choice, str) else _chosen(choice),
            tools=[tool.model_dump() for tool in body.tools or ()],
            metadata=body.metadata or {},
            usage=None if self._usage is None else self._written_usage(self._usage),
        )

    def _written_usage(self, usage: Usage) -> ResponseUsage:
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._output.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


def _chosen(choice: Any) -> str | dict[str, Any]:
    return "auto" if choice is None else choice.model_dump()


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
