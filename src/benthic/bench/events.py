"""From the bytes of a streamed answer to deliveries of tokens. Pure: bytes and times in, an answer out."""

from __future__ import annotations

from typing import Any

import msgspec

from benthic.bench.samples import Answer, Delivery

DONE = b"[DONE]"


class Delta(msgspec.Struct):
    """What a chat chunk adds; every spelling of reasoning that servers use."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    """The part of a choice that this client reads."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def shows(self) -> bool:
        """Whether a token can be seen in it: a role or an empty text is none."""
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class Usage(msgspec.Struct):
    """Token counts so far."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """One event. `error` is what a server sends in the middle of a stream; its shape differs by server."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


class EventReader:
    """Cuts a byte stream into the payloads of its server-sent events, wherever the pieces were cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads of the `data:` lines that are complete now; comments and other fields are skipped."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        payloads = (line[5:].strip() for line in lines if line.startswith(b"data:"))
        return [payload for payload in payloads if payload]


class AnswerReader:
    """Adds up one streamed answer.

    The first token is the first chunk that shows one, or that the server counts as one: a chunk with a role
    and no text is not. Where chunks carry running usage, each delivery has its exact number of tokens;
    elsewhere a chunk with text counts as one token and the total comes from the last chunk's usage.
    """

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._events = EventReader()
        self._deliveries: list[Delivery] = []
        self._prompt_tokens: int | None = None
        self._total: int | None = None
        self._seen = 0
        self._running = False
        self._finished = False
        self._error: str | None = None

    def feed(self, at_s: float, data: bytes) -> None:
        """Bytes that arrived at `at_s`."""
        for payload in self._events.feed(data):
            if payload == DONE:
                self._finished = True
            else:
                self._take(at_s, payload)

    def end(self, at_s: float) -> Answer:
        """The answer, complete or not."""
        total = self._seen if self._total is None else self._total
        return Answer(
            sent_s=self._sent_s,
            ended_s=at_s,
            deliveries=tuple(self._deliveries),
            prompt_tokens=self._prompt_tokens,
            output_tokens=total,
            counted=self._running,
            error=self._error or self._missing(),
        )

    def _missing(self) -> str | None:
        if not self._finished:
            return "the stream ended before the answer did"
        return None if self._deliveries else "the answer held no token"

    def _take(self, at_s: float, payload: bytes) -> None:
        try:
            chunk = _decode(payload)
        except msgspec.MsgspecError as error:
            self._error = f"an event is not a chunk of an answer: {error}"
            return
        if chunk.error is not None:
            self._error = f"error in the stream: {error_text(chunk.error)}"
        counted = self._count(chunk)
        tokens = counted if counted is not None else sum(choice.shows for choice in chunk.choices)
        if tokens > 0:
            self._seen += tokens
            self._deliveries.append(Delivery(at_s=at_s, tokens=tokens))
        if any(choice.finish_reason for choice in chunk.choices):
            self._finished = True

    def _count(self, chunk: Chunk) -> int | None:
        """New tokens by the server's own count; None where the chunk does not say."""
        usage = chunk.usage
        if usage is None or usage.completion_tokens is None:
            return None
        self._prompt_tokens = usage.prompt_tokens
        self._total = usage.completion_tokens
        if not chunk.choices:
            return 0 if self._running or self._deliveries else None
        self._running = True
        return usage.completion_tokens - self._seen


def error_text(error: Any) -> str:
    """The words of an error object, shortened."""
    words = error.get("message", error) if isinstance(error, dict) else error
    return str(words)[:200]
