"""FP8 products of a linear layer: their definition against float64, and the tiles that they read."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ShapeError
from benthic.kernels import ops
from benthic.kernels.reference.fp8 import dequantise
from benthic.kernels.reference.fp8_linear import TILE, Fp8, padded_rows

# One rounding to E4M3 is off by at most 2^-4 of a value, mostly 2.6 %; what underflows in a tile counts too.
ONE_OPERAND = 0.04
ENDS = {"uneven": (9, 140, 141, 300), "empty experts": (0, 200, 200, 300), "spare rows": (3, 3, 131, 263)}


def made(*shape, seed=0):
    """Normal numbers, each column with its own size, so that one scale for all of them would not do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-2, 2, shape[-1])


def ends_of(name):
    return torch.tensor(ENDS[name], dtype=torch.int32)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def rows_of(x):
    return Fp8(*ops.quantise_fp8_rows(x))


def back(tiles, tile_m):
    return dequantise(tiles.values, tiles.scale, tile_m, TILE, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(63, 130, 257), (4, 128, 16), (1, 7, 3), (130, 384, 200)], ids=str)
def test_product_is_within_two_roundings_of_the_exact_one(shape):
    rows, inner, outer = shape
    x, weight = made(rows, inner), made(outer, inner, seed=1)
    y = ops.fp8_linear(rows_of(x), ops.quantise_fp8_weight(weight), dtype=torch.float32)
    assert 1e-4 < error(y, x.double() @ weight.double().T) < 2 * ONE_OPERAND
    exact = back(rows_of(x), 1).double() @ back(ops.quantise_fp8_weight(weight), TILE).double().T
    assert error(y, exact) < 1e-6  # what is left is quantisation alone


@pytest.mark.parametrize("name", ENDS)
def test_each_expert_multiplies_its_own_rows_and_spare_rows_are_zero(name):
    ends, x, weight = ends_of(name), made(300, 130), made(4, 70, 130, seed=1)
    y = ops.fp8_linear(rows_of(x), ops.quantise_fp8_weight(weight), ends, dtype=torch.float32)
    exact, start = torch.zeros(300, 70, dtype=torch.float64), 0
    for expert, end in enumerate(ENDS[name]):
        exact[start:end] = x[start:end].double() @ weight[expert].double().T
        start = end
    assert error(y, exact) < 2 * ONE_OPERAND
    assert not y[ends[-1] :].any()


def test_transposed_weight_gives_the_input_gradient():
    dy, weight = made(63, 200), made(200, 130, seed=1)
    quantised = ops.quantise_fp8_weight(weight)
    dx = ops.fp8_linear(rows_of(dy), quantised.transposed(), dtype=torch.float32)
    assert error(dx, dy.double() @ weight.double()) < 2 * ONE_OPERAND


@pytest.mark.parametrize("rows", [1, 63, 128, 300])
def test_weight_gradient_is_within_two_roundings_of_the_exact_one(rows):
    dy, x = made(rows, 70), made(rows, 130, seed=1)
    found = ops.fp8_weight_gradient(ops.quantise_fp8_columns(dy), ops.quantise_fp8_columns(x))
    assert found.dtype == torch.float32
    assert error(found, dy.double().T @ x.double()) < 2 * ONE_OPERAND


@pytest.mark.parametrize("name", ENDS)
def test_weight_gradient_of_each_expert_and_zeros_for_empty_ones(name):
    ends, dy, x = ends_of(name), made(300, 70), made(300, 130, seed=1)
    tiles = (ops.quantise_fp8_columns(operand, ends) for operand in (dy, x))
    found = ops.fp8_weight_gradient(*tiles, ends)
    start = 0
    for expert, end in enumerate(ENDS[name]):
        exact = dy[start:end].double().T @ x[start:end].double()
        assert error(found[expert], exact) < 2 * ONE_OPERAND if end > start else not found[expert].any()
        start = end


@pytest.mark.parametrize("name", ENDS)
def test_column_tiles_start_anew_at_each_expert(name):
    ends, x = ends_of(name), made(300, 20)
    tiles = ops.quantise_fp8_columns(x, ends)
    assert tiles.values.shape == (20, padded_rows(300, 4))
    wide, first, start = back(tiles, 1).T, 0, 0
    for end in ENDS[name]:
        length = -(-(end - start) // TILE) * TILE
        exact = x[start:end]
        assert torch.allclose(wide[first : first + end - start], exact, rtol=1 / 16, atol=1e-3)
        assert not wide[first + end - start : first + length].any()
        first, start = first + length, end


@pytest.mark.parametrize("name", [None, *ENDS])
def test_rows_and_columns_at_once_are_those_of_two_passes(name):
    ends, x = None if name is None else ends_of(name), made(300, 150)
    rows, columns = ops.quantise_fp8_both(x, ends, power_of_two=True)
    for ours, theirs in (
        (rows, ops.quantise_fp8_rows(x, power_of_two=True)),
        (columns, ops.quantise_fp8_columns(x, ends, power_of_two=True)),
    ):
        assert torch.equal(ours.values.view(torch.uint8), theirs[0].view(torch.uint8))
        assert torch.equal(ours.scale, theirs[1])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [None, *ENDS])
def test_the_gradient_of_swiglu_in_both_tilings_is_that_of_autograd(name, dtype, power_of_two):
    ends = None if name is None else ends_of(name)
    gate_up, dy = made(300, 150).to(dtype), made(300, 75, seed=1).to(dtype)
    of = gate_up.double().requires_grad_()
    (exact,) = torch.autograd.grad(ops.swiglu(of, impl="reference"), of, dy.double())
    torch.testing.assert_close(ops.swiglu_gradient(of.detach(), dy.double(), impl="reference"), exact)
    wide = ops.swiglu_gradient(gate_up, dy, impl="reference")
    options = {"power_of_two": power_of_two}
    rows, columns = ops.swiglu_gradient_fp8_both(gate_up, dy, ends, **options, impl="reference")
    for ours, theirs in (
        (rows, ops.quantise_fp8_rows(wide, **options)),
        (columns, ops.quantise_fp8_columns(wide, ends, **options)),
    ):
        assert torch.equal(ours.values.view(torch.uint8), theirs[0].view(torch.uint8))
        assert torch.equal(ours.scale, theirs[1])
    rows, columns = ops.swiglu_gradient_fp8_both(gate_up, dy, ends, **options)
    assert error(back(rows, 1), exact) < ONE_OPERAND
    assert columns.values.shape == (150, padded_rows(300, 1 if ends is None else 4))


def weighted(dtype):
    weight = torch.rand(300, generator=torch.Generator().manual_seed(2)) * 2 - 0.5
    weight[7] = 0.0
    return made(300, 150).to(dtype), made(300, 75, seed=1).to(dtype), weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_of_weighted_rows_of_swiglu_are_those_of_autograd(impl, dtype):
    gate_up, dy, weight = weighted(dtype)
    leaves = [x.double().clone().requires_grad_() for x in (gate_up, weight)]
    out = leaves[1][:, None] * ops.swiglu(leaves[0], impl="reference")
    exact, exact_weight = torch.autograd.grad(out, leaves, dy.double())
    found, found_weight = ops.weighted_swiglu_gradient(gate_up, dy, weight, impl=impl)
    assert found.dtype == dtype
    assert found_weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found_weight[7].abs() > 1e-3
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    assert error(found_weight, exact_weight) < (1e-12 if dtype == torch.float64 else 1e-6)
    ones, _ = ops.weighted_swiglu_gradient(gate_up, dy, torch.ones(300), impl=impl)
    assert torch.equal(ones, ops.swiglu_gradient(gate_up, dy, impl=impl))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["two_ops", "reference"])
@pytest.mark.parametrize("name", [None, *ENDS])
def test_the_gradient_of_weighted_rows_in_both_tilings_is_that_of_two_ops(name, impl, dtype, power_of_two):
    ends, operands = None if name is None else ends_of(name), weighted(dtype)
    wide, exact = ops.weighted_swiglu_gradient(*operands, impl="reference" if impl == "reference" else None)
    options = {"power_of_two": power_of_two}
    rows, columns, dweight = ops.weighted_swiglu_gradient_fp8_both(*operands, ends, **options, impl=impl)
    assert torch.equal(dweight, exact)
    for ours, theirs in (
        (rows, ops.quantise_fp8_rows(wide, **options)),
        (columns, ops.quantise_fp8_columns(wide, ends, **options)),
    ):
        assert torch.equal(ours.values.view(torch.uint8), theirs[0].view(torch.uint8))
        assert torch.equal(ours.scale, theirs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_quantised_as_it_is_computed_is_near_what_was_to_be_computed(dtype):
    x, residual, weight = made(63, 300).to(dtype), made(63, 300, seed=1).to(dtype), made(1, 300)[0].to(dtype)
    exact = ops.swiglu(x.double(), impl="reference")
    assert error(back(ops.swiglu_fp8(x), 1), exact) < ONE_OPERAND
    exact = ops.rms_norm(x.double(), weight.double(), 1e-6, impl="reference")
    assert error(back(ops.rms_norm_fp8(x, weight, 1e-6), 1), exact) < ONE_OPERAND
    tiles, total = ops.add_rms_norm_fp8(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    exact = ops.rms_norm(total.double(), weight.double(), 1e-6, impl="reference")
    assert error(back(tiles, 1), exact) < ONE_OPERAND


@pytest.mark.parametrize("name", [None, *ENDS])
def test_a_weight_gradient_is_added_to_a_float32_sum_of_any_layout(name):
    ends, dy, x = None if name is None else ends_of(name), made(300, 70), made(300, 130, seed=1)
    tiles = [ops.quantise_fp8_columns(operand, ends) for operand in (dy, x)]
    gradient = ops.fp8_weight_gradient(*tiles, ends)
    into = made(*gradient.shape, seed=2)
    across = into.transpose(-1, -2).contiguous().transpose(-1, -2)
    for sum_ in (into, across):
        exact = sum_ + gradient
        ops.add_fp8_weight_gradient(sum_, *tiles, ends)
        assert torch.equal(sum_, exact)


def test_retiling_power_of_two_scales_rounds_nothing_but_underflow():
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    results = {}
    for exact in (True, False):
        rows = Fp8(*ops.quantise_fp8_rows(x, power_of_two=exact))
        again = back(ops.retile_fp8(rows, power_of_two=exact), 1).T[:300]
        results[exact] = (again != back(rows, 1)).float().mean().item()
    assert results[True] < 1e-3
    assert results[False] > 0.3


def test_a_tile_keeps_small_channels_apart_from_large_ones():
    """With one scale for a whole tensor, an outlier would push the rest below the smallest E4M3 number."""
    x = torch.full((4, 256), 1e-3)
    x[:, 0] = 1e4
    kept = back(rows_of(x), 1)
    assert torch.allclose(kept[:, 128:], x[:, 128:], rtol=0.07)
    assert not kept[:, 1:128].any()


def no_update(master):
    """AdamW's operands that leave a master as it is."""
    by = ops.AdamWStep(0.9, 0.999, 1e-8, step_size=0.0, decay=0.0, correction=1.0)
    return (master, *(torch.zeros_like(master) for _ in range(3)), by)


def test_rounding_at_random_takes_neighbours_and_is_right_on_average():
    master, draws = made(130, 200), 400
    nearest = ops.quantise_fp8_weight(master)
    exact = master / nearest.scale.repeat_interleave(TILE, 0)[:130].repeat_interleave(TILE, 1)[:, :200]
    step = torch.exp2(exact.abs().clamp(min=2.0**-6).frexp().exponent - 4.0)
    copy, total = Fp8(torch.empty_like(nearest.values), torch.empty_like(nearest.scale)), 0.0
    for seed in range(draws):
        ops.adamw_fp8(*no_update(master), copy, seed=seed)
        off = (copy.values.double() - exact) / step
        assert off.abs().max() <= 1.0
        total += off
    assert torch.equal(copy.scale, nearest.scale)
    mean = total / draws
    assert mean.abs().max() < 5 * 0.5 * draws**-0.5  # a draw deviates by at most half a step
    assert mean.mean().abs() < 5 * 0.5 * (draws * master.numel()) ** -0.5
    assert ((nearest.values.double() - exact) / step).abs().mean() > 0.1


def test_updates_too_small_for_e4m3_move_a_randomly_rounded_copy_on_average():
    master = torch.full((128, 128), 1.01)
    master[0, 0] = 448.0  # so that the scale is 1
    copy = ops.quantise_fp8_weight(master)
    assert copy.values[1:].float().mean() == 1.0
    ops.adamw_fp8(*no_update(master), copy, seed=3)
    assert 1.008 < copy.values[1:].float().mean() < 1.012


def test_operands_that_disagree_are_refused_with_both_shapes():
    x, weight = rows_of(made(4, 130)), ops.quantise_fp8_weight(made(8, 128))
    with pytest.raises(ShapeError, match=r"\(4, 130\).*\(8, 128\)"):
        ops.fp8_linear(x, weight)
    with pytest.raises(ShapeError, match="ends of 2 experts"):
        ops.fp8_linear(rows_of(made(4, 128)), weight, torch.tensor((1, 4), dtype=torch.int32))
    with pytest.raises(ShapeError, match="128 padded rows of output gradients but 256"):
        ops.fp8_weight_gradient(ops.quantise_fp8_columns(made(5, 8)), ops.quantise_fp8_columns(made(129, 8)))
    with pytest.raises(ShapeError, match="2 dims, or 3 with experts, not 1"):
        ops.quantise_fp8_weight(made(8))
    tiles = [ops.quantise_fp8_columns(made(5, 8)) for _ in range(2)]
    with pytest.raises(ShapeError, match=r"gradient is \(8, 8\) in float32, but the sum is \(8, 9\)"):
        ops.add_fp8_weight_gradient(made(8, 9), *tiles)
    with pytest.raises(ShapeError, match=r"the sum is \(8, 8\) in torch.bfloat16"):
        ops.add_fp8_weight_gradient(made(8, 8).bfloat16(), *tiles)
    with pytest.raises(ShapeError, match="squares are of gradients that are written; give fresh"):
        ops.add_fp8_weight_gradient(made(8, 8), *tiles, squares=True)
    with pytest.raises(ShapeError, match="cut from a matrix; got 3 dims"):
        ops.quantise_fp8_both(made(2, 4, 8))
    with pytest.raises(ShapeError, match="must be even, not 7"):
        ops.swiglu_fp8(made(4, 7))
    with pytest.raises(ShapeError, match=r"gate_up \(4, 8\) must have the rows of dy \(4, 8\)"):
        ops.swiglu_gradient_fp8_both(made(4, 8), made(4, 8))
    with pytest.raises(ShapeError, match=r"gate_up \(4, 8\) must have the rows of dy \(3, 4\)"):
        ops.weighted_swiglu_gradient(made(4, 8), made(3, 4), torch.ones(4))
    for run in (ops.weighted_swiglu_gradient, ops.weighted_swiglu_gradient_fp8_both):
        with pytest.raises(ShapeError, match=r"dy \(4, 4\) must be a matrix .* weights \(3,\)"):
            run(made(4, 8), made(4, 4), torch.ones(3))
    with pytest.raises(ShapeError, match=r"dy \(2, 4, 4\) must be a matrix .* weights \(2,\)"):
        ops.weighted_swiglu_gradient(made(2, 4, 8), made(2, 4, 4), torch.ones(2))
    with pytest.raises(ShapeError, match=r"8 columns but the weight has shape \(9,\)"):
        ops.rms_norm_fp8(made(4, 8), made(9, 1)[:, 0], 1e-6)
    with pytest.raises(ShapeError, match=r"x \(4, 8\) and residual \(5, 8\) must match"):
        ops.add_rms_norm_fp8(made(4, 8), made(5, 8), made(8, 1)[:, 0], 1e-6)
    with pytest.raises(ShapeError, match=r"\(8, 8\) with scales \(1, 1\), not \(8, 9\)"):
        ops.adamw_fp8(*no_update(made(8, 8)), ops.quantise_fp8_weight(made(8, 9)))
    with pytest.raises(ShapeError, match="contiguous and of one shape"):
        ops.adamw_fp8(*no_update(made(8, 9).t()), ops.quantise_fp8_weight(made(9, 8)))


def test_spaced_scales_begin_at_multiples_of_four_and_are_not_copied_again():
    for scale in (torch.rand(3, 22), torch.rand(24, 3).t(), torch.rand(2, 3, 5)):
        spaced = ops.spaced(scale)
        assert torch.equal(spaced, scale)
        assert spaced.stride(-1) == 1
        assert spaced.stride(-2) == -(-scale.shape[-1] // 4) * 4
        assert ops.spaced(spaced) is spaced
