"""Sizes of steps that are recorded as CUDA graphs: a step is padded to the next of them.

The server records at these, and the planner pads the steps that it prices to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_DECODES: Final = 64
"""Sequences of the graphs for steps where few decode: where more may, contexts are cut into fewer parts."""


def prompt_sizes(most: int) -> tuple[int, ...]:
    """Row counts to record for steps of at most `most` rows: 64, 128, by 256 to 2,048, by 512 above."""
    series = (64, 128, *range(256, 2049, 256), *range(2560, most + 1, 512))
    return tuple(sorted({size for size in series if size < most} | {most})) if most else ()


def sizes_beside(sizes: Sequence[int], decodes: int) -> tuple[int, ...]:
    """Row counts for the same prompts beside `decodes` rows that decode, none above the largest.

    Prompts of a round length are common, and a few rows more would be padded to the next size: 2,112 to
    2,560. The smallest stays for short prompts beside few.
    """
    return tuple(sorted({*sizes[:1], *(min(size + decodes, sizes[-1]) for size in sizes)}))
