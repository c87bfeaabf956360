"""What is asked of a deployment and when: lengths of requests, drawn from a seed or as recorded."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

from benthic.errors import ConfigError, DataError
from benthic.spec.arrivals import arrival_times
from benthic.spec.traces import MOONCAKE_BLOCK, Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence


class Ask(NamedTuple):
    """One request: `at_s` seconds after the start, so many tokens in and out.

    `keys` name the prompt's full cache blocks; equal keys at equal places are equal tokens.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()


Demand = tuple[Ask, ...]


class Lengths(Protocol):
    """Where lengths of prompts and answers come from."""

    @property
    def mean(self) -> tuple[float, float]:
        """Mean prompt and mean answer, tokens."""

    def draw(self, generator: random.Random, count: int) -> list[tuple[int, int]]:
        """`count` pairs of prompt and answer tokens."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Every request alike."""

    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        _check_lengths(self.prompt_tokens, self.output_tokens)

    @property
    def mean(self) -> tuple[float, float]:
        """As they are."""
        return float(self.prompt_tokens), float(self.output_tokens)

    def draw(self, generator: random.Random, count: int) -> list[tuple[int, int]]:  # noqa: ARG002 (a Lengths)
        """The same pair, over and over."""
        return [(self.prompt_tokens, self.output_tokens)] * count


@dataclass(frozen=True, kw_only=True)
class Deciles:
    """Independent lengths whose distribution is linear between its deciles, least and most first and last.

    Prompt and answer together are cut to `most` tokens.
    """

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    most: int

    @property
    def mean(self) -> tuple[float, float]:
        """Before the cut."""
        return _mean(self.prompt_tokens), _mean(self.output_tokens)

    def draw(self, generator: random.Random, count: int) -> list[tuple[int, int]]:
        """Independent pairs."""
        pairs = []
        for _ in range(count):
            prompt = min(_at(self.prompt_tokens, generator.random()), self.most - 1)
            pairs.append((prompt, min(_at(self.output_tokens, generator.random()), self.most - prompt)))
        return pairs


SHAREGPT = Deciles(
    prompt_tokens=(2, 88, 244, 375, 508, 669, 850, 1068, 1307, 1526, 2003),
    output_tokens=(1, 9, 14, 22, 37, 77, 161, 256, 352, 491, 1809),
    most=2048,
)
"""ShareGPT's chats as DistServe drew them: deciles of 900 of its recorded requests (Apache-2.0)."""


@dataclass(frozen=True)
class Resampled:
    """Pairs of a recording, drawn with replacement (DistServe section 4.1 resamples its fitted lengths)."""

    pairs: tuple[tuple[int, int], ...]

    @property
    def mean(self) -> tuple[float, float]:
        """Of the recording."""
        count = len(self.pairs)
        return sum([p for p, _ in self.pairs]) / count, sum([o for _, o in self.pairs]) / count

    def draw(self, generator: random.Random, count: int) -> list[tuple[int, int]]:
        """Pairs as they were recorded together."""
        return generator.choices(self.pairs, k=count)


def drawn(lengths: Lengths, count: int, *, rate: float, burstiness: float = 1.0, seed: int = 0) -> Demand:
    """`count` requests at a mean of `rate` a second; see `benthic.spec.arrivals` for `burstiness`.

    The lengths do not depend on the rate: two rates of one seed differ in speed alone.

    Raises:
        ConfigError: the rate, the burstiness or the count is not above 0.
    """
    if count < 1:
        msg = f"{count} requests are to be drawn, but at least 1 is needed"
        raise ConfigError(msg)
    times = arrival_times(count, rate=rate, burstiness=burstiness, seed=seed)
    pairs = lengths.draw(random.Random(seed + 1), count)  # noqa: S311 (a workload, not a secret)
    return tuple([Ask(at, prompt, output) for at, (prompt, output) in zip(times, pairs, strict=True)])


def recorded(trace: Trace, block_size: int) -> Demand:
    """A trace as it was recorded; its hashes of 512 tokens become keys of cache blocks.

    Raises:
        ConfigError: 512 is no multiple of `block_size` and the trace has hashes.
        DataError: as `check`.
    """
    if MOONCAKE_BLOCK % block_size and any(each.block_hashes for each in trace):
        msg = (
            f"the trace hashes blocks of {MOONCAKE_BLOCK} tokens, which cache blocks of {block_size} do not "
            f"divide. Set block_size to a divisor of {MOONCAKE_BLOCK}."
        )
        raise ConfigError(msg)
    return check(
        [Ask(each.at_s, each.prompt_tokens, each.output_tokens, _keys(each, block_size)) for each in trace]
    )


def check(demand: Sequence[Ask]) -> Demand:
    """The requests, if they can be played.

    Raises:
        DataError: there is none, or one comes before 0, before the one in front of it, or is empty; its
            number is named.
    """
    if not demand:
        msg = "0 requests are asked, but at least 1 is needed"
        raise DataError(msg)
    before = 0.0
    for number, ask in enumerate(demand):
        if not 0.0 <= ask.at_s < math.inf:
            msg = f"request {number} comes at {ask.at_s} s, but times are finite and not negative"
            raise DataError(msg)
        if ask.at_s < before:
            msg = (
                f"request {number} comes at {ask.at_s} s, but the one before at {before} s. "
                "Sort the requests by time."
            )
            raise DataError(msg)
        if ask.prompt_tokens < 1 or ask.output_tokens < 1:
            msg = (
                f"request {number} has {ask.prompt_tokens} prompt and {ask.output_tokens} output tokens, "
                "but at least 1 of each is needed"
            )
            raise DataError(msg)
        before = ask.at_s
    return tuple(demand)


def _at(deciles: tuple[int, ...], share: float) -> int:
    place = share * (len(deciles) - 1)
    below = int(place)
    return max(1, round(deciles[below] + (deciles[below + 1] - deciles[below]) * (place - below)))


def _mean(deciles: tuple[int, ...]) -> float:
    return sum([(low + high) / 2.0 for low, high in pairwise(deciles)]) / (len(deciles) - 1)


def _keys(request: TraceRequest, block_size: int) -> tuple[int, ...]:
    per_hash = MOONCAKE_BLOCK // block_size
    full = request.prompt_tokens // block_size
    keys = [each * per_hash + part for each in request.block_hashes for part in range(per_hash)]
    return tuple(keys[:full])


def _check_lengths(prompt_tokens: int, output_tokens: int) -> None:
    if prompt_tokens < 1 or output_tokens < 1:
        msg = (
            f"requests have {prompt_tokens} prompt and {output_tokens} output tokens, but at least 1 of each "
            "is needed"
        )
        raise ConfigError(msg)
