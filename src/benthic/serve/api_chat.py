"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from benthic.serve import api_errors, kv_params
from benthic.serve.chat_parts import CallPart, Parts, joined
from benthic.serve.detokenize import StopRule
from benthic.serve.generation import Asked, Piece
from benthic.serve.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from benthic.serve.messages import Generate
from benthic.serve.protocol_responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from benthic.serve.sampling_defaults import sampling_params
from benthic.serve.service import Prompt, Service, Tally, new_id
from benthic.serve.tools import shown_tools

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from benthic.serve.protocol_requests import ChatBody, TemplateBody
    from benthic.serve.protocol_responses import ChatFinishReason, ChatLogprob, Usage
    from benthic.serve.tools import ToolPlan


async def render_prompt(service: Service, body: TemplateBody, *, add_special_tokens: bool = False) -> Prompt:
    """Messages through the chat template and the tokenizer; the template writes the special tokens itself.

    Raises:
        ApiError: 400 when there is no template, or none that shows tools.
        TemplateRenderError: the template refuses the messages.
    """
    template = service.template
    if template is None:
        msg = (
            "the served model has no chat template. Use /v1/completions, or start the server with "
            "--chat-template FILE."
        )
        raise api_errors.invalid(msg, param="messages", code="no_chat_template")
    plain = [message.as_template_input() for message in body.messages or ()]
    tools = shown_tools(body, service.settings.formats)
    text = await service.in_thread(
        lambda: template.render(
            plain,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final=body.continues,
            variables=body.chat_template_kwargs,
            tools=tools,
        )
    )
    return await service.encode(text, add_special_tokens=add_special_tokens)


class ChatJob:
    """One request: its sequences, and how their pieces become chunks.

    Args:
        service: the server's state.
        body: the request.
        prompt: the rendered conversation.
        plan: what binds the answers and how they are read.
    Raises: ApiError 400 for what only the model's sizes can tell.
    """

    def __init__(self, service: Service, body: ChatBody, prompt: Prompt, plan: ToolPlan) -> None:
        self._service = service
        self._body = body
        self._prompt = prompt
        self._plan = plan
        self._names = TokenNames(service.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._tally = Tally([prompt], body.n or 1)
        self._id = new_id("chatcmpl")
        self._created = int(service.wall())
        self._readers = [plan.reader() for _ in range(body.n or 1)]
        self.asked = [self._ask(index) for index in range(body.n or 1)]

    async def collect(self, arrival_s: float) -> ChatCompletion:
        """The whole answer."""
        parts: dict[int, list[Piece]] = {asked.index: [] for asked in self.asked}
        async with aclosing(self.pieces(arrival_s)) as pieces:
            async for piece in pieces:
                self._tally.take(piece)
                parts[piece.index].append(piece)
        remote = parts[0][-1].remote
        rows, best = parts[0][0].prompt_logprobs, self._body.prompt_logprobs
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=[self._merge(pieces) for pieces in parts.values()],
            usage=self._tally.usage(),
            prompt_logprobs=None
            if rows is None or best is None
            else prompt_logprobs(rows, self._names, best),
            prompt_token_ids=list(self._prompt.ids) if self._body.return_token_ids else None,
            kv_transfer_params=kv_params.write(remote),
        )

    async def events(self, arrival_s: float) -> AsyncGenerator[bytes]:
        """The answer's chunks as JSON: the role once a choice, then text, then the reason it ended."""
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        greeted: set[int] = set()
        async with aclosing(self.pieces(arrival_s)) as pieces:
            async for piece in pieces:
                self._tally.take(piece)
                if piece.index not in greeted:
                    yield self._chunk([_greeting(piece.index)], usage=continuous, prompt=not greeted)
                    greeted.add(piece.index)
                choice = self._chunk_choice(piece)
                if choice is not None:
                    yield self._chunk([choice], usage=continuous)
        if include_usage:
            yield self._chunk([], usage=True)

    def pieces(self, arrival_s: float) -> AsyncGenerator[Piece]:
        """What the engine says; see `Service.generate`."""
        return self._service.generate(self.asked, arrival_s, timeout_s=self._body.timeout_s)

    def _ask(self, index: int) -> Asked:
        body = self._body
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        budget = self._service.output_budget(self._prompt, wanted, None, param="messages")
        params = sampling_params(
            body,
            self._service.settings.defaults,
            self._service.ready,
            max_tokens=budget,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            nth=index,
            grammar=self._plan.grammar,
        )
        hold, pull = kv_params.read(
            body.kv_transfer_params,
            offered=self._service.settings.kv_transfer,
            sequences=body.n or 1,
            prompt_tokens=len(self._prompt.ids),
        )
        return Asked(
            index=index,
            request=Generate(
                request_id=f"{self._id}-{index}",
                prompt=self._prompt.ids,
                params=params,
                priority=body.priority or 0,
                hold=hold,
                pull=pull,
            ),
            stop=StopRule(strings=body.stop_strings, include=bool(body.include_stop_str_in_output)),
            # the markers of tool calls are control symbols in some vocabularies
            skip_special_tokens=body.skip_special_tokens is not False and self._plan.rules.tools is None,
        )

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        rows = [row for piece in pieces for row in piece.logprobs or ()]
        return chat_logprobs(rows, self._names, self._body.top_logprobs or 0)

    def _merge(self, pieces: Sequence[Piece]) -> ChatChoice:
        reader = self._readers[pieces[0].index]
        whole = joined([self.read(piece) for piece in pieces])
        calls = [
            ToolCall(id=new_id("call"), function=FunctionCall(name=call.name or "", arguments=call.arguments))
            for call in whole.calls
        ]
        return ChatChoice(
            index=pieces[0].index,
            message=AssistantMessage(
                content=whole.content or (None if calls else ""),
                reasoning_content=whole.reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=self._logprobs(pieces),
            finish_reason=_reason(pieces[-1], called=reader.called),
            stop_reason=pieces[-1].stop_reason,
            token_ids=self._token_ids(pieces),
        )

    def _token_ids(self, pieces: Sequence[Piece]) -> list[int] | None:
        """If they were asked for."""
        return [token for piece in pieces for token in piece.tokens] if self._body.return_token_ids else None

    def _chunk_choice(self, piece: Piece) -> ChatChunkChoice | None:
        """What a piece shows; None when its text is held back and it carries nothing else."""
        parts, ids = self.read(piece), self._token_ids([piece])
        if not (parts or ids) and piece.logprobs is None and piece.finish_reason is None:
            return None
        choice = ChatChunkChoice(
            index=piece.index,
            delta=_delta(parts),
            logprobs=self._logprobs([piece]),
            finish_reason=_reason(piece, called=self._readers[piece.index].called),
            stop_reason=piece.stop_reason,
        )
        if ids is not None:
            choice.token_ids = ids
        return choice

    def read(self, piece: Piece) -> Parts:
        """What a piece adds to its answer; the last one flushes what was held back."""
        reader = self._readers[piece.index]
        parts = reader.push(piece.text)
        if piece.finish_reason is not None:
            parts = joined([parts, reader.finish()])
        return parts.without_reasoning() if self._body.include_reasoning is False else parts

    def rows(self, piece: Piece) -> list[ChatLogprob]:
        """A piece's log-probabilities, if they were asked for."""
        found = self._logprobs([piece])
        return [] if found is None else found.content

    def count(self, piece: Piece) -> Usage:
        """Usage up to and including a piece."""
        self._tally.take(piece)
        return self._tally.usage()

    def _chunk(self, choices: list[ChatChunkChoice], *, usage: bool, prompt: bool = False) -> bytes:
        """JSON of one chunk, which shows what it adds; the first has the ids of the prompt if asked for."""
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=self._tally.usage() if usage else None,
        )
        if prompt and self._body.return_token_ids:
            chunk.prompt_token_ids = list(self._prompt.ids)
        return chunk.model_dump_json(exclude_unset=True).encode()


def _greeting(index: int) -> ChatChunkChoice:
    delta = ChatDelta(role="assistant", content="")
    return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def _reason(piece: Piece, *, called: bool) -> ChatFinishReason | None:
    """Why the answer ended: a model that stops after a call has called a tool."""
    if called and piece.finish_reason == "stop":
        return "tool_calls"
    return piece.finish_reason  # type: ignore[return-value]


def _delta(parts: Parts) -> ChatDelta:
    """Only what is new is set; a chunk without anything new carries an empty text."""
    delta = ChatDelta()
    if parts.reasoning:
        delta.reasoning_content = parts.reasoning
    if parts.calls:
        delta.tool_calls = [_call_delta(call) for call in parts.calls]
    if parts.content or not parts:
        delta.content = parts.content
    return delta


def _call_delta(call: CallPart) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    return ToolCallDelta(index=call.index, id=new_id("call"), type="function", function=function)
