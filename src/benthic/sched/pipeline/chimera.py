"""Chimera: two pipelines in opposite directions through the same ranks (Li and Hoefler 2021, section 3)."""

from __future__ import annotations

from benthic.sched.pipeline.sizes import check_sizes, multiple
from benthic.sched.pipeline.table import Action, Slot, Table, two_ways


def chimera(ranks: int, microbatches: int) -> Table:
    """Each rank holds one stage of either direction; units of `ranks` microbatches follow each other.

    Bubble for F = B: (ranks - 2)F on every rank, idle share (D - 2)/(2N + D - 2) for D ranks and N
    microbatches. Peak activations: between D/2 + 1 and D. Parameters: twice those of one pipeline.

    Raises:
        ConfigError: odd ranks, or microbatches that are no multiple of the ranks.
    """
    check_sizes("chimera", ranks, microbatches)
    multiple("chimera", "ranks", ranks, 2, "stages meet in pairs")
    multiple("chimera", "microbatches", microbatches, ranks, f"{ranks} ranks")
    half = microbatches // 2
    slots = [
        [
            Slot(action)
            for _, action in sorted(
                _clocked(rank, ranks, 0, half) + _clocked(ranks - 1 - rank, ranks, half, half)
            )
        ]
        for rank in range(ranks)
    ]
    return two_ways("chimera", slots, microbatches)


def _clocked(stage: int, stages: int, first: int, count: int) -> list[tuple[int, Action]]:
    """What one direction does in `stage`, with the tick of each action if all actions took one tick.

    The other direction uses the ticks between, because its stage on the same rank has the other parity.
    """
    timed = []
    for m in range(count):
        unit, within = divmod(m, stages // 2)
        start = 2 * stages * unit + 2 * within
        timed.append((start + stage, Action("F", stage, first + m)))
        timed.append((start + 2 * stages - 1 - stage, Action("B", stage, first + m)))
    return timed
