"""What each request asks: prompts of known length, drawn from a seed or read from a file's text; no I/O.

A run of a sweep gets prompts of its own (`run` is part of the seed): the same prompts a second time would be
answered from the server's prefix cache.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from benthic.errors import ConfigError, DataError
from benthic.spec.traces import MOONCAKE_BLOCK, Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEFAULT_OUTPUT = 128
"""Answer length of file prompts that name none."""

SEED_STRIDE = 1_000_003
"""Keeps the seeds of a sweep's runs apart."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One request: a prompt as token ids or text, and how many tokens to ask for."""

    prompt: Tokens | str
    output_tokens: int


class Source(Protocol):
    """Where prompts come from."""

    def works(self, count: int, run: int) -> Sequence[Work]:
        """`count` requests for the `run`-th run."""


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Token ids that random prompts may use: `first` to `last - 1`, and none of `excluded`."""

    first: int
    last: int
    excluded: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.last - self.first - len(self.excluded) < 2:
            msg = (
                f"random prompts need 2 token ids or more, but {self.first} to {self.last - 1} without "
                f"{len(self.excluded)} special ones leave fewer. Give a larger --vocab-size."
            )
            raise ConfigError(msg)

    def draw(self, generator: random.Random, count: int) -> Tokens:
        """`count` ids, uniformly."""
        drawn: list[int] = []
        while len(drawn) < count:
            token = generator.randrange(self.first, self.last)
            if token not in self.excluded:
                drawn.append(token)
        return tuple(drawn)


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """Random token ids: a shared prefix, then a part of each request's own.

    Attributes:
        tokens: which ids.
        input_len: mean length of the own part.
        output_len: mean answer.
        range_ratio: lengths are uniform in mean x (1 - ratio) to mean x (1 + ratio), as in vLLM's benchmark.
        prefix_len: tokens that all prompts of a run begin with.
        seed: of everything.
    """

    tokens: TokenRange
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.range_ratio < 1.0:
            msg = f"the range ratio is {self.range_ratio}, but it must lie in [0, 1)"
            raise ConfigError(msg)
        if self.input_len < 1 or self.output_len < 1:
            msg = (
                f"random lengths are {self.input_len} in and {self.output_len} out, but at least 1 is needed"
            )
            raise ConfigError(msg)

    def works(self, count: int, run: int) -> list[Work]:
        """Random prompts."""
        generator = _generator(self.seed, run)
        prefix = self.tokens.draw(generator, self.prefix_len)
        return [
            Work(
                prompt=prefix + self.tokens.draw(generator, self._length(generator, self.input_len)),
                output_tokens=self._length(generator, self.output_len),
            )
            for _ in range(count)
        ]

    def _length(self, generator: random.Random, mean: int) -> int:
        low, high = (max(1, round(mean * (1.0 + sign * self.range_ratio))) for sign in (-1, 1))
        return generator.randint(low, high)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Prompts of a file, in an order drawn from the seed; repeated when more are asked than there are."""

    texts: tuple[Work, ...]
    seed: int = 0

    def works(self, count: int, run: int) -> list[Work]:
        """The file's prompts, shuffled, round and round."""
        order = list(self.texts)
        _generator(self.seed, run).shuffle(order)
        return [order[i % len(order)] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class TraceSource:
    """Random prompts of a trace's lengths; blocks of equal hashes get equal tokens: prefixes are shared."""

    trace: Trace
    tokens: TokenRange
    seed: int = 0

    def works(self, count: int, run: int) -> list[Work]:
        """The first `count` requests of the trace."""
        generator = _generator(self.seed, run)
        return [
            Work(prompt=self._prompt(request, generator, run), output_tokens=request.output_tokens)
            for request in self.trace[:count]
        ]

    def _prompt(self, request: TraceRequest, generator: random.Random, run: int) -> Tokens:
        if not request.block_hashes:
            return self.tokens.draw(generator, request.prompt_tokens)
        blocks = (self._block(each, run) for each in request.block_hashes)
        return tuple(token for block in blocks for token in block)[: request.prompt_tokens]

    def _block(self, block_hash: int, run: int) -> Tokens:
        return self.tokens.draw(
            random.Random(f"{self.seed} {run} {block_hash}"),  # noqa: S311 (a workload, not a secret)
            MOONCAKE_BLOCK,
        )


def read_sharegpt(text: str, *, output_len: int | None) -> tuple[Work, ...]:
    """The first human turn of each ShareGPT-like conversation (a JSON list, or one JSON object a line).

    The answer's length is `output_len`, else `DEFAULT_OUTPUT`: counting the recorded answer's tokens would
    depend on a tokenizer.

    Raises:
        DataError: not of the format, or no conversation begins with a person.
    """
    prompts = [_first_turn(each) for each in _objects(text)]
    return _texts([prompt for prompt in prompts if prompt], output_len, "a conversation that a person begins")


def read_prompts(text: str, *, json_lines: bool, output_len: int | None) -> tuple[Work, ...]:
    """One prompt a line: plain text, or JSON `{"prompt": …, "output_tokens": …}`.

    Raises:
        DataError: a line is not of the format, or there is none.
    """
    if not json_lines:
        return _texts([line for line in text.splitlines() if line.strip()], output_len, "a line")
    works = []
    for number, each in enumerate(_objects(text), 1):
        if not isinstance(each.get("prompt"), str):
            msg = f"object {number} has no text in its field prompt. Each line is {{'prompt': …}}."
            raise DataError(msg)
        tokens = output_len or each.get("output_tokens") or DEFAULT_OUTPUT
        works.append(Work(prompt=each["prompt"], output_tokens=int(tokens)))
    if not works:
        msg = "the file holds 0 prompts, but at least 1 is needed"
        raise DataError(msg)
    return tuple(works)


def _texts(prompts: Iterable[str], output_len: int | None, what: str) -> tuple[Work, ...]:
    works = tuple(Work(prompt=prompt, output_tokens=output_len or DEFAULT_OUTPUT) for prompt in prompts)
    if not works:
        msg = f"the file holds 0 prompts, but at least 1 is needed ({what})"
        raise DataError(msg)
    return works


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except ValueError as error:
        msg = f"the file is neither a JSON list nor one JSON object a line: {error}"
        raise DataError(msg) from error
    if not all(isinstance(each, dict) for each in found):
        msg = "the file's JSON holds something other than objects"
        raise DataError(msg)
    return found


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _first_turn(conversation: dict[str, Any]) -> str | None:
    turns = conversation.get("conversations") or conversation.get("messages") or []
    if not turns:
        return None
    first = turns[0]
    who = first.get("from") or first.get("role")
    return (first.get("value") or first.get("content")) if who in ("human", "user") else None


def _generator(seed: int, run: int) -> random.Random:
    return random.Random(seed + run * SEED_STRIDE)  # noqa: S311 (a workload, not a secret)
