"""GPipe: all forwards, then all backwards (Huang et al. 2019, section 2.3)."""

from __future__ import annotations

from benthic.sched.pipeline.sizes import check_sizes
from benthic.sched.pipeline.table import Action, Table, linear


def gpipe(ranks: int, microbatches: int) -> Table:
    """One stage a rank; every rank holds the activations of all microbatches before its first backward.

    Bubble: (ranks - 1)(F + B) on every rank. Peak activations: `microbatches`.

    Raises:
        ConfigError: no ranks or no microbatches.
    """
    check_sizes("gpipe", ranks, microbatches)
    batches = range(microbatches)
    slots = [
        [Action("F", r, m) for m in batches] + [Action("B", r, m) for m in batches] for r in range(ranks)
    ]
    return linear("gpipe", slots, stages=ranks, microbatches=microbatches)
