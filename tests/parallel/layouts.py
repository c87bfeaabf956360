"""Trains a small model on a layout, in one process or on gloo, and compares what every rank found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters
from benthic.train.config import ExchangeConfig
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from benthic.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Found:
    """Of every step: loss, MTP losses, balance, gradient norm and expert counts; gradients of some steps."""

    losses: list[tuple[float, ...]]
    norms: list[float]
    counts: list[dict[int, list[int]]]
    biases: dict[str, torch.Tensor]
    gradients: dict[int, dict[str, torch.Tensor]]


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    exchange = ExchangeConfig(kind="all_to_all" if layout.ep_degree > 1 else "local", fp8=False)
    return dataclasses.replace(config, layout=layout, exchange=exchange)


def trainer_of(config: RunConfig, data: Path, mesh: Mesh | None = None) -> Trainer:
    return Trainer(config, TokenShards(data, read_meta(data), "train"), mesh)


def alone(config: RunConfig, data: Path) -> Trainer:
    """Of one process, whose step is one microbatch: small ones would cost it as much as large ones."""
    loop = dataclasses.replace(config.train, local_batch_size=config.train.global_batch_size)
    return trainer_of(dataclasses.replace(config, train=loop), data)


def train(trainer: Trainer, steps: int, *, keep: tuple[int, ...] = ()) -> Found:
    losses, norms, counts, gradients = [], [], [], {}
    for step in range(1, steps + 1):
        result = trainer.step()
        losses.append((result.loss, *result.mtp, result.balance))
        norms.append(result.grad_norm)
        counts.append({layer: count.tolist() for layer, count in result.counts.items()})
        if step in keep:
            gradients[step] = {name: g.clone() for name, g in trainer.gradients().items()}
    biases = {name: bias.clone() for name, bias in trainer.stages.named_buffers().items()}
    return Found(losses, norms, counts, biases, gradients)


@dataclasses.dataclass
class Worst:
    """The largest relative errors that a rank found, of any loss and of any gradient, and of which."""

    loss: float = 0.0
    gradient: float = 0.0
    parameter: str = ""


def check_equal(trainer: Trainer, found: Found, serial: Found, *, loss: float, gradient: float) -> Worst:
    """Losses within `loss` and this rank's part of every gradient within `gradient`, both relative.

    What MTP and balance add is small beside the main loss and compared on its scale.
    """
    worst = Worst()
    for step, (mine, theirs) in enumerate(zip(found.losses, serial.losses, strict=True), 1):
        for one, two in zip(mine, theirs, strict=True):
            error = abs(one - two) / max(abs(theirs[0]), 1e-6)
            worst.loss = max(worst.loss, error)
            assert error <= loss, f"step {step}: {mine} instead of {theirs}"
    assert found.counts == serial.counts
    for name, bias in found.biases.items():
        assert torch.equal(bias, serial.biases[name]), name
    for step, gradients in found.gradients.items():
        compare_gradients(trainer, gradients, serial.gradients[step], worst, gradient, step)
    return worst


def compare_gradients(trainer, mine, whole, worst: Worst, tolerance: float, step: int) -> None:
    layout, place = trainer.mesh.layout, trainer.mesh.place
    params = {param.name: param for param in parameters(trainer.config.model)}
    seen = 0
    for bucket in trainer.buckets:
        for piece in bucket.pieces():
            param = params[piece.name]
            full = whole[piece.name].view(param.shape)
            local = full[box(param, layout, place)].flatten()[piece.start : piece.stop]
            scale = torch.linalg.vector_norm(full) * (local.numel() / full.numel()) ** 0.5
            error = float(torch.linalg.vector_norm(mine[piece.name] - local) / max(scale, 1e-12))
            where = f"{piece.name} [{piece.start}:{piece.stop}]"
            assert error <= tolerance, f"step {step}: gradient of {where} is off by {error:.3g}"
            if error > worst.gradient:
                worst.gradient, worst.parameter = error, where
            seen += 1
    assert seen


def save(found: Found, path: Path) -> Path:
    torch.save(dataclasses.asdict(found), path)
    return path


def run_layouts(
    rank: int,
    config: RunConfig,
    layouts: list[Layout],
    data: str,
    serial: str,
    tolerance: tuple[float, float],
    report: str | None = None,
) -> None:
    """On every rank: train on each layout in turn and compare with the run of one process in `serial`.

    `report` is a folder that gets a line of JSON for every layout and rank.
    """
    expected = Found(**torch.load(serial))
    for layout in layouts:
        trainer = trainer_of(with_layout(config, layout), Path(data), Mesh.of(layout, rank))
        found = train(trainer, len(expected.losses), keep=tuple(expected.gradients))
        try:
            worst = check_equal(trainer, found, expected, loss=tolerance[0], gradient=tolerance[1])
        except AssertionError as error:
            message = f"{layout}: {error}"
            raise AssertionError(message) from None
        if report is not None:
            line = dataclasses.asdict(layout) | dataclasses.asdict(worst) | {"rank": rank}
            with (Path(report) / f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
