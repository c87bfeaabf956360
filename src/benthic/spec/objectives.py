"""Latency targets and what they make of a request: met or missed, all of them together.

DistServe (OSDI'24) section 2: a request attains its objectives when TTFT *and* TPOT are within theirs;
goodput is the highest rate at which a given share of requests, usually 90 %, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ConfigError, UnknownFieldError

if TYPE_CHECKING:
    from collections.abc import Iterable

NAMES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
"""The words of `--goodput`, as vLLM's benchmark spells them, to fields."""


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """One request's times in seconds. `tpot_s` is None where fewer than two tokens came."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Upper bounds in seconds; None sets no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, words: Iterable[str]) -> Objectives | None:
        """Read `ttft:200 tpot:50 e2el:3000`, in milliseconds; None when there are no words.

        Raises:
            ConfigError: a word is not NAME:NUMBER, the number is not above 0, or a name comes twice.
        """
        found: dict[str, float] = {}
        for word in (part for given in words for part in given.split()):
            name, _, value = word.partition(":")
            if name not in NAMES:
                kind = "latency target"
                raise UnknownFieldError(kind, name, NAMES)
            if NAMES[name] in found:
                msg = f"the target {name} is given twice"
                raise ConfigError(msg)
            found[NAMES[name]] = _milliseconds(word, value) / 1e3
        return cls(**found) if found else None

    def met(self, latencies: Latencies) -> bool:
        """Whether every bound holds."""
        pairs = (
            (latencies.ttft_s, self.ttft_s),
            (latencies.tpot_s, self.tpot_s),
            (latencies.e2e_s, self.e2e_s),
        )
        return all(value is None or bound is None or value <= bound for value, bound in pairs)

    def __str__(self) -> str:
        parts = ((name, getattr(self, field)) for name, field in NAMES.items())
        return " ".join(f"{name}:{bound * 1e3:g}" for name, bound in parts if bound is not None)


def _milliseconds(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 < number < float("inf"):
        msg = f"the target {word!r} is not NAME:MILLISECONDS, such as ttft:200"
        raise ConfigError(msg)
    return number
