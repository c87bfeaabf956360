"""Scalars of a run for web pages that others have written: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from benthic.errors import ConfigError
from benthic.train.balance import max_vio
from benthic.train.fields import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.evaluate import Evaluation
    from benthic.train.speed import Speed
    from benthic.train.trainer import StepResult


class Writer(Protocol):
    """Takes scalars by name."""

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Add the scalars of one step."""
        ...

    def close(self) -> None:
        """Bring everything to where it belongs."""
        ...


class Board:
    """Turns steps and evaluations into scalars for one writer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def step(self, result: StepResult, speed: Speed) -> None:
        """Losses, norm, rate, speed and the fullest expert of every layer."""
        scalars = {
            "train/loss": result.loss,
            "train/balance": result.balance,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/skipped": float(result.skipped),
            "speed/tokens_per_second": speed.tokens_per_second,
            "speed/memory_gib": speed.memory / 2**30,
        }
        scalars |= {f"train/mtp_loss_{depth + 1}": loss for depth, loss in enumerate(result.mtp)}
        scalars |= {f"max_vio/layer_{layer}": max_vio(count) for layer, count in result.counts.items()}
        if speed.mfu is not None:
            scalars["speed/mfu"] = speed.mfu
        self._writer.write(scalars, result.step)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Held-out loss, bits per byte, acceptance."""
        scalars = {"held_out/loss": found.loss, "held_out/bits_per_byte": found.bits_per_byte}
        if found.mtp_acceptance is not None:
            scalars["held_out/mtp_acceptance"] = found.mtp_acceptance
        self._writer.write(scalars, step)

    def close(self) -> None:
        """Bring everything to where it belongs."""
        self._writer.close()


class TensorBoard:
    """TensorBoard's event files; events after the step that a run resumes from are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (it takes a second)

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Add the scalars of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring everything to the disk."""
        self._writer.close()


class Wandb:
    """Weights & Biases, one run of theirs for a run folder, resumed with it.

    Their steps only grow: what a run does again after resuming from an earlier step is dropped there.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            message = (
                f"log.wandb={config.log.wandb} needs the wandb package. Install it, or leave log.wandb empty."
            )
            raise ConfigError(message) from error
        name = folder.resolve().name
        self._run = self._wandb.init(
            project=config.log.wandb,
            id=name,
            name=name,
            dir=str(folder),
            resume="allow",
            config=to_json(config),
        )

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Add the scalars of one step."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def of(folder: Path, config: RunConfig, start: int) -> tuple[Board, ...]:
    """The boards that the config names, of a run that goes on after step `start`."""
    found: list[Board] = []
    if config.log.tensorboard:
        found.append(Board(TensorBoard(folder / "tensorboard", start)))
    if config.log.wandb:
        found.append(Board(Wandb(folder, config)))
    return tuple(found)
