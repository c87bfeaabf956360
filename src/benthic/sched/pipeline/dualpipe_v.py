"""DualPipeV: DualPipe cut in half, both directions on one V-shaped way (the DualPipe repository, 2025)."""

from __future__ import annotations

from benthic.sched.pipeline.eight_steps import EightSteps
from benthic.sched.pipeline.row import Row
from benthic.sched.pipeline.sizes import at_least, check_sizes
from benthic.sched.pipeline.table import Slot, Table, one_way, v_shaped


def dualpipe_v(ranks: int, microbatches: int) -> Table:
    """Stages r and 2 ranks - 1 - r on rank r; input and loss are both on rank 0, no stage lives twice.

    Bubble: (ranks - 1)(F&B + B - 3W) on the rank that idles most if W = B/2, less otherwise. Peak
    activations: 2 ranks + 1 stages on every rank, each half of what a rank of 1F1B holds for a microbatch.

    Raises:
        ConfigError: fewer than two microbatches a rank.
    """
    check_sizes("dualpipev", ranks, microbatches)
    at_least("dualpipev", "microbatches", microbatches, 2 * ranks, f"twice {ranks} ranks")
    slots = [_rank(rank, ranks, microbatches) for rank in range(ranks)]
    return one_way("dualpipev", slots, v_shaped(ranks), microbatches)


def _rank(rank: int, ranks: int, microbatches: int) -> list[Slot]:
    row = Row([rank, 2 * ranks - 1 - rank], [range(microbatches)] * 2)
    return EightSteps(row, depth=rank, turn=ranks).write(main=microbatches - 2 * ranks + rank + 1)
