"""1F1B: a backward as soon as one can run (PipeDream-Flush; Narayanan et al. 2021, section 2.2.1)."""

from __future__ import annotations

from benthic.sched.pipeline.sizes import check_sizes
from benthic.sched.pipeline.table import Action, Table, linear


def one_f_one_b(ranks: int, microbatches: int) -> Table:
    """One stage a rank; rank r warms up with `ranks - 1 - r` forwards, then alternates.

    Bubble: (ranks - 1)(F + B) on every rank, as GPipe. Peak activations: min(ranks - r, microbatches) on
    rank r.

    Raises:
        ConfigError: no ranks or no microbatches.
    """
    check_sizes("1f1b", ranks, microbatches)
    slots = [_rank(r, min(ranks - 1 - r, microbatches), microbatches) for r in range(ranks)]
    return linear("1f1b", slots, stages=ranks, microbatches=microbatches)


def _rank(rank: int, warmup: int, microbatches: int) -> list[Action]:
    forwards = [Action("F", rank, m) for m in range(microbatches)]
    backwards = [Action("B", rank, m) for m in range(microbatches)]
    steady = [a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair]
    return forwards[:warmup] + steady + backwards[microbatches - warmup :]
