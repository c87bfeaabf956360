"""Muon against the formulas of the Moonlight report, written plainly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benthic.cli.settings import apply
from benthic.errors import CheckpointError, ConfigError
from benthic.parallel.whole_matrices import Matrix, owners, stretches
from benthic.spec.parameters import parameters
from benthic.train.checkpoint import FolderStore
from benthic.train.data.shards import read_meta
from benthic.train.muon import newton_schulz
from benthic.train.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig
    from benthic.train.hardware import HardwareFacts
    from benthic.train.trainer import Trainer

MUON = ["optimizer.name=muon", "optimizer.newton_schulz_dtype=float32", "train.warmup_steps=0"]
ADAMW_PARTS = {"embedding", "head", "norms", "router"}


def plain_newton_schulz(gradient: torch.Tensor) -> torch.Tensor:
    x = gradient.double() / gradient.double().norm()
    if x.shape[0] > x.shape[1]:
        return plain_newton_schulz(gradient.T).T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.reshape(-1, *tensor.shape[-2:]))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6)])
def test_orthogonalisation_is_that_of_the_report(shape: tuple[int, int]) -> None:
    gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(gradients, torch.float32)
    for one, gradient in zip(found, gradients, strict=True):
        assert torch.allclose(one.double(), plain_newton_schulz(gradient), atol=1e-5)
        values = torch.linalg.svdvals(one)
        assert float(values.max()) < 1.25
    close = newton_schulz(gradients, torch.bfloat16)
    assert close.dtype == torch.float32
    assert torch.allclose(close, found, atol=0.05)
    assert not newton_schulz(torch.zeros(1, *shape), torch.float32).any()


def test_three_steps_are_the_reports_update_for_matrices_and_adamw_for_the_rest(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    config = apply(nano, [*MUON, "train.lr=0.01", "train.schedule=constant", "train.max_norm=0"])
    ours = trainer(config)
    params = {p.name: p for p in parameters(config.model)}
    expected = {n: p.detach().double().clone() for n, p in ours.model.named_parameters()}
    adamw = {n: torch.nn.Parameter(t.float()) for n, t in expected.items() if params[n].part in ADAMW_PARTS}
    decayed = [p for p in adamw.values() if p.dim() > 1]
    rest = [p for p in adamw.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    momentum = {n: torch.zeros_like(t) for n, t in expected.items()}
    for _ in range(3):
        ours.step()
        gradients = {n: g.view(expected[n].shape) for n, g in ours.gradients().items()}
        for name, gradient in gradients.items():
            if name in adamw:
                adamw[name].grad = gradient.clone()
                continue
            momentum[name] = 0.95 * momentum[name] + gradient.double()
            moved = gradient.double() + 0.95 * momentum[name]
            scale = 0.2 * max(gradient.shape[-2:]) ** 0.5
            update = torch.stack([plain_newton_schulz(m) * scale for m in matrices(moved)])
            expected[name] = expected[name] * (1 - 0.01 * 0.1) - 0.01 * update.view(gradient.shape)
        reference.step()
    assert {params[n].part for n in expected if n not in adamw} == {
        "attention",
        "dense MLP",
        "routed experts",
        "shared experts",
        "MTP projection",
    }
    for name, weight in ours.model.named_parameters():
        want = adamw[name] if name in adamw else expected[name].float()
        assert torch.allclose(weight, want, atol=2e-5), name


def test_an_update_has_the_root_mean_square_of_adamws_whatever_the_shape() -> None:
    """0.2 sqrt(max(A, B)) makes the RMS about 0.2, as the report chooses it."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((64, 64), (32, 128), (256, 64)):
        update = newton_schulz(torch.randn(1, *shape, generator=generator), torch.float32)
        rms = 0.2 * max(shape) ** 0.5 * float(update.square().mean().sqrt())
        assert 0.13 < rms < 0.25


@pytest.mark.parametrize("extra", [[], ["optimizer.moment_dtype=bfloat16", "precision.weights=bfloat16"]])
def test_resumed_run_is_the_undisturbed_run_bit_for_bit(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig, tmp_path: Path, extra: list[str]
) -> None:
    config = apply(nano, ["optimizer.name=muon", *extra])
    straight = trainer(config)
    expected = [straight.step().loss for _ in range(5)]
    broken, store = trainer(config), FolderStore(tmp_path)
    broken.step()
    broken.step()
    store.save(broken.saved())
    again = trainer(config)
    again.restore(store.open(2))
    assert [again.step().loss for _ in range(3)] == expected[2:]


def test_state_of_the_other_optimizer_is_refused(
    trainer: Callable[[RunConfig], Trainer], nano: RunConfig, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path)
    store.save(trainer(nano).saved())
    with pytest.raises(CheckpointError, match=r"optimizer\.name: checkpoint 'adamw', now 'muon'"):
        trainer(apply(nano, MUON)).restore(store.open(0))


def test_muon_on_tensor_parallel_ranks_is_refused_with_the_remedy(
    nano: RunConfig, facts: HardwareFacts, dataset: Path
) -> None:
    config = apply(nano, [*MUON, "layout.tp_degree=2"])
    with pytest.raises(ConfigError, match=r"needs whole matrices, but layout\.tp_degree=2"):
        resolve(config, facts, read_meta(dataset))


def test_matrices_inside_one_shard_stay_there_and_the_others_even_out_the_work() -> None:
    found = [Matrix(0, 2, 3), Matrix(6, 2, 3), Matrix(12, 4, 3), Matrix(24, 1, 6)]
    held = stretches(found, 10)
    assert [tuple(s) for s in held] == [
        (0, 0, 0, 6),
        (1, 0, 0, 4),
        (1, 1, 4, 6),
        (2, 1, 0, 8),
        (2, 2, 8, 12),
        (3, 2, 0, 6),
    ]
    assert owners(found, held, 3) == [0, 0, 1, 2]


def test_what_an_update_allocates_is_known(trainer: Callable[[RunConfig], Trainer], nano: RunConfig) -> None:
    ours, params = trainer(apply(nano, MUON)), {p.name: p for p in parameters(nano.model)}
    sizes = [
        sum(p.kept.numel() for p in bucket.pieces() if params[p.name].part not in ADAMW_PARTS)
        for bucket in ours.buckets
    ]
    assert ours.optimizer.update_bytes == 20 * max(sizes) > 0
    assert trainer(nano).optimizer.update_bytes == 0
