"""The parts of an answer as the items of /v1/responses, and the events that tell of them. Pure.

An item opens when its first text comes and closes when another begins or the answer ends:

    response.output_item.added
        response.content_part.added
            response.output_text.delta …, response.output_text.done
        response.content_part.done
    response.output_item.done

Reasoning says `reasoning_text` for `output_text`; calls have no parts, and `function_call_arguments` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benthic.serve.protocol_items import OutputCall, OutputMessage, OutputReasoning, OutputText, ReasoningText
from benthic.serve.service import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benthic.serve.chat_parts import CallPart, Parts
    from benthic.serve.protocol_items import OutputItem, Status
    from benthic.serve.protocol_responses import ChatLogprob

Event = dict[str, Any]


class Output:
    """The items of one answer. `items` is what there is so far."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self.reasoning_tokens = 0
        self._part: OutputText | ReasoningText | None = None
        self._call: OutputCall | None = None
        self._call_index = -1
        self._logprobs: list[ChatLogprob] = []

    def push(self, parts: Parts, tokens: int, logprobs: Sequence[ChatLogprob]) -> Iterator[Event]:
        """Add what `tokens` more tokens said; log-probabilities go to the message that shows them."""
        self._logprobs += logprobs
        if parts.reasoning:
            yield from self._push_reasoning(parts.reasoning)
        if parts.content:
            yield from self._push_content(parts.content)
        for call in parts.calls:
            yield from self._push_call(call)
        if isinstance(self._part, ReasoningText):
            self.reasoning_tokens += tokens
            self._logprobs.clear()

    def finish(self, *, complete: bool) -> Iterator[Event]:
        """Close what is open; an answer without anything is an empty message."""
        if not self.items:
            yield from self._begin_text(OutputText())
        yield from self._close("completed" if complete else "incomplete")

    def _push_reasoning(self, text: str) -> Iterator[Event]:
        if not isinstance(self._part, ReasoningText):
            yield from self._begin_text(ReasoningText())
        yield from self._add("response.reasoning_text.delta", text)

    def _push_content(self, text: str) -> Iterator[Event]:
        if not isinstance(self._part, OutputText):
            yield from self._begin_text(OutputText())
        if isinstance(self._part, OutputText):
            self._part.logprobs += self._logprobs
        rows, self._logprobs = _dumped(self._logprobs), []
        yield from self._add("response.output_text.delta", text, logprobs=rows)

    def _add(self, kind: str, text: str, **fields: object) -> Iterator[Event]:
        if self._part is not None:
            self._part.text += text
            yield self._event(kind, content_index=0, delta=text, **fields)

    def _begin_text(self, part: OutputText | ReasoningText) -> Iterator[Event]:
        if isinstance(part, OutputText):
            yield from self._begin(OutputMessage(id=new_id("msg"), content=[part]))
        else:
            yield from self._begin(OutputReasoning(id=new_id("rs"), content=[part]))
        self._part = part
        yield self._event("response.content_part.added", content_index=0, part=part.model_dump())

    def _push_call(self, call: CallPart) -> Iterator[Event]:
        if self._call is None or call.index != self._call_index:
            began = OutputCall(id=new_id("fc"), call_id=new_id("call"), name=call.name or "")
            yield from self._begin(began)
            self._call, self._call_index = began, call.index
        if call.arguments:
            self._call.arguments += call.arguments
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        """Open an item; one that is open closes. Its content comes with events of its own."""
        yield from self._close("completed")
        self.items.append(item)
        shown = item.model_dump()
        if "content" in shown:
            shown["content"] = []
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _close(self, status: Status) -> Iterator[Event]:
        if self._part is None and self._call is None:
            return
        if self._part is not None:
            yield from self._close_text(self._part)
        if self._call is not None:
            name, arguments = self._call.name, self._call.arguments
            yield self._event("response.function_call_arguments.done", name=name, arguments=arguments)
        self._part = self._call = None
        item = self.items[-1]
        item.status = status
        place = len(self.items) - 1
        yield {"type": "response.output_item.done", "output_index": place, "item": item.model_dump()}

    def _close_text(self, part: OutputText | ReasoningText) -> Iterator[Event]:
        if isinstance(part, OutputText):
            part.logprobs += self._logprobs
            self._logprobs = []
            rows = _dumped(part.logprobs)
            yield self._event("response.output_text.done", content_index=0, text=part.text, logprobs=rows)
        else:
            yield self._event("response.reasoning_text.done", content_index=0, text=part.text)
        yield self._event("response.content_part.done", content_index=0, part=part.model_dump())

    def _event(self, kind: str, /, **fields: object) -> Event:
        return {"type": kind, "item_id": self.items[-1].id, "output_index": len(self.items) - 1, **fields}


def _dumped(rows: Sequence[ChatLogprob]) -> list[dict[str, Any]]:
    return [row.model_dump() for row in rows]
