from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benthic.errors import TensorMismatchError
from benthic.model.products import WeightGradients
from benthic.train.config import OptimizerConfig
from benthic.train.optimizer import AdamW
from benthic.train.precision import Gradients


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5))
        self.norm = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * self.norm) @ self.matrix.T).square().mean()


def run(model: Toy, steps: int, config: OptimizerConfig) -> AdamW:
    optimizer, gradients = AdamW(model, config), Gradients(model, WeightGradients())
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients.zero()
        x = torch.randn(3, 5, generator=generator).to(model.matrix.dtype)
        model(x).backward()
        optimizer.step(gradients.named(), lr=1e-2)
    return optimizer


def test_float32_update_is_torchs_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = Toy(), Toy()
    run(ours, 20, OptimizerConfig())
    groups = [
        {"params": [theirs.matrix], "weight_decay": 0.1},
        {"params": [theirs.norm], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        reference.zero_grad()
        theirs(torch.randn(3, 5, generator=generator)).backward()
        reference.step()
    assert torch.allclose(ours.matrix, theirs.matrix, atol=1e-6)
    assert torch.allclose(ours.norm, theirs.norm, atol=1e-6)


def test_bfloat16_moments_take_half_the_bytes_and_stay_close() -> None:
    full, half = Toy(), Toy()
    wide, narrow = run(full, 20, OptimizerConfig()), run(half, 20, OptimizerConfig(moment_dtype="bfloat16"))
    sizes = [sum(t.numel() * t.element_size() for t in o.state().values()) for o in (wide, narrow)]
    assert sizes[0] == 2 * sizes[1]
    assert not torch.equal(full.matrix, half.matrix)
    assert torch.allclose(full.matrix, half.matrix, atol=2e-3)


def test_bfloat16_weights_follow_float32_masters() -> None:
    model = Toy().to(torch.bfloat16)
    before = model.matrix.detach().clone()
    optimizer, gradients = (
        AdamW(model, OptimizerConfig(weight_decay=0.0)),
        Gradients(model, WeightGradients()),
    )
    tiny = {name: torch.full_like(p, 1.0, dtype=torch.float32) for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.step(tiny, lr=1e-5)
    master = optimizer.state()["master.matrix"]
    assert torch.allclose(master, before.float() - 3e-5, atol=1e-6)
    assert torch.equal(model.matrix, master.to(torch.bfloat16))
    assert gradients.named().keys() == {"matrix", "norm"}


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    model = Toy().to(torch.bfloat16)
    gradients = Gradients(model, WeightGradients())
    torch.manual_seed(4)
    inputs = [torch.randn(3, 5, dtype=torch.bfloat16) for _ in range(9)]
    expected = torch.zeros(7, 5)
    for x in inputs:
        alone = copy.deepcopy(model)
        alone(x).backward()
        expected += alone.matrix.grad.float()
        model(x).backward()
    assert model.matrix.grad is None
    assert gradients.named()["matrix"].dtype == torch.float32
    assert torch.allclose(gradients.named()["matrix"], expected, rtol=1e-6)
    gradients.zero()
    assert float(gradients.norm()) == 0.0


def test_state_goes_back_into_another_optimizer_and_continues_alike() -> None:
    config = OptimizerConfig(moment_dtype="bfloat16")
    model = Toy().to(torch.bfloat16)
    optimizer = run(model, 5, config)
    twin = copy.deepcopy(model)
    other = AdamW(twin, config)
    other.load({name: tensor.clone() for name, tensor in optimizer.state().items()}, optimizer.steps)
    gradient = {name: torch.ones_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    optimizer.step(gradient, lr=1e-2)
    other.step(gradient, lr=1e-2)
    assert torch.equal(model.matrix, twin.matrix)


def test_state_of_another_precision_is_refused_with_names() -> None:
    state = AdamW(Toy(), OptimizerConfig()).state()
    with pytest.raises(TensorMismatchError, match=r"first.matrix.*Keep optimizer.moment_dtype"):
        AdamW(Toy(), OptimizerConfig(moment_dtype="bfloat16")).load(state, 1)
    del state["second.norm"]
    with pytest.raises(TensorMismatchError, match=r"second\.norm"):
        AdamW(Toy(), OptimizerConfig()).load(state, 1)
