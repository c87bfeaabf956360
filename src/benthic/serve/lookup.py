"""Drafts without a model: what followed the newest tokens where they stood before (prompt lookup).

Saxena 2023, "Prompt Lookup Decoding". Good where an answer repeats its prompt: code edits, summaries,
extraction. Everything happens on the host, in ints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class PromptLookup:
    """One sequence and where each of its runs of tokens was last followed by something.

    Args:
        tokens: the sequence so far.
        least: shortest run to look up.
        most: longest run; longer ones are looked up first.

    Cost: `most - least + 1` dictionary entries a token, and as many look-ups a draft.
    """

    __slots__ = ("_followed", "_least", "_most", "_tokens")

    def __init__(self, tokens: Sequence[int], *, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; the runs that ended before each of them now have a successor."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(self._least, min(self._most, end) + 1):
                self._followed[tuple(self._tokens[end - length : end])] = end
            self._tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known run at the end; none if no run was seen."""
        end = len(self._tokens)
        for length in range(min(self._most, end), self._least - 1, -1):
            found = self._followed.get(tuple(self._tokens[end - length :]))
            if found is not None:
                return self._tokens[found : found + count]
        return []
