"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benthic.serve.detokenize import Detokenizer
from benthic.serve.protocol_responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

if TYPE_CHECKING:
    from benthic.serve.messages import TokenLogprob
    from benthic.serve.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity (a token forbidden by a logit bias), which JSON cannot write."""

Row = Sequence["TokenLogprob"]


def finite(logprob: float) -> float:
    """The log-probability as JSON can carry it."""
    return max(logprob, LEAST)


def best_of(row: Row, count: int) -> list[TokenLogprob]:
    """The `count` best tokens of a row, best first; a row holds the chosen token and then the best."""
    distinct = {entry.token: entry for entry in row}
    return sorted(distinct.values(), key=lambda entry: entry.rank)[:count]


class TokenNames:
    """How a token is written in an answer: as its text, or as `token_id:7`."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token: int) -> str:
        """The token's name."""
        return f"token_id:{token}" if self._as_ids else self._tokenizer.text_of(token)

    def bytes_of(self, token: int) -> list[int]:
        """The token's bytes."""
        return list(self._tokenizer.bytes_of.get(token, b""))


class CompletionLogprobWriter:
    """Writes the parallel lists of /v1/completions for one choice, keeping count of the text's offset.

    `text_offset` counts characters of the choice's text. A token that ends in the middle of a character
    starts where that character will appear.
    """

    def __init__(self, tokenizer: Tokenizer, names: TokenNames, *, best: int, skip_special: bool) -> None:
        self._names = names
        self._best = best
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special)
        self._offset = 0

    def write(self, tokens: Sequence[int], rows: Sequence[Row]) -> CompletionLogprobs:
        """Entries for `tokens`; an empty row (the first prompt token) gives nulls."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push((token,)))
        return CompletionLogprobs(
            tokens=[self._names(token) for token in tokens],
            token_logprobs=[finite(row[0].logprob) if row else None for row in rows],
            top_logprobs=[self._top(row) if row else None for row in rows],
            text_offset=offsets,
        )

    def _top(self, row: Row) -> dict[str, float]:
        """The best tokens and the chosen one; of tokens that look alike the better stays."""
        top: dict[str, float] = {}
        for entry in (*best_of(row, self._best), row[0]):
            top.setdefault(self._names(entry.token), finite(entry.logprob))
        return top


def join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """One set of lists from consecutive parts."""
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )


def chat_logprobs(rows: Sequence[Row], names: TokenNames, best: int) -> ChatLogprobs:
    """The list of /v1/chat/completions."""
    return ChatLogprobs(content=[_chat_entry(row, names, best) for row in rows])


def _chat_entry(row: Row, names: TokenNames, best: int) -> ChatLogprob:
    chosen = _top_entry(row[0], names)
    return ChatLogprob(
        token=chosen.token,
        logprob=chosen.logprob,
        bytes=chosen.bytes,
        top_logprobs=[_top_entry(entry, names) for entry in best_of(row, best)],
    )


def _top_entry(entry: TokenLogprob, names: TokenNames) -> TopLogprob:
    return TopLogprob(
        token=names(entry.token), logprob=finite(entry.logprob), bytes=names.bytes_of(entry.token)
    )


def prompt_logprobs(rows: Sequence[Row], names: TokenNames, best: int) -> PromptLogprobs:
    """VLLM's shape: one object per prompt position, from token id to its values; null for the first."""
    return [_prompt_entry(row, names, best) if row else None for row in rows]


def _prompt_entry(row: Row, names: TokenNames, best: int) -> dict[str, PromptLogprob]:
    return {
        str(entry.token): PromptLogprob(
            logprob=finite(entry.logprob), rank=entry.rank, decoded_token=names(entry.token)
        )
        for entry in (row[0], *best_of(row, best))
    }
