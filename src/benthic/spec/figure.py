"""A number that says how it was counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal[
    "parameters", "FLOP/token", "FLOP", "B/token", "B", "B/parameter", "elements/token", "elements"
]


@dataclass(frozen=True)
class Figure:
    """A value with its unit, the rule by which it counts and where that rule comes from."""

    value: float
    unit: Unit
    rule: str
    source: str
