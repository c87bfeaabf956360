"""ZB-V: two stages a rank on a V-shaped way, no bubble if F = I = W (Qi et al. 2024, section 4)."""

from __future__ import annotations

from itertools import chain

from benthic.sched.pipeline.row import Row
from benthic.sched.pipeline.sizes import check_sizes
from benthic.sched.pipeline.table import Slot, Table, one_way, v_shaped


def zb_v(ranks: int, microbatches: int) -> Table:
    """Stages r and 2 ranks - 1 - r on rank r; loss and input are both on rank 0.

    Bubble for F = I = W: 0 but for the ranks - 1 forwards before the last rank starts. Peak activations:
    at most 2 ranks stages, each half of what a rank of 1F1B holds for a microbatch.

    Raises:
        ConfigError: no ranks or no microbatches.
    """
    check_sizes("zb-v", ranks, microbatches)
    # the pattern needs 2 ranks - 1 microbatches; what is beyond those asked for is left out again
    pattern = max(microbatches, 2 * ranks - 1)
    rows = [_rank(rank, ranks, pattern) for rank in range(ranks)]
    slots = [[slot for slot in row if slot.first.microbatch < microbatches] for row in rows]
    return one_way("zb-v", slots, v_shaped(ranks), microbatches)


def _rank(rank: int, ranks: int, microbatches: int) -> list[Slot]:
    depth, last = ranks - rank, 2 * ranks - 1 - rank
    row = Row([rank, last], [range(microbatches)] * 2)
    for phase in chain([0] * (2 * depth - 1), [1, 0] * rank):
        row.forward(phase)
    for _ in range(depth):
        _forward_and_backward(row)
    for done in range(microbatches - ranks):
        if done + last < microbatches:
            row.forward(0)
        row.backward(0, split=True)
        row.weight()
        _forward_and_backward(row)
    for phase in [0, 1] * rank:
        row.backward(phase, split=True)
    for _ in range(depth):
        row.backward(0, split=True)
        row.weight()
    row.weights()
    return row.slots


def _forward_and_backward(row: Row) -> None:
    """One microbatch turns round on the way up: its F, I and W in the upper stage."""
    row.forward(1)
    row.backward(1, split=True)
    row.weight()
