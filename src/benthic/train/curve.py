"""A value that changes over training: learning rate, MTP weight, bias update speed.

Written as the DeepSeek-V3 report words it (section 4.2), by tokens seen:
`"2.2e-4@10T,cosine:2.2e-5@4.3T,7.3e-6"` holds 2.2e-4 for 10 T tokens, falls on a half cosine to 2.2e-5 over
the next 4.3 T, then holds 7.3e-6.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from benthic.errors import ConfigError

Shape = Literal["hold", "linear", "cosine"]

_SUFFIX: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_PIECE: Final = re.compile(
    r"^(?:(?P<shape>\w+):)?(?P<value>[-+0-9.eE]+?)(?:@(?P<count>[0-9.]+(?:[eE]\+?\d+)?)(?P<suffix>[KMGBT]?))?$"
)


@dataclass(frozen=True)
class Piece:
    """`hold` is `value` throughout; `linear` and `cosine` travel from the value before to `value`.

    `tokens` is how long the piece lasts; None, allowed for the last piece only, is for ever.
    """

    value: float
    tokens: int | None = None
    shape: Shape = "hold"

    def __str__(self) -> str:
        shape = "" if self.shape == "hold" else f"{self.shape}:"
        tokens = "" if self.tokens is None else f"@{_count(self.tokens)}"
        return f"{shape}{self.value!r}{tokens}"


@dataclass(frozen=True)
class Curve:
    """Pieces one after another; after the last one its value stays.

    Raises:
        ConfigError: no piece, a travelling piece that comes first or lasts for ever, or a piece after one
            that lasts for ever.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        problem = _problem(self.pieces)
        if problem:
            msg = f"a curve of {len(self.pieces)} pieces ({self}) {problem}"
            raise ConfigError(msg)

    @classmethod
    def constant(cls, value: float) -> Curve:
        """The same value for ever."""
        return cls((Piece(value),))

    @classmethod
    def parse(cls, text: str) -> Curve:
        """Read `VALUE[@TOKENS]` or `linear|cosine:VALUE@TOKENS`, separated by commas; K, M, B, T multiply.

        Raises:
            ConfigError: a piece that does not read so, or a value below 0.
        """
        return cls(tuple(_parse_piece(part.strip(), text) for part in text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.pieces))

    def at(self, tokens: int) -> float:
        """The value after `tokens` tokens."""
        before, start = self.pieces[0].value, 0
        for piece in self.pieces:
            if piece.tokens is None or tokens < start + piece.tokens:
                return _inside(piece, before, tokens - start)
            before, start = piece.value, start + piece.tokens
        return before


def warmup(step: int, warmup_steps: int) -> float:
    """The factor of the learning rate at `step` (counted from 1): linear up to 1 at `warmup_steps`."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def cosine(fraction: float, final: float) -> float:
    """A half cosine from 1 (at 0) to `final` (at 1)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))


def _inside(piece: Piece, before: float, tokens: int) -> float:
    if piece.shape == "hold" or piece.tokens is None:
        return piece.value
    fraction = tokens / piece.tokens
    if piece.shape == "linear":
        return before + (piece.value - before) * fraction
    return piece.value + (before - piece.value) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def _problem(pieces: tuple[Piece, ...]) -> str | None:
    if not pieces:
        return "has no value. Give at least one."
    if pieces[0].shape != "hold":
        return f"starts with a {pieces[0].shape} piece, which has nothing to start from. Hold a value first."
    if any(piece.tokens is None for piece in pieces[:-1]):
        return "goes on after a piece without @TOKENS, which lasts for ever. Say how long it lasts."
    if any(piece.tokens is None and piece.shape != "hold" for piece in pieces):
        return "ends by travelling for ever. Say over how many tokens, as in cosine:2e-5@1B."
    if any(piece.tokens is not None and piece.tokens <= 0 for piece in pieces):
        return "has a piece of no tokens. Leave it out."
    return None


def _parse_piece(part: str, text: str) -> Piece:
    match = _PIECE.match(part)
    if match is None or (match["shape"] or "hold") not in get_args(Shape):
        msg = (
            f"{part!r} in {text!r} is no piece of a curve. Write VALUE, VALUE@TOKENS, linear:VALUE@TOKENS or "
            "cosine:VALUE@TOKENS, e.g. 2.2e-4@10T,cosine:2.2e-5@4.3T,7.3e-6."
        )
        raise ConfigError(msg)
    try:
        value = float(match["value"])
    except ValueError:
        msg = f"{match['value']!r} in {text!r} is not a number."
        raise ConfigError(msg) from None
    if value < 0.0:
        msg = f"{value} in {text!r} is below 0. Rates, weights and rows are 0 or more."
        raise ConfigError(msg)
    tokens = None if match["count"] is None else round(float(match["count"]) * _SUFFIX[match["suffix"]])
    return Piece(value, tokens, cast("Shape", match["shape"] or "hold"))


def _count(tokens: int) -> str:
    for suffix in ("T", "B", "M", "K"):
        if tokens % _SUFFIX[suffix] == 0:
            return f"{tokens // _SUFFIX[suffix]}{suffix}"
    return str(tokens)
