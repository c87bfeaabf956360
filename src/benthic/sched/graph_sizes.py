"""Sizes of steps that are recorded as CUDA graphs: a step is padded to the next of them.

The server records at these, and the planner pads the steps that it prices to them.
"""

from __future__ import annotations


def prompt_sizes(most: int) -> tuple[int, ...]:
    """Row counts to record for steps of at most `most` rows: 64, 128, by 256 to 2,048, by 512 above."""
    series = (64, 128, *range(256, 2049, 256), *range(2560, most + 1, 512))
    return tuple(sorted({size for size in series if size < most} | {most})) if most else ()
