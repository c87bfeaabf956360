"""A worked example: a formula, the number it gives, the number that others print, and who they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line. `printed` is what the source says; `note` where sources disagree, and which is right."""

    topic: str
    formula: str
    value: str
    printed: str
    source: str
    note: str = ""
