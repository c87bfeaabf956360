"""Prices with intervals, and sums that remember where their seconds came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable

Provenance = Literal["measured", "interpolated", "transferred", "roofline"]
PROVENANCES: Final[tuple[Provenance, ...]] = get_args(Provenance)
_NOTHING: Final = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Priced:
    """Seconds of one operation, within `low` and `high`.

    provenance: "measured" there and at this size; "interpolated" between sizes measured there;
        "transferred": the share of the roofline reached elsewhere, on another machine or at a far size;
        "roofline": the hardware's peak and a usual share of it.
    """

    seconds: float
    low: float
    high: float
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Total:
    """A sum of prices. `shares` are the seconds of each of `PROVENANCES`; bounds add up."""

    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    shares: tuple[float, float, float, float] = field(default=_NOTHING)

    def __add__(self, other: Total) -> Total:
        """Both after each other."""
        a, b, c, d = self.shares
        e, f, g, h = other.shares
        return Total(
            self.seconds + other.seconds,
            self.low + other.low,
            self.high + other.high,
            (a + e, b + f, c + g, d + h),
        )

    def times(self, count: float) -> Total:
        """`count` of them after each other."""
        a, b, c, d = self.shares
        shares = (a * count, b * count, c * count, d * count)
        return Total(self.seconds * count, self.low * count, self.high * count, shares)

    @property
    def coverage(self) -> dict[Provenance, float]:
        """The part of the seconds that each provenance stands for; they sum to 1 (nothing: to 0)."""
        whole = sum(self.shares) or 1.0
        return {name: share / whole for name, share in zip(PROVENANCES, self.shares, strict=True)}


def total(prices: Iterable[Priced]) -> Total:
    """The sum of `prices`."""
    seconds = low = high = 0.0
    shares = dict.fromkeys(PROVENANCES, 0.0)
    for one in prices:
        seconds += one.seconds
        low += one.low
        high += one.high
        shares[one.provenance] += one.seconds
    a, b, c, d = (shares[name] for name in PROVENANCES)
    return Total(seconds, low, high, (a, b, c, d))


def coverage_bar(coverage: dict[Provenance, float], width: int = 40) -> str:
    """A line such as `measured 12% interpolated 61% ...` behind a bar of `#`, `=`, `-`, `.`."""
    signs = dict(zip(PROVENANCES, "#=-.", strict=True))
    bar = "".join(sign * round(width * coverage[name]) for name, sign in signs.items())
    words = " ".join(
        f"{signs[name]} {name} {100 * coverage[name]:.0f}%" for name in PROVENANCES if coverage[name]
    )
    return f"[{bar.ljust(width)[:width]}] {words}"
