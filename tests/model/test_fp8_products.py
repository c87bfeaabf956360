"""Linear layers in FP8 through the socket: values and gradients against float64, copies made once a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import BASE

from benthic.kernels import ops
from benthic.model.fp8_products import Fp8Products, RunningWeights, fp8_parameters
from benthic.model.network import DeepSeek
from benthic.model.products import Sum, WeightGradients
from benthic.model.split_linear import SplitLinear

# Two operands, each rounded to E4M3 (2.6 % on average); a re-tiled one twice.
TOLERANCE = 0.06
ENDS = {"uneven": (9, 29, 30, 63), "empty experts": (0, 20, 20, 63), "spare rows": (3, 3, 11, 40)}


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, exact, tolerance=TOLERANCE):
    error = (found.double() - exact).norm() / exact.norm()
    assert error < tolerance, f"relative error {error:.3f}"
    assert error > 1e-4, "nothing was rounded: this is not FP8"


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(63, 130, 257), (300, 256, 128), (1, 7, 3)], ids=str)
def test_output_and_both_gradients_are_near_the_exact_ones(shape, power_of_two):
    rows, inner, outer = shape
    x, weight, dy = made(rows, inner), made(outer, inner, seed=1), made(rows, outer, seed=2)
    leaves = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    socket = SplitLinear(Fp8Products(RunningWeights(power_of_two), power_of_two))
    y = socket(*leaves)
    y.backward(dy)
    close(y, x.double() @ weight.double().T)
    close(leaves[0].grad, dy.double() @ weight.double())
    close(leaves[1].grad, dy.double().T @ x.double(), 1.5 * TOLERANCE)


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_experts_get_gradients_from_their_own_rows(name, defer):
    x, weight, dy = made(63, 130), made(4, 2, 35, 130, seed=1), made(63, 70, seed=2)
    leaves = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    sink = WeightGradients()
    y = SplitLinear(Fp8Products(), sink).grouped(
        leaves[0], leaves[1].flatten(1, 2), torch.tensor(ENDS[name], dtype=torch.int32)
    )
    with sink.defer() if defer else torch.enable_grad():
        y.backward(dy)
    if defer:
        assert leaves[1].grad is None
        sink.flush()
        sink.run_oldest()
    exact = [t.double().requires_grad_() for t in (x, weight)]
    start, parts = 0, []
    for expert, end in enumerate(ENDS[name]):
        parts.append(exact[0][start:end] @ exact[1].flatten(1, 2)[expert].T)
        start = end
    out = torch.cat([*parts, torch.zeros(63 - start, 70, dtype=torch.float64)])
    out.backward(dy.double())
    close(y, out.detach())
    close(leaves[0].grad, exact[0].grad)
    close(leaves[1].grad, exact[1].grad, 1.5 * TOLERANCE)
    assert not y[start:].any()
    assert not leaves[0].grad[start:].any()


def test_rows_are_kept_in_fp8_and_the_weight_as_its_two_copies():
    socket, weight = SplitLinear(Fp8Products()), torch.nn.Parameter(made(256, 384))
    x = made(64, 384).bfloat16().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = socket(x, weight)
        assert y.dtype == torch.bfloat16
        socket(x, weight)
    wide = [t for t in kept.values() if t.dtype != torch.float8_e4m3fn]
    assert max(t.numel() for t in wide) == 64 * 3  # scales of the rows
    assert sum(t.shape == weight.shape for t in kept.values()) == 1


def test_copy_is_made_again_only_when_the_parameter_has_changed():
    running, weight = RunningWeights(), torch.nn.Parameter(made(2, 64, 130))
    view = weight.flatten(0, 1)
    first = running.of(view)
    assert running.of(weight.flatten(0, 1)) is first
    with torch.no_grad():
        weight.mul_(2.0)
    second = running.of(view)
    assert second is not first
    torch.testing.assert_close(second.tiles.scale, first.tiles.scale * 2)
    assert torch.equal(second.turned.values.float(), second.tiles.values.float().T)
    assert running.bytes_of(weight) == 2 * (weight.numel() + 4 * 1 * 2)
    assert running.bytes_of(torch.nn.Parameter(made(3))) == 0


def test_an_output_gradient_is_tiled_both_ways_and_a_weight_gradient_joins_the_sum_to_the_bit():
    products, ends = Fp8Products(power_of_two=True), torch.tensor(ENDS["spare rows"], dtype=torch.int32)
    x, dy, into = made(63, 130), made(63, 70, seed=1), made(4, 70, 130, seed=2)
    rows, columns = products.keep_gradient(dy, ends)
    apart = (
        ops.quantise_fp8_rows(dy, power_of_two=True),
        ops.quantise_fp8_columns(dy, ends, power_of_two=True),
    )
    for ours, theirs in zip((*rows, *columns), (*apart[0], *apart[1]), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    kept = products.keep_rows(x, ends)
    exact = into + products.weight_gradient(columns, kept, ends)
    assert products.weight_gradient(columns, kept, ends, Sum(into)) is into
    assert torch.equal(into, exact)


def test_embedding_head_gates_norms_and_the_mtp_projection_stay_wide():
    with torch.device("meta"):
        model = DeepSeek(replace(BASE, num_nextn_predict_layers=1))
    narrow = fp8_parameters(model)
    wide = {name for name, _ in model.named_parameters()} - set(narrow)
    words = ("embed.weight", "head.weight", "gate.weight", "norm.weight", "proj.weight")
    assert wide
    assert all(name.endswith(words) for name in wide)
    assert {name.rsplit(".", 2)[-2] for name in narrow} >= {
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "o",
        "gate_up",
        "down",
    }
