"""DualPipe: both ends feed the pipeline, forwards overlap backwards (DeepSeek-V3 report, section 3.2.1)."""

from __future__ import annotations

from benthic.sched.pipeline.eight_steps import EightSteps
from benthic.sched.pipeline.row import Row
from benthic.sched.pipeline.sizes import at_least, check_sizes, multiple
from benthic.sched.pipeline.table import Slot, Table, two_ways


def dualpipe(ranks: int, microbatches: int) -> Table:
    """Stages r and ranks - 1 - r on rank r, one for either direction; half of the microbatches each.

    Bubble: (ranks/2 - 1)(F&B + B - 3W) on the rank that idles most if W = B/2 (F&B an overlapped pair), less
    otherwise. Peak activations: ranks + 1 on every rank. Parameters: twice those of one pipeline.

    Raises:
        ConfigError: odd ranks, odd microbatches, or fewer than two microbatches a rank.
    """
    check_sizes("dualpipe", ranks, microbatches)
    multiple("dualpipe", "ranks", ranks, 2, "stages meet in pairs")
    multiple("dualpipe", "microbatches", microbatches, 2, "half from either end")
    at_least("dualpipe", "microbatches", microbatches, 2 * ranks, f"twice {ranks} ranks")
    return two_ways("dualpipe", [_rank(rank, ranks, microbatches) for rank in range(ranks)], microbatches)


def _rank(rank: int, ranks: int, microbatches: int) -> list[Slot]:
    """Phase 0 is the direction whose input is nearer; it is the other one in the upper half of the ranks."""
    half = microbatches // 2
    up, down = (rank, range(half)), (ranks - 1 - rank, range(half, microbatches))
    near, far = (up, down) if rank < ranks // 2 else (down, up)
    depth = min(rank, ranks - 1 - rank)
    steps = EightSteps(Row([near[0], far[0]], [near[1], far[1]]), depth=depth, turn=ranks // 2)
    return steps.write(main=half - ranks + depth + 1)
