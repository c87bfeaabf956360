"""The parts of a chat answer: reasoning, content and tool calls, cut from its text as it streams. Pure.

The parts are the same whatever pieces a text arrives in: a beginning of a marker is held back until it is one
or is not.

DeepSeek's formats (markers shortened here; below they are as the checkpoints' chat templates write them):

    deepseek_v3    [calls][call]function[sep]NAME, a newline, a fenced json block, [/call] ... [/calls]
    deepseek_v31   [calls][call]NAME[sep]{...}[/call] ... [/calls]
    reasoning      <think>...</think>, whose beginning may already stand at the end of the prompt
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

CALLS_BEGIN: Final = "<｜tool▁calls▁begin｜>"  # noqa: RUF001
CALLS_END: Final = "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL_BEGIN: Final = "<｜tool▁call▁begin｜>"  # noqa: RUF001
CALL_END: Final = "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR: Final = "<｜tool▁sep｜>"  # noqa: RUF001
FENCE: Final = "\n```json\n"
THINK: Final = "<think>"
THINK_END: Final = "</think>"

ToolFormat = Literal["deepseek_v3", "deepseek_v31"]
State = Literal["start", "reasoning", "content", "calls", "kind", "name", "arguments"]


@dataclass
class CallPart:
    """What is new of one tool call: its name comes first, then pieces of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass
class Parts:
    """What some text adds to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is new."""
        return bool(self.reasoning or self.content or self.calls)

    def without_reasoning(self) -> Parts:
        """The others."""
        return Parts(content=self.content, calls=self.calls)

    def call(self, index: int) -> CallPart:
        """The part of call `index`, made when it is not there."""
        if not self.calls or self.calls[-1].index != index:
            self.calls.append(CallPart(index))
        return self.calls[-1]


@dataclass(frozen=True, kw_only=True)
class PartRules:
    """What to look for.

    Attributes:
        tools: format of tool calls; None leaves them in the content.
        reasoning: whether `<think>` begins a part of its own.
        thinking: the prompt ends with `<think>`, so that the answer begins inside it.
    """

    tools: ToolFormat | None = None
    reasoning: bool = False
    thinking: bool = False


class PartReader:
    """Cuts one answer.

    Args:
        rules: what to look for.
    """

    def __init__(self, rules: PartRules) -> None:
        self._rules = rules
        self._rest = ""
        self._name = ""
        self._calls = 0
        self._state: State = "content"
        if rules.reasoning:
            self._state = "reasoning" if rules.thinking else "start"

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    @property
    def thinking(self) -> bool:
        """Whether reasoning goes on."""
        return self._state == "reasoning"

    def push(self, text: str) -> Parts:
        """What `text` adds, but for what may be the beginning of a marker."""
        self._rest += text
        parts = Parts()
        while self._step(parts):
            pass
        return parts

    def finish(self) -> Parts:
        """What was held back; an unfinished call keeps what it has."""
        parts = Parts()
        text, self._rest = self._rest, ""
        if self._state == "start":
            self._state = "content"
        self._emit(parts, text)
        return parts

    def _step(self, parts: Parts) -> bool:
        """Advance as far as one marker; False when more text is needed."""
        if self._state == "start":
            return self._begin()
        found = self._cut(self._markers())
        self._emit(parts, found[0])
        if found[1] is None:
            return False
        self._pass(found[1], parts)
        return True

    def _begin(self) -> bool:
        """Reasoning, when the answer begins with `<think>`; content otherwise."""
        beginning = self._rest.lstrip()
        if beginning.startswith(THINK):
            self._rest = beginning[len(THINK) :]
            self._state = "reasoning"
            return True
        if THINK.startswith(beginning):
            return False
        self._state = "content"
        return True

    def _markers(self) -> tuple[str, ...]:
        tools = self._rules.tools
        return {
            "start": (),
            "reasoning": (THINK_END,),
            "content": (CALLS_BEGIN,) if tools else (),
            "calls": (CALL_BEGIN, CALLS_END),
            "kind": (SEPARATOR,),
            "name": (FENCE,) if tools == "deepseek_v3" else (SEPARATOR,),
            "arguments": ("\n```" + CALL_END, CALL_END) if tools == "deepseek_v3" else (CALL_END,),
        }[self._state]

    def _cut(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """Text before the first marker, and the marker; without one, the text that cannot belong to any."""
        places = [(self._rest.find(marker), marker) for marker in markers if marker in self._rest]
        if places:
            at, marker = min(places)
            text, self._rest = self._rest[:at], self._rest[at + len(marker) :]
            return text, marker
        held = max((_overlap(self._rest, marker) for marker in markers), default=0)
        at = len(self._rest) - held
        text, self._rest = self._rest[:at], self._rest[at:]
        return text, None

    def _emit(self, parts: Parts, text: str) -> None:
        """Put text where the state says; names are kept until they are whole, fillers are dropped."""
        if not text:
            return
        if self._state == "reasoning":
            parts.reasoning += text
        elif self._state == "content":
            parts.content += text
        elif self._state == "name":
            self._name += text
        elif self._state == "arguments":
            parts.call(self._calls - 1).arguments += text

    def _pass(self, marker: str, parts: Parts) -> None:
        """Enter the state that follows `marker`."""
        if marker == CALL_BEGIN:
            self._name = ""
            self._state = "kind" if self._rules.tools == "deepseek_v3" else "name"
        elif self._state == "kind":
            self._state = "name"
        elif self._state == "name":
            self._calls += 1
            parts.call(self._calls - 1).name = self._name.strip()
            self._state = "arguments"
        else:
            self._state = "content" if marker in (THINK_END, CALLS_END) else "calls"


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def joined(parts: Iterable[Parts]) -> Parts:
    """One after another; pieces of one call become one."""
    whole = Parts()
    for each in parts:
        whole.reasoning += each.reasoning
        whole.content += each.content
        for call in each.calls:
            known = whole.call(call.index)
            known.name = known.name if call.name is None else call.name
            known.arguments += call.arguments
    return whole
