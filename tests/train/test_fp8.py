"""Training in FP8: what is kept, what it costs, how far its losses are from float32's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.cli.settings import apply
from benthic.errors import ConfigError
from benthic.model.fp8_products import MixedLinear, fp8_parameters
from benthic.spec.memory import FP8_V3
from benthic.train.checkpoint import FolderStore
from benthic.train.config import RunConfig
from benthic.train.data.shards import read_meta
from benthic.train.memory import measure
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.hardware import HardwareFacts

# A step of the definition in plain torch costs about a millisecond per product, however small.
SMALLER = ["train.global_batch_size=2", "model.n_routed_experts=4", "model.num_nextn_predict_layers=0"]
Make = Callable[[RunConfig], Trainer]
FP8 = ["precision.matmul=fp8", "optimizer.moment_dtype=bfloat16"]


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


def test_losses_stay_within_a_percent_of_float32(trainer: Make, nano: RunConfig) -> None:
    config = apply(nano, ["train.steps=40", "train.lr=3e-3", *SMALLER])
    exact, narrow = losses(trainer(config), 40), losses(trainer(apply(config, FP8)), 40)
    assert exact[-1] < 0.8 * exact[0]
    assert narrow != exact
    relative = [abs(b - a) / a for a, b in zip(exact, narrow, strict=True)]
    assert max(relative) < 0.015
    assert sum(relative) / len(relative) < 0.005


def test_fp8_keeps_14_bytes_a_parameter_and_float32_keeps_16(trainer: Make, nano: RunConfig) -> None:
    narrow, wide, mixed = (trainer(apply(nano, extra)) for extra in (FP8, [], ["precision.weights=bfloat16"]))
    names = set(fp8_parameters(narrow.model))
    found = {}
    for name, run in {"fp8": narrow, "float32": wide, "bfloat16": mixed}.items():
        run.step()
        found[name] = measure(run, names)
    scales = found["fp8"].terms["running weight"] / found["fp8"].parameters - 2
    assert found["fp8"].per_parameter - scales == pytest.approx(FP8_V3.bytes + 1) == 14  # transposed too
    assert 0 < scales < 0.1  # 8 bytes per 128 x 128 tile, most of which `nano` does not fill
    assert {k: v // found["fp8"].parameters for k, v in found["fp8"].terms.items()} == {
        "running weight": 2,
        "master weight": 4,
        "gradient": 4,
        "first moment": 2,
        "second moment": 2,
    }
    assert found["float32"].per_parameter == 16
    assert found["bfloat16"].per_parameter == 18  # bfloat16 weights, float32 gradients and moments
    rest = set(dict(narrow.model.named_parameters())) - names
    assert measure(narrow, rest).per_parameter == 14
    assert measure(narrow).parameters == sum(p.numel() for p in narrow.model.parameters())


def test_masters_are_float32_and_what_the_report_keeps_wide_is_bfloat16(
    trainer: Make, nano: RunConfig
) -> None:
    run = trainer(apply(nano, FP8))
    dtypes = {name: p.dtype for name, p in run.model.named_parameters()}
    assert dtypes["layers.1.moe.experts.gate_up"] == dtypes["layers.0.attn.o.weight"] == torch.float32
    wide = ("embed.weight", "head.weight", "layers.1.moe.gate.weight", "mtp.0.proj.weight", "norm.weight")
    assert {dtypes[name] for name in wide} == {torch.bfloat16}


def test_weights_are_quantised_once_a_step_for_all_microbatches(trainer: Make, nano: RunConfig) -> None:
    run = trainer(apply(nano, [*FP8, "train.local_batch_size=1"]))
    linear = run.executor.linear
    assert isinstance(linear, MixedLinear)
    run.step()
    param = dict(run.model.named_parameters())["layers.0.attn.o.weight"]
    with torch.no_grad():
        before = linear.running.of(param)
        assert linear.running.of(param) is before
        run.optimizer.step(lr=1e-2)
        for bucket in run.buckets:
            bucket.publish()
        assert not torch.equal(linear.running.of(param).tiles.scale, before.tiles.scale)


@pytest.mark.parametrize(
    "extra", [[], ["recompute=attention,experts"], ["precision.power_of_two_scales=true"]]
)
def test_resumed_run_is_the_undisturbed_run_bit_for_bit(
    trainer: Make, nano: RunConfig, tmp_path: Path, extra: list[str]
) -> None:
    config = apply(nano, [*FP8, *extra, "train.global_batch_size=2"])
    expected = losses(trainer(config), 4)
    broken, store = trainer(config), FolderStore(tmp_path)
    assert losses(broken, 2) == expected[:2]
    store.save(broken.saved())
    again = trainer(config)
    again.restore(store.open(2))
    assert losses(again, 2) == expected[2:]


def test_recomputed_phases_change_no_number(trainer: Make, nano: RunConfig) -> None:
    plain = trainer(apply(nano, FP8))
    wrapped = trainer(apply(nano, [*FP8, "recompute=attention,experts"]))
    for _ in range(2):
        one, two = plain.step(), wrapped.step()
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)


def test_other_weights_may_be_multiplied_in_fp8_too(trainer: Make, nano: RunConfig) -> None:
    exact = losses(trainer(nano), 3)
    for weights in ("float32", "bfloat16"):
        found = losses(trainer(apply(nano, [*FP8, f"precision.weights={weights}"])), 3)
        assert found == pytest.approx(exact, rel=0.01)


def test_resolving_says_what_runs_in_fp8_and_refuses_fp8_weights_for_other_products(
    nano: RunConfig, facts: HardwareFacts, dataset: Path
) -> None:
    meta = read_meta(dataset)
    resolved = resolve(apply(nano, FP8), facts, meta)
    reasons = {choice.field: (choice.value, choice.reason) for choice in resolved.choices}
    assert reasons["precision.weights"][0] == "fp8"
    assert "of the parameters multiply in FP8" in reasons["precision.matmul"][1]
    assert "are no multiple of 128" in reasons["precision.matmul"][1]
    with pytest.raises(ConfigError, match=r"matmul=bfloat16 would read weights that were rounded"):
        resolve(apply(nano, ["precision.weights=fp8", "precision.matmul=bfloat16"]), facts, meta)
