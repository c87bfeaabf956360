"""Fifty calls of a kernel on the same operands give the same bits: no order of threads shows in a sum."""

from __future__ import annotations

import pytest
import torch

from benthic.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
REPEATS = 50
PACKS = {"small": (256, 256), "uneven": (1000, 3, 129, 641)}
CONTEXTS = {"small": (128, 128), "uneven": (0, 4097, 1, 63, 1000)}
GROUPS = {"small": (128,) * 4, "uneven": (700, 1, 0, 129)}
SHAPES = ("small", "uneven")


def made(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def ends(*sizes):
    return torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)


def assert_the_same_bits(call):
    first = call()
    for repeat in range(1, REPEATS):
        for one, other in zip(first, call(), strict=True):
            assert torch.equal(one, other), f"call {repeat} differs from the first"
    assert all(torch.isfinite(one).all() for one in first)


@pytest.mark.parametrize("dims", [(192, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients(shape, dims):
    lengths, starts = PACKS[shape], ends(0, *PACKS[shape])
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    width, value = dims
    q, k, v, dout = (made(sum(lengths), 4, w, seed=i) for i, w in enumerate((width, width, value, value)))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call():
        out = ops.attention(*leaves, starts, starts, **longest, scale=0.1, impl="gluon")
        return out, *torch.autograd.grad(out, leaves, dout)

    assert_the_same_bits(call)


@pytest.mark.parametrize("impl", ["gluon", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_experts_that_are_added(shape, impl):
    sizes, rows = GROUPS[shape], sum(GROUPS[shape])
    dy, x = made(rows, 512), made(rows, 256, seed=1)
    before = made(len(sizes), 512, 256, seed=2).float()

    def call():
        sum_ = before.clone()
        ops.add_weight_gradient(sum_, dy, x, ends(*sizes), impl=impl)
        return (sum_,)

    assert_the_same_bits(call)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_from_pages(shape, heads):
    contexts = CONTEXTS[shape]
    longest = -(-max(contexts) // 64)
    table = torch.arange(len(contexts) * longest, device="cuda").int().view(len(contexts), longest)
    cache, query = made(table.numel(), 64, 576), made(len(contexts), 1, heads, 576, seed=1)
    context = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    impl = "gluon" if heads <= 32 else "gluon_wide"

    def call():
        latent, rope = query.split((512, 64), dim=-1)
        return (ops.mla_decode(latent, rope, cache, table, context, scale=0.07, impl=impl),)

    assert_the_same_bits(call)


@pytest.mark.parametrize("impl", ["gluon", "gluon_three", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_products_in_fp8(shape, impl):
    sizes, rows = GROUPS[shape], sum(GROUPS[shape])
    x = ops.Fp8(*ops.quantise_fp8_rows(made(rows, 512)))
    weight = ops.quantise_fp8_weight(made(len(sizes), 384, 512, seed=1))
    columns = [ops.quantise_fp8_columns(made(rows, width, seed=width), ends(*sizes)) for width in (384, 512)]
    gradient = "gluon_three" if impl == "gluon" else impl

    def call():
        product = ops.fp8_linear(x, weight, ends(*sizes), impl=impl)
        return product, ops.fp8_weight_gradient(*columns, ends(*sizes), impl=gradient)

    assert_the_same_bits(call)


@pytest.mark.parametrize("impl", ["gluon", "two_ops"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_weighted_rows_of_swiglu(shape, impl):
    sizes, rows = GROUPS[shape], sum(GROUPS[shape])
    gate_up, dy, weight = made(rows, 2 * 384), made(rows, 384, seed=1), made(rows, seed=2).float()

    def call():
        by_row, by_column, dweight = ops.weighted_swiglu_gradient_fp8_both(
            gate_up, dy, weight, ends(*sizes), impl=impl
        )
        return by_row.values.float(), by_row.scale, by_column.values.float(), by_column.scale, dweight

    assert_the_same_bits(call)
