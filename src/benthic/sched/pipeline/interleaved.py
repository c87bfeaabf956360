"""Interleaved 1F1B: several stages a rank, a smaller bubble (Narayanan et al. 2021, section 2.2.2)."""

from __future__ import annotations

from benthic.sched.pipeline.sizes import at_least, check_sizes, multiple
from benthic.sched.pipeline.table import Action, Table, linear

_NAME = "interleaved"


def interleaved(ranks: int, microbatches: int, virtual_stages: int) -> Table:
    """`virtual_stages` stages a rank, stage s on rank `s % ranks`; microbatches go in groups of `ranks`.

    Bubble: (ranks - 1)(F + B)/virtual_stages on every rank, F and B being those of all the rank's stages.
    Peak activations on rank r: 2(ranks - 1 - r) + (virtual_stages - 1) ranks + 1 stages, or all there are,
    each 1/virtual_stages of what a rank of 1F1B holds for a microbatch.

    Raises:
        ConfigError: fewer than two stages a rank, or microbatches that are no multiple of the ranks.
    """
    check_sizes(_NAME, ranks, microbatches)
    at_least(_NAME, "virtual_stages", virtual_stages, 2, "1f1b has one stage a rank")
    multiple(_NAME, "microbatches", microbatches, ranks, f"{ranks} ranks")
    order = [
        (chunk, group + m)
        for group in range(0, microbatches, ranks)
        for chunk in range(virtual_stages)
        for m in range(ranks)
    ]
    slots = [_rank(rank, ranks, virtual_stages, order) for rank in range(ranks)]
    return linear(_NAME, slots, stages=ranks * virtual_stages, microbatches=microbatches)


def _rank(rank: int, ranks: int, virtual_stages: int, order: list[tuple[int, int]]) -> list[Action]:
    """Warm up for the way to the last stage and back, then alternate."""
    last = virtual_stages - 1
    forwards = [Action("F", chunk * ranks + rank, m) for chunk, m in order]
    backwards = [Action("B", (last - chunk) * ranks + rank, m) for chunk, m in order]
    warmup = min(2 * (ranks - 1 - rank) + last * ranks, len(order))
    steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
    return forwards[:warmup] + steady + backwards[len(order) - warmup :]
