"""Computing pieces again, offloading and narrow activations: what changes in the numbers and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benthic.cli.settings import apply
from benthic.errors import ConfigError
from benthic.model.local import PackedAttend
from benthic.parallel.setup import PIECES, expanded
from benthic.train.config import RunConfig
from benthic.train.rebuild import Keeper
from benthic.train.recompute import _with_core
from benthic.train.trainer import Trainer

Make = Callable[[RunConfig], Trainer]
OFFLOAD = "offload=attention,dispatch,experts,combine"
CASES = [
    ["recompute=deepseek-v3"],
    ["recompute=deepseek-v3,expert_inputs", OFFLOAD],
    *([f"recompute={piece}"] for piece in PIECES),
    ["recompute=deepseek-v3,experts"],
    [OFFLOAD],
    ["recompute=deepseek-v3", OFFLOAD],
    ["recompute=norms,attention", "offload=dispatch,experts"],
]


def gradients(run: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    loss = run.step().loss
    return loss, {name: gradient.clone() for name, gradient in run.gradients().items()}


@pytest.mark.parametrize("query", [[], ["model.q_lora_rank=none"]], ids=["latent", "direct"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_pieces_and_offloading_change_no_bit_of_any_gradient(
    trainer: Make, nano: RunConfig, dtype: str, query: list[str]
) -> None:
    config = apply(nano, [f"precision.matmul={dtype}", f"precision.weights={dtype}", *query])
    loss, expected = gradients(trainer(config))
    for case in CASES if dtype == "float32" else CASES[:2]:
        found_loss, found = gradients(trainer(apply(config, case)))
        assert found_loss == loss, case
        differ = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differ, case


@pytest.mark.parametrize(
    ("option", "worst"), [("precision.fp8_swiglu=true", 0.06), ("precision.e5m6_attention=true", 0.01)]
)
def test_narrow_activations_leave_the_loss_alone_and_gradients_near(
    trainer: Make, nano: RunConfig, option: str, worst: float
) -> None:
    loss, expected = gradients(trainer(nano))
    found_loss, found = gradients(trainer(apply(nano, [option])))
    assert found_loss == loss
    distance = [float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected]
    assert 0 < max(distance) < worst


def test_fp8_training_with_narrow_activations_learns_as_float32_does(trainer: Make, nano: RunConfig) -> None:
    smaller = ["model.n_routed_experts=4", "model.num_nextn_predict_layers=0", "train.global_batch_size=2"]
    config = apply(nano, ["train.steps=30", "train.lr=3e-3", *smaller])
    narrow = ["precision.matmul=fp8", "precision.fp8_swiglu=true", "precision.e5m6_attention=true"]
    exact, found = (trainer(one) for one in (config, apply(config, [*narrow, "recompute=deepseek-v3"])))
    pairs = [(exact.step().loss, found.step().loss) for _ in range(30)]
    assert pairs[-1][0] < 0.85 * pairs[0][0]
    relative = [abs(b - a) / a for a, b in pairs]
    assert max(relative) < 0.015
    assert sum(relative) / len(relative) < 0.005


def test_preset_stands_for_the_pieces_of_the_report() -> None:
    assert expanded(("deepseek-v3", "expert_inputs")) == {*PIECES}


def test_phase_cannot_be_recomputed_and_offloaded(trainer: Make, nano: RunConfig) -> None:
    both = apply(nano, ["recompute=deepseek-v3,experts", "offload=attention,experts"])
    with pytest.raises(ConfigError, match="both name experts: a phase that is computed again keeps nothing"):
        trainer(both)


def test_noted_tensor_is_rebuilt_once_and_its_views_with_it() -> None:
    keeper, made = Keeper(), []
    x = torch.randn(4, 6, requires_grad=True)

    def double() -> torch.Tensor:
        made.append(1)
        return x.detach() * 2

    with keeper.phase(offload=False, staying=iter(())):
        y = x * 2
        keeper.note(y, double)
        out = y[:, 1:4].exp().sum() + y.square().sum() + y[2].square().sum()
    assert not made
    out.backward()
    assert len(made) == 1
    expected = 4 * 2 * x.detach()
    expected[2] *= 2
    expected[:, 1:4] += 2 * (2 * x.detach()[:, 1:4]).exp()
    assert torch.allclose(x.grad, expected)


def test_nothing_is_noted_outside_of_a_phase_or_survives_it() -> None:
    keeper = Keeper()
    y = torch.randn(3)
    keeper.note(y, lambda: torch.zeros(3))
    assert not keeper.knows(y)
    with keeper.phase(offload=False, staying=iter(())):
        keeper.note(y, lambda: torch.zeros(3))
        assert keeper.knows(y.view(3, 1))
    assert not keeper.knows(y)


def test_attention_with_noted_operands_shares_the_lists_of_its_microbatch() -> None:
    attend = PackedAttend(torch.tensor([0, 5, 9], dtype=torch.int32), 5)
    noting = _with_core(attend, lambda *operands, **lengths: operands[2])
    assert isinstance(noting, PackedAttend)
    assert noting.lists is attend.lists
    assert PackedAttend(attend.cu_seqlens, 5).lists is not attend.lists
