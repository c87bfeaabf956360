"""TensorBoard events of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from benthic.train.balance import max_vio

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.evaluate import Evaluation
    from benthic.train.speed import Speed
    from benthic.train.trainer import StepResult


class Board:
    """Writes scalars by step; events after the step that a run resumes from are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def step(self, result: StepResult, speed: Speed) -> None:
        """Losses, norm, rate, speed and the fullest expert of every layer."""
        scalars = {
            "train/loss": result.loss,
            "train/balance": result.balance,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "speed/tokens_per_second": speed.tokens_per_second,
            "speed/memory_gib": speed.memory / 2**30,
        }
        scalars |= {f"train/mtp_loss_{depth + 1}": loss for depth, loss in enumerate(result.mtp)}
        scalars |= {f"max_vio/layer_{layer}": max_vio(count) for layer, count in result.counts.items()}
        if speed.mfu is not None:
            scalars["speed/mfu"] = speed.mfu
        self._write(scalars, result.step)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Held-out loss, bits per byte, acceptance."""
        scalars = {"held_out/loss": found.loss, "held_out/bits_per_byte": found.bits_per_byte}
        if found.mtp_acceptance is not None:
            scalars["held_out/mtp_acceptance"] = found.mtp_acceptance
        self._write(scalars, step)

    def close(self) -> None:
        """Bring everything to the disk."""
        self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
