"""Steps whose loss jumps are skipped, counted, and skipped alike after resuming."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.train.checkpoint import FolderStore
from benthic.train.spikes import Spikes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer


def test_spike_is_a_loss_above_the_factor_of_the_median_before_it() -> None:
    spikes = Spikes(2.0, 4)
    assert [spikes.skips(loss) for loss in (9.0, 3.0, 12.1, 3.0, 6.0, 6.1)] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert spikes.skipped == 1


def test_loss_that_stays_high_is_ordinary_after_half_a_window() -> None:
    spikes = Spikes(1.5, 4)
    found = [spikes.skips(loss) for loss in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0)]
    assert found == [False, False, False, False, True, True, False]


def test_factor_zero_skips_nothing() -> None:
    spikes = Spikes(0.0, 2)
    assert not any(spikes.skips(loss) for loss in (1.0, 1.0, 1e9, 1.0))


def spiky(nano: RunConfig) -> RunConfig:
    """So slow that losses are those of a young model, and a factor that they exceed now and then."""
    loop = dataclasses.replace(nano.train, spike_factor=1.0001, spike_window=4, warmup_steps=0, lr=1e-5)
    return dataclasses.replace(nano, train=loop)


def test_skipped_step_leaves_parameters_moments_and_biases_as_they_were(
    nano: RunConfig, trainer: Callable[[RunConfig], Trainer]
) -> None:
    run = trainer(spiky(nano))
    while run.spikes.skipped == 0:
        before = {n: one.flat.clone() for n, one in run.saved().tensors.items() if not n.startswith("random")}
        updates = run.optimizer.steps
        result = run.step()
        assert result.step < 20, "no loss rose"
    assert (result.skipped, run.optimizer.steps) == (1, updates)
    after = run.saved().tensors
    assert all(torch.equal(flat, after[name].flat) for name, flat in before.items())
    assert run.position == result.step * run.rows


def test_resumed_run_skips_the_steps_that_the_undisturbed_one_skips(
    nano: RunConfig, trainer: Callable[[RunConfig], Trainer], tmp_path: Path
) -> None:
    straight, first, again = (trainer(spiky(nano)) for _ in range(3))
    whole = [straight.step() for _ in range(16)]
    assert whole[-1].skipped > whole[7].skipped, "nothing is skipped after the checkpoint"
    for _ in range(8):
        first.step()
    store = FolderStore(tmp_path)
    store.save(first.saved())
    again.restore(store.open(8))
    rest = [again.step() for _ in range(8)]
    assert [(r.loss, r.skipped) for r in rest] == [(r.loss, r.skipped) for r in whole[8:]]


@pytest.mark.parametrize(("field", "value"), [("spike_factor", 0.9), ("spike_window", 1)])
def test_settings_that_would_skip_ordinary_steps_are_refused(
    nano: RunConfig, trainer: Callable[[RunConfig], Trainer], field: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"train.{field}={value}"):
        trainer(dataclasses.replace(nano, train=dataclasses.replace(nano.train, **{field: value})))
