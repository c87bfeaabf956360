from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benthic import collector
from benthic.cli.settings import apply
from benthic.errors import CheckpointError, NumericsError
from benthic.kernels import ops
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.network import DeepSeek
from benthic.model.products import WeightGradients
from benthic.train.balance import update_bias
from benthic.train.checkpoint import FolderStore
from benthic.train.config import LoopConfig, PrecisionConfig, RunConfig
from benthic.train.curve import Curve
from benthic.train.memory import measure
from benthic.train.precision import linear_socket
from benthic.train.trainer import Trainer, clip_factor, learning_rate

if TYPE_CHECKING:
    from pathlib import Path

Make = Callable[[RunConfig], Trainer]


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


def test_loss_falls_on_real_rows(trainer: Make, nano: RunConfig) -> None:
    found = losses(trainer(apply(nano, ["train.steps=40", "train.lr=1e-2"])), 40)
    assert sum(found[-5:]) / 5 < 0.7 * found[0]


def test_same_config_gives_the_same_losses_and_another_seed_does_not(trainer: Make, nano: RunConfig) -> None:
    assert losses(trainer(nano), 4) == losses(trainer(nano), 4)
    assert losses(trainer(nano), 2) != losses(trainer(apply(nano, ["train.seed=1"])), 2)
    assert losses(trainer(nano), 2) != losses(trainer(apply(nano, ["data.seed=1"])), 2)


def test_a_step_neither_runs_the_garbage_collector_nor_leaves_it_anything(
    trainer: Make, nano: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, enabled = trainer(nano), []
    update = running.optimizer.step

    def watched(**options: float) -> None:
        enabled.append(gc.isenabled())
        update(**options)

    monkeypatch.setattr(running.optimizer, "step", watched)
    running.step()
    assert enabled == [False]
    assert gc.isenabled()
    with collector.paused():
        gc.collect()
        running.step()
        assert gc.collect() == 0


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["optimizer.moment_dtype=bfloat16"],
        ["precision.weights=bfloat16"],
        ["precision.weights=bfloat16", "precision.matmul=bfloat16", "optimizer.store_param_remainders=true"],
    ],
    ids=["float32", "moments", "weights", "remainders"],
)
def test_resumed_run_is_the_undisturbed_run_bit_for_bit(
    trainer: Make, nano: RunConfig, tmp_path: Path, extra: list[str], *, wait: bool
) -> None:
    config = apply(nano, extra)
    straight = trainer(config)
    expected = losses(straight, 6)
    broken, store = trainer(config), FolderStore(tmp_path)
    assert losses(broken, 3) == expected[:3]
    store.save(broken.saved(), wait=wait)
    assert losses(broken, 3) == expected[3:]
    again = trainer(config)
    again.restore(store.open(3))
    assert losses(again, 3) == expected[3:]
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_remainders_leave_twelve_bytes_of_fourteen_a_parameter(trainer: Make, nano: RunConfig) -> None:
    narrow = ["precision.weights=bfloat16", "precision.matmul=bfloat16", "optimizer.moment_dtype=bfloat16"]
    kept = []
    for split in ("false", "true"):
        made = trainer(apply(nano, [*narrow, f"optimizer.store_param_remainders={split}"]))
        made.step()
        kept.append(measure(made))
    assert [one.per_parameter for one in kept] == [14.0, 12.0]
    assert kept[1].terms["master weight"] == 2 * kept[1].parameters


def test_microbatches_add_up_to_the_whole_batch(trainer: Make, nano: RunConfig) -> None:
    whole = trainer(apply(nano, ["train.local_batch_size=4", "loss.balance_alpha=0.01"]))
    parts = trainer(apply(nano, ["train.local_batch_size=1", "loss.balance_alpha=0.01"]))
    one, four = whole.step(), parts.step()
    assert four.loss == pytest.approx(one.loss, rel=1e-5)
    assert four.mtp == pytest.approx(one.mtp, rel=1e-5)
    assert four.balance == pytest.approx(one.balance, rel=1e-5)
    assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert {k: v.tolist() for k, v in one.counts.items()} == {k: v.tolist() for k, v in four.counts.items()}
    for name, gradient in whole.gradients().items():
        assert torch.allclose(gradient, parts.gradients()[name], atol=1e-6), name


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_trainer_that_is_let_go_frees_its_arrays(trainer: Make, nano: RunConfig, weights: str) -> None:
    config = apply(nano, [f"precision.weights={weights}", f"precision.matmul={weights}"])
    made = trainer(config)
    made.step()
    arrays = [weakref.ref(bucket) for bucket in made.buckets]
    del made
    gc.collect()
    assert [array() for array in arrays] == [None] * len(arrays)


def test_bias_moves_once_a_step_by_all_its_microbatches(trainer: Make, nano: RunConfig) -> None:
    config = apply(nano, ["train.local_batch_size=1", "loss.bias_update_speed=0.25"])
    run = trainer(config)
    names = [n for n in run.model.state_dict() if n.endswith("gate.bias")]
    assert names == ["layers.1.moe.gate.bias", "mtp.0.block.moe.gate.bias"]
    result = run.step()
    for name, layer in zip(names, (1, 2), strict=True):
        expected = torch.zeros(8)
        update_bias(expected, result.counts[layer], speed=0.25, recentre=False)
        assert int(result.counts[layer].sum()) == 4 * 32 * 2
        assert torch.equal(run.model.state_dict()[name], expected)
        assert expected.abs().max() == 0.25


def test_bias_stands_still_when_its_speed_is_zero(trainer: Make, nano: RunConfig) -> None:
    run = trainer(apply(nano, ["loss.bias_update_speed=0.5@128,0"]))
    run.step()
    after_one = run.model.state_dict()["layers.1.moe.gate.bias"].clone()
    run.step()
    assert after_one.abs().max() == 0.5
    assert torch.equal(run.model.state_dict()["layers.1.moe.gate.bias"], after_one)


@pytest.mark.parametrize("phases", ["attention", "dispatch,experts", "attention,dispatch,experts,combine"])
def test_recomputed_phases_change_no_number(trainer: Make, nano: RunConfig, phases: str) -> None:
    plain, wrapped = trainer(nano), trainer(apply(nano, [f"recompute={phases}"]))
    for _ in range(3):
        one, two = plain.step(), wrapped.step()
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)
        assert all(torch.equal(count, two.counts[layer]) for layer, count in one.counts.items())


def test_recomputing_keeps_fewer_activations(trainer: Make, nano: RunConfig) -> None:
    def kept_bytes(run: Trainer) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            batch = run.batches.microbatch(0, 2)
            sockets = packed_sockets(
                batch.cu_seqlens, batch.max_seqlen, n_routed_experts=run.model.config.n_routed_experts
            )
            run.model(batch.tokens_T, batch.positions_T, sockets)
        return total

    everything = apply(nano, ["recompute=attention,dispatch,experts,combine"])
    assert kept_bytes(trainer(everything)) < 0.5 * kept_bytes(trainer(nano))


def test_bfloat16_products_stay_near_float32(trainer: Make, nano: RunConfig) -> None:
    exact = losses(trainer(nano), 5)
    cast = losses(trainer(apply(nano, ["precision.matmul=bfloat16"])), 5)
    narrow = losses(trainer(apply(nano, ["precision.weights=bfloat16"])), 5)
    assert cast != exact
    assert cast == pytest.approx(exact, rel=5e-3)
    assert narrow == pytest.approx(exact, rel=5e-3)


def test_linear_socket_casts_only_when_precisions_differ(nano: RunConfig) -> None:
    sink, model = WeightGradients(), DeepSeek(nano.model)
    plain = linear_socket(PrecisionConfig(weights="float32", matmul="float32"), sink, model)
    socket = linear_socket(PrecisionConfig(weights="float32", matmul="bfloat16"), sink, model)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(plain(x, weight), plain_linear(x, weight))
    assert socket(x, weight).dtype == torch.float32
    assert torch.equal(socket(x, weight), (x.bfloat16() @ weight.bfloat16().T).float())


def test_parameter_that_is_not_finite_stops_the_step_by_name_and_updates_nothing(
    trainer: Make, nano: RunConfig
) -> None:
    run = trainer(nano)
    run.step()
    with torch.no_grad():
        run.model.state_dict()["layers.1.attn.o.weight"][0, 0] = float("nan")
    before = run.model.state_dict()["head.weight"].clone()
    with pytest.raises(NumericsError, match=r"step 2: loss is nan; .* parameter layers.1.attn.o.weight"):
        run.step()
    assert torch.equal(run.model.state_dict()["head.weight"], before)
    assert run.steps_done == 1


def test_overflow_names_the_first_module_whose_output_is_not_finite(trainer: Make, nano: RunConfig) -> None:
    run = trainer(nano)
    with torch.no_grad():
        run.model.state_dict()["layers.0.mlp.gate_up.weight"].fill_(1e30)
    with pytest.raises(NumericsError, match=r"step 1: loss is (nan|inf); .* the output of layers.0.mlp"):
        run.step()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "fp8"])
def test_the_norm_is_that_of_the_gradients_in_memory(
    trainer: Make, nano: RunConfig, weights: str, rows: int
) -> None:
    settings = ["train.local_batch_size=1", f"train.global_batch_size={rows}", f"precision.weights={weights}"]
    run = trainer(apply(nano, settings))
    for _ in range(2):
        norm = run.step().grad_norm
        read = torch.cat([gradient.flatten().double() for gradient in run.gradients().values()])
        assert norm == pytest.approx(float(read.norm()), rel=1e-6)
        given = {name for bucket in run.buckets for name in bucket._squares}
        matrices = {name for name, param in run.model.named_parameters() if param.dim() > 1}
        of_fp8 = (".experts.", ".shared.", ".mlp.", ".attn.")
        parts = {"float32": (), "bfloat16": (".experts.",), "fp8": of_fp8}
        kept = {name for name in matrices if any(part in name for part in parts[weights])}
        assert given == (kept if rows == 1 else set())


def test_fp8_copies_are_made_behind_the_update_and_not_in_the_next_forward_pass(
    trainer: Make, nano: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made, seen = trainer(apply(nano, ["precision.matmul=fp8"])), [], []
    quantise, execute = ops.quantise_fp8_weight, run.executor.run_placed

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return quantise(*args, **kwargs)

    def executed(*args: Any) -> Any:
        outcome = execute(*args)
        seen.append(len(made))
        return outcome

    monkeypatch.setattr(ops, "quantise_fp8_weight", counted)
    monkeypatch.setattr(run.executor, "run_placed", executed)
    for _ in range(3):
        run.step()
    first = seen[0]
    assert first > 0
    assert seen == [first, 2 * first, 3 * first]  # those made behind an update; none in the passes after it
    assert len(made) == 4 * first


def test_gradient_that_is_not_finite_stops_the_step_by_name(trainer: Make, nano: RunConfig) -> None:
    run = trainer(nano)
    param = dict(run.model.named_parameters())["layers.1.moe.gate.weight"]
    param.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        NumericsError, match=r"step 1: the gradient norm is (nan|inf); .*layers.1.moe.gate.weight"
    ):
        run.step()
    assert (run.steps_done, run.optimizer.steps) == (0, 0)


def test_changed_settings_that_decide_the_numbers_are_refused_by_name(
    trainer: Make, nano: RunConfig, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path)
    store.save(trainer(nano).saved())
    stored = store.open(0)
    trainer(apply(nano, ["train.lr=1e-4", "train.local_batch_size=1", "model.name=other"])).restore(stored)
    with pytest.raises(CheckpointError) as caught:
        trainer(apply(nano, ["train.seq_len=16", "data.seed=4"])).restore(stored)
    assert "data.seed: checkpoint 0, now 4" in str(caught.value)
    assert "train.seq_len: checkpoint 32, now 16" in str(caught.value)
    other = dataclasses.replace(stored, state=stored.state | {"data": "0" * 64})
    with pytest.raises(CheckpointError, match="trained on data 000000000000"):
        trainer(nano).restore(other)


def test_learning_rate_warms_up_then_follows_its_schedule() -> None:
    loop = LoopConfig(steps=110, lr=1.0, warmup_steps=10, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(loop, step, 0) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    constant = dataclasses.replace(loop, schedule="constant")
    assert {learning_rate(constant, step, 0) for step in range(10, 111)} == {1.0}
    curve = dataclasses.replace(loop, schedule="curve", lr_curve=Curve.parse("2@100,1"))
    assert [learning_rate(curve, s, t) for s, t in ((5, 0), (50, 99), (50, 100))] == [1.0, 2.0, 1.0]


def test_clipping_scales_to_the_norm_and_zero_turns_it_off() -> None:
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 0.0) == 1.0
