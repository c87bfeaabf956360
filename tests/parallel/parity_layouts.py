"""The layouts whose training must equal that of one process, and a model small enough to run them all."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from small_runs import small_run

from benthic.sched.pipeline.schedules import BUILDERS
from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.train.config import RunConfig

SCHEDULES: Final = tuple(BUILDERS)
SPLIT: Final = ("zb-v", "dualpipev", "interleaved")

MIXED: Final = (
    Layout(ep_degree=2, dp_degree=2),
    Layout(dp_degree=2, zero_stage=2),
    Layout(dp_degree=2, zero_stage=3),
    Layout(tp_degree=2),
    Layout(cp_degree=2),
    Layout(dp_degree=4, ep_degree=4),
    Layout(dp_degree=4, ep_degree=4, zero_stage=3),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, schedule="zb-v"),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, zero_stage=2, schedule="chimera"),
    Layout(pp_degree=2, dp_degree=2, ep_degree=2, zero_stage=3, schedule="dualpipev"),
    Layout(pp_degree=2, tp_degree=2, ep_degree=2, schedule="dualpipe"),
    Layout(pp_degree=4, dp_degree=2, ep_degree=2),
    Layout(pp_degree=4, dp_degree=2, ep_degree=2, schedule="dualpipe"),
    Layout(pp_degree=2, dp_degree=2, tp_degree=2, ep_degree=2),
    Layout(pp_degree=2, cp_degree=2, dp_degree=2, ep_degree=4, zero_stage=2, schedule="zb-h1"),
)


def config_for(layouts: Sequence[Layout], *, steps: int) -> RunConfig:
    """A run with enough layers and microbatches for every one of the layouts.

    AdamW's eps is far above the rounding of gradients: with 1e-8, elements whose gradient is all rounding
    move by a whole learning rate, and Chimera on 8 ranks ends 2e-6 away after ten steps instead of 9e-8. The
    learning rate bounds how far 20 steps carry the rounding of a sum in another order: with 1e-3, the
    gradient of one norm of Chimera's 8 layers ended 1.01e-5 away.
    """
    ranks = max(layout.pp_degree for layout in layouts)
    data = max(layout.dp_degree for layout in layouts)
    split = any(layout.schedule in SPLIT for layout in layouts)
    config = small_run(layers=max(2, ranks * (2 if split else 1)))
    loop = dataclasses.replace(
        config.train, steps=steps, lr=5e-4, local_batch_size=1, global_batch_size=max(2, 2 * ranks) * data
    )
    optimizer = dataclasses.replace(config.optimizer, eps=1e-5)
    return dataclasses.replace(config, train=loop, optimizer=optimizer)
