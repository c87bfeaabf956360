"""Token ids to text while they arrive: whole characters only, and never a stop string."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.serve.tokenizer import Tokenizer


class Detokenizer:
    """Joins the bytes of tokens into text.

    A character whose bytes are spread over several tokens appears with the last of them; what is still
    incomplete at the end becomes U+FFFD, exactly as decoding everything at once would show it.
    Cost: proportional to the new bytes, however long the text already is.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strip_first_space

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        new = b"".join(self._bytes_of.get(token, b"") for token in tokens if token not in self._hidden)
        return self._first(self._decoder.decode(new))

    def finish(self) -> str:
        """What incomplete bytes come to."""
        return self._first(self._decoder.decode(b"", final=True))

    def _first(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Strings that end the text; the text stops before the string, or after it with `include`."""

    strings: tuple[str, ...] = ()
    include: bool = False


class StopMatcher:
    """Lets text through up to the first stop string, wherever token borders fall.

    Held back is only the longest ending that some stop string begins with, so text without a stop string in
    sight is never delayed. Cost per push: the new text plus a tail shorter than the longest stop string.
    """

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._tail = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now; `matched` is set when a stop string completed."""
        if not self._rule.strings:
            return text
        held = self._tail + text
        found = [(at, stop) for stop in self._rule.strings if (at := held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=_earliest)
            self._tail = ""
            return held[: at + len(self.matched)] if self._rule.include else held[:at]
        keep = self._overlap(held)
        self._tail = held[len(held) - keep :]
        return held[: len(held) - keep]

    def pass_through(self, text: str) -> str:
        """Text that is not searched (before `min_tokens`)."""
        shown, self._tail = self._tail + text, ""
        return shown

    def finish(self) -> str:
        """The held-back tail: no stop string will complete any more."""
        return self.pass_through("")

    def _overlap(self, held: str) -> int:
        """Length of the longest ending of `held` that begins a stop string."""
        longest = max(len(stop) for stop in self._rule.strings) - 1
        for length in range(min(longest, len(held)), 0, -1):
            ending = held[-length:]
            if any(stop.startswith(ending) for stop in self._rule.strings):
                return length
        return 0


def _earliest(found: tuple[int, str]) -> tuple[int, int]:
    """The match that ends first; of two that end together, the longer."""
    at, stop = found
    return (at + len(stop), at)
