"""Conversations from JSONL, rendered through the tokenizer's chat template; only replies are learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from benthic.train.data.tokenizer import Tokenizer

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One line of a file, named `file:line`. `tools` reach the template as they are."""

    name: str
    messages: tuple[Message, ...]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text; `learned` if the model is to produce it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Example:
    """A conversation as tokens; `learned` says which of them are to be learned."""

    ids: list[int]
    learned: list[bool]
    text: str
    learned_bytes: int


def read_conversations(sources: Sequence[Path]) -> Iterator[Conversation]:
    """Every line of the files that is not blank.

    A line is an object with `messages`, a list of `{"role", "content"}` as the OpenAI API takes them, and
    optionally `tools`. `"weight": 0` on a reply leaves it out of what is learned.

    Raises:
        DataError: a file is missing or a line is malformed; file and line are named.
    """
    for path in sources:
        if not path.is_file():
            msg = f"{path} is no file. Give JSONL files, one conversation a line."
            raise DataError(msg)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(line, f"{path}:{number}")


class ChatRenderer:
    """Renders conversations with the template of a tokenizer's folder.

    Raises:
        DataError: the folder has no template, or transformers cannot open it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import transformers  # noqa: PLC0415 (takes seconds; only conversations need it)

        self._tokenizer = tokenizer
        try:
            self._template = transformers.AutoTokenizer.from_pretrained(str(tokenizer.path))
        except (OSError, ValueError) as error:
            msg = f"{tokenizer.path} cannot be opened by transformers: {error}"
            raise DataError(msg) from error
        if not self._template.chat_template:
            msg = f"{tokenizer.path} has no chat template. Add a chat_template.jinja, or take a chat model's."
            raise DataError(msg)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Prompt and reply in turns, up to the last reply.

        A reply is what the template puts after the prompt that a server would answer: its end token too.

        Raises:
            DataError: the template refuses the messages, or renders earlier turns otherwise once later ones
                follow, so that no reply can be told from its prompt.
        """
        found, done = [], ""
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(conversation, number, prompt=True)
            reply = self._render(conversation, number + 1, prompt=False)
            for before, after in pairwise((done, prompt, reply)):
                if not after.startswith(before):
                    raise _rewritten(conversation, number)
            found.append(Segment(prompt[len(done) :], learned=False))
            found.append(Segment(reply[len(prompt) :], learned=message.get("weight", 1) != 0))
            done = reply
        return found

    def example(self, conversation: Conversation, max_tokens: int = 0) -> Example | None:
        """The tokens of a conversation, each segment tokenized by itself, as a server does with a prompt.

        With more than `max_tokens` (0: no limit) it ends with the last reply that still fits; None when not
        even the first does, or what is left has nothing to learn.
        """
        ids: list[int] = []
        learned: list[bool] = []
        segments = self.segments(conversation)
        ends = [(0, 0)]
        for number, segment in enumerate(segments, 1):
            here = self._tokenizer.rules.encode(segment.text, add_special_tokens=False).ids
            ids += here
            learned += [segment.learned] * len(here)
            if number % 2 == 0 and (max_tokens == 0 or len(ids) <= max_tokens):
                ends.append((number, len(ids)))
        kept, tokens = ends[-1]
        if not any(learned[:tokens]):
            return None
        texts = [s.text for s in segments[:kept] if s.learned]
        return Example(
            ids=ids[:tokens],
            learned=learned[:tokens],
            text="".join(s.text for s in segments),
            learned_bytes=sum(len(text.encode()) for text in texts),
        )

    def _render(self, conversation: Conversation, count: int, *, prompt: bool) -> str:
        import jinja2  # noqa: PLC0415 (comes with transformers' templates)

        try:
            return self._template.apply_chat_template(
                list(conversation.messages[:count]),
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            msg = f"{conversation.name}: the chat template refuses messages 1 to {count}: {error}"
            raise DataError(msg) from error


def _conversation(line: bytes, name: str) -> Conversation:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad UTF-8 too
        msg = f"{name} is not JSON: {error}. One object with messages a line is expected."
        raise DataError(msg) from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        held = (
            f"an object with {', '.join(row) or 'nothing'}" if isinstance(row, dict) else type(row).__name__
        )
        msg = f"{name} holds {held}, not an object with a list of messages."
        raise DataError(msg)
    for number, message in enumerate(messages, 1):
        problem = _problem(message)
        if problem:
            msg = f"{name}: message {number} of {len(messages)} {problem}"
            raise DataError(msg)
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        msg = f"{name}: none of {len(messages)} messages is a reply to learn. Give one with role 'assistant'."
        raise DataError(msg)
    return Conversation(name, tuple(messages), row.get("tools"))


def _problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}, not an object with role and content."
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has role {role!r}; known are {', '.join(ROLES)}."
    if not isinstance(content, str) and not _calls_tools(message):
        return f"has content of {type(content).__name__}, not text."
    if message.get("weight", 1) not in {0, 1}:
        return f"has weight {message['weight']!r}; a reply is learned (1) or not (0)."
    return None


def _calls_tools(message: Mapping[str, Any]) -> bool:
    """A reply that only calls tools has no text."""
    return (
        message["role"] == "assistant" and message.get("content") is None and bool(message.get("tool_calls"))
    )


def _rewritten(conversation: Conversation, number: int) -> DataError:
    return DataError(
        f"{conversation.name}: the chat template renders what comes before message {number + 1} of "
        f"{len(conversation.messages)} otherwise than it did before that message, as templates do that drop "
        "reasoning from earlier turns. Give one line for each reply, each ending with it."
    )
