"""ZB-H1: 1F1B with weight gradients put off into the bubble (Qi et al. 2023, section 2.2)."""

from __future__ import annotations

from benthic.sched.pipeline.row import Row
from benthic.sched.pipeline.sizes import check_sizes
from benthic.sched.pipeline.table import Slot, Table, one_way


def zb_h1(ranks: int, microbatches: int) -> Table:
    """1F1B whose rank r lets r weight parts wait, so that every rank holds as much as the first.

    Bubble: (ranks - 1)(F + B - 2W), B being the whole backward, I + W. Peak activations: min(ranks,
    microbatches) on every rank.

    Raises:
        ConfigError: no ranks or no microbatches.
    """
    check_sizes("zb-h1", ranks, microbatches)
    slots = [_rank(rank, ranks, microbatches) for rank in range(ranks)]
    return one_way("zb-h1", slots, tuple(range(ranks)), microbatches)


def _rank(rank: int, ranks: int, microbatches: int) -> list[Slot]:
    warmup = min(ranks - 1 - rank, microbatches)
    row = Row([rank], [range(microbatches)])
    for _ in range(warmup):
        row.forward(0)
    for done in range(microbatches):
        if done + warmup < microbatches:
            row.forward(0)
        row.backward(0, split=True)
        if done >= rank:
            row.weight()
    row.weights()
    return row.slots
