"""Every CPU implementation equals the definition, values and gradients, on odd sizes."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import BackendError, ConfigError, ShapeError
from benthic.kernels import ops, torch_heads
from benthic.kernels.ops import LINEAR
from benthic.kernels.table import Case

TOKENS, DIM = 63, 44


def made(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_(grad)


def compare(function, inputs, *, tolerance=1e-5, impls=(None, "reference")):
    """Values and gradients of two implementations, the second in float64."""
    results = []
    for impl, dtype in zip(impls, (torch.float32, torch.float64), strict=True):
        leaves = [
            x.detach().to(dtype if x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad)
            for x in inputs
        ]
        outputs = function(*leaves, impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [out for out in outputs if out.requires_grad]
        loss = sum((out * made(*out.shape, seed=9 + i, grad=False)).sum() for i, out in enumerate(outputs))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([*outputs, *torch.autograd.grad(loss, wanted)])
    for fast, slow in zip(*results, strict=True):
        assert fast.dtype == torch.float32
        scale = slow.abs().max().clamp(min=1.0)
        assert torch.isfinite(fast).all()
        assert (fast.double() - slow).abs().max() <= tolerance * scale


def test_gradients_of_parts_of_heads():
    wide = torch.randn(5, 3, 9, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.join_head_dims(*ops.split_head_dims(x, 6)), wide)
    assert torch.autograd.gradcheck(ops.join_head_dims, (wide, other))
    weight = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.heads_linear, (wide, weight))


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_product_of_every_head_is_written_row_by_row(tokens):
    x, weight = made(tokens, 3, 8), made(3 * 9, 8, seed=1).unflatten(0, (3, 9))[:, 4:]
    with torch.no_grad():
        out = torch_heads.heads_linear(x, weight)
        assert torch.equal(out, ops.heads_linear(x, weight, impl="reference"))
    assert out.is_contiguous()


def test_parts_of_heads_that_do_not_fit_are_refused():
    x = made(5, 3, 8)
    for second in (made(5, 2, 4), made(4, 4), made(5)):
        with pytest.raises(ShapeError, match=r"join_head_dims: first \(5, 3, 8\)"):
            ops.join_head_dims(x, second)
    for first in (0, 8):
        with pytest.raises(ShapeError, match=f"split_head_dims: {first} columns"):
            ops.split_head_dims(x, first)
    with pytest.raises(ShapeError, match="heads_linear"):
        ops.heads_linear(x, made(2, 4, 8))


def test_products_that_do_not_fit_or_are_not_of_few_rows_are_refused():
    x, weight = made(9, 8), made(5, 8)
    for rows, by in ((x, made(5, 7)), (x[None], weight), (x, weight[0])):
        with pytest.raises(ShapeError, match="linear: rows"):
            ops.linear(rows, by)
    case = Case("cuda", torch.bfloat16, (2048, 2048), few=True)
    assert LINEAR.select(case)[0].name == "few_rows"
    assert LINEAR.select(case._replace(few=False))[0].name == "torch"
    refusals = (
        (case._replace(few=False), "few rows"),
        (case._replace(grad=True), "no gradients"),
        (case._replace(mixed=True), "one dtype"),
        (case._replace(dims=(2048, 4104)), "up to 4096 columns"),
        (case._replace(dims=(5632, 2048)), "more than 4096 outputs faster, these have 5632"),
        (case._replace(dtype=torch.float32), "takes"),
    )
    for refused, why in refusals:
        with pytest.raises(BackendError, match=why):
            LINEAR.select(refused, "few_rows")


@pytest.mark.parametrize("shape", [(TOKENS, DIM), (3, 7, DIM), (1, DIM)])
def test_rms_norm_and_its_gradients_equal_the_definition(shape):
    compare(lambda x, w, impl: ops.rms_norm(x, w, 1e-6, impl=impl), [made(*shape), made(DIM, seed=1)])


def test_rms_norm_of_a_residual_sum_returns_the_sum_too():
    inputs = [made(TOKENS, DIM), made(TOKENS, DIM, seed=1), made(DIM, seed=2)]
    compare(lambda x, r, w, impl: ops.add_rms_norm(x, r, w, 1e-6, impl=impl), inputs)


def test_a_norm_that_hands_on_its_input_adds_the_gradients_of_both():
    inputs = [made(TOKENS, DIM), made(DIM, seed=1)]
    compare(lambda x, w, impl: ops.add_rms_norm(x, None, w, 1e-6, impl=impl), inputs)


def test_swiglu_and_its_gradient_equal_the_definition():
    compare(lambda x, impl: ops.swiglu(x, impl=impl), [made(TOKENS, 2 * DIM)])


@pytest.mark.parametrize("shape", [(TOKENS, 7, 12), (TOKENS, 12)])
def test_rope_and_its_gradient_equal_the_definition(shape):
    angle = made(TOKENS, 6, seed=3, grad=False)
    compare(lambda x, c, s, impl: ops.rope(x, c, s, impl=impl), [made(*shape), angle.cos(), angle.sin()])


def summed(x, weight, choice, impl):
    rows, _, maps = ops.permute(x, choice, 5, impl=impl)
    return ops.unpermute(rows, maps, weight, impl=impl)


def attended(q, k, v, impl):
    starts = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
    return ops.attention(
        q, k, v, starts, starts, max_seqlen_q=43, max_seqlen_k=43, scale=0.3, causal=True, impl=impl
    )


NARROW = {
    "rms_norm": (lambda x, w, impl: ops.rms_norm(x, w, 1e-6, impl=impl), [(TOKENS, DIM), (DIM,)]),
    "add_rms_norm": (
        lambda x, r, w, impl: ops.add_rms_norm(x, r, w, 1e-6, impl=impl),
        [(TOKENS, DIM), (TOKENS, DIM), (DIM,)],
    ),
    "swiglu": (ops.swiglu, [(TOKENS, 2 * DIM)]),
    "attention": (attended, [(TOKENS, 3, 12), (TOKENS, 3, 12), (TOKENS, 3, 8)]),
}


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_values_and_gradients_are_the_definition_rounded(name):
    function, shapes = NARROW[name]
    narrow(function, [made(*shape, seed=i) for i, shape in enumerate(shapes)])


def test_bfloat16_rotations_and_sums_of_experts_rows_are_the_definition_rounded():
    angle = made(TOKENS, 6, seed=3, grad=False)
    narrow(lambda x, impl: ops.rope(x, angle.cos(), angle.sin(), impl=impl), [made(TOKENS, 7, 12)])
    choice = torch.rand(TOKENS, 5, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :3]
    weight = made(TOKENS, 3, seed=5, grad=False)
    narrow(lambda x, impl: summed(x, weight, choice, impl), [made(TOKENS, DIM)])


def narrow(function, inputs):
    """The implementation that runs in bfloat16 against the definition in float64 of the same inputs."""
    inputs, found = [x.detach().bfloat16() for x in inputs], []
    for impl, dtype in ((None, torch.bfloat16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((out * made(*out.shape, seed=9, grad=False).to(dtype)).sum() for out in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for fast, slow in zip(*found, strict=True):
        assert fast.dtype == torch.bfloat16
        assert (fast.double() - slow).norm() < 0.01 * slow.norm()


def test_row_ops_give_the_same_values_with_and_without_gradients():
    x, weight, wide = made(TOKENS, DIM), made(DIM, seed=1), made(TOKENS, 2 * DIM)
    angle = made(TOKENS, DIM // 2, seed=3, grad=False)
    with_gradient = (ops.rms_norm(x, weight, 1e-6), ops.swiglu(wide), ops.rope(x, angle.cos(), angle.sin()))
    with torch.no_grad():
        without = (ops.rms_norm(x, weight, 1e-6), ops.swiglu(wide), ops.rope(x, angle.cos(), angle.sin()))
    for one, other in zip(with_gradient, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


PACKS = {
    "ragged": ((5, 1, 17, 40), (5, 1, 17, 40)),
    "equal": ((21, 21, 21), (21, 21, 21)),
    "longer context": ((5, 1, 17), (9, 30, 17)),
    "equal queries, longer equal context": ((4, 4), (11, 11)),
    "surplus queries": ((9, 6), (4, 6)),
    "an empty sequence": ((5, 0, 3), (7, 2, 3)),
}


def pack(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(7, 7, 12, 8), (6, 2, 8, 8), (3, 1, 6, 10)])
@pytest.mark.parametrize("name", PACKS)
def test_attention_and_its_gradients_equal_the_definition(name, dims, causal):
    lengths_q, lengths_k = PACKS[name]
    heads, key_heads, d, v = dims
    inputs = [
        made(sum(lengths_q), heads, d),
        made(sum(lengths_k), key_heads, d, seed=1),
        made(sum(lengths_k), key_heads, v, seed=2),
    ]

    def run(q, k, v, impl):
        return ops.attention(
            q,
            k,
            v,
            pack(lengths_q),
            pack(lengths_k),
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            scale=0.3,
            causal=causal,
            impl=impl,
        )

    compare(run, inputs)


@pytest.mark.parametrize("name", PACKS)
def test_attention_returns_the_log_sum_exp_of_its_scores(name):
    lengths_q, lengths_k = PACKS[name]
    q, k, v = (
        made(sum(lengths_q), 3, 8),
        made(sum(lengths_k), 3, 8, seed=1),
        made(sum(lengths_k), 3, 8, seed=2),
    )
    results = [
        ops.attention(
            q,
            k,
            v,
            pack(lengths_q),
            pack(lengths_k),
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            scale=0.3,
            return_lse=True,
            impl=impl,
        )[1]
        for impl in (None, "reference")
    ]
    assert results[0].shape == (sum(lengths_q), 3)
    assert not results[0].requires_grad
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_attention_aligned_to_the_end_equals_the_tail_of_full_attention():
    q, k, v = (made(20, 3, 8, seed=seed, grad=False) for seed in range(3))
    whole = ops.attention(q, k, v, pack([20]), pack([20]), max_seqlen_q=20, max_seqlen_k=20, scale=0.3)
    tail = ops.attention(q[13:], k, v, pack([7]), pack([20]), max_seqlen_q=7, max_seqlen_k=20, scale=0.3)
    torch.testing.assert_close(tail, whole[13:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PACKS)
def test_attention_of_parts_of_heads_and_its_gradients_equal_the_definition(name):
    lengths_q, lengths_k = PACKS[name]
    queries, keys = sum(lengths_q), sum(lengths_k)
    shapes = (queries, 3, 8), (queries, 3, 4), (keys, 3, 8), (keys, 4), (keys, 3, 6)
    lengths = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    starts = pack(lengths_q), pack(lengths_k)

    def run(*parts, impl):
        return ops.attention_of_parts(*parts, *starts, **lengths, scale=0.3, impl=impl)

    compare(run, [made(*shape, seed=seed) for seed, shape in enumerate(shapes)])


def test_parts_of_queries_and_keys_that_do_not_fit_are_refused():
    q, k, v, starts = made(5, 3, 8), made(5, 3, 8), made(5, 3, 6), pack([5])
    lengths = {"max_seqlen_q": 5, "max_seqlen_k": 5}
    for rotated in ((made(5, 2, 4), made(5, 4)), (made(5, 3, 4), made(5, 3)), (made(5, 3, 4), made(4, 4))):
        with pytest.raises(ShapeError, match="attention_of_parts"):
            ops.attention_of_parts(q, rotated[0], k, rotated[1], v, starts, starts, **lengths, scale=0.3)


def paged(contexts, *, block, width, seed=0):
    """A cache full of NaN but for the contexts, with pages in random order; also the block table."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-context // block) for context in contexts]
    cache = torch.full((sum(pages) + 2, block, width), torch.nan)
    order = torch.randperm(sum(pages), generator=generator) + 1
    table = torch.full((len(contexts), max(pages) + 1), 10**6, dtype=torch.int32)
    for row, (context, chosen) in enumerate(zip(contexts, order.split(pages), strict=True)):
        table[row, : len(chosen)] = chosen.to(torch.int32)
        slots = (chosen[:, None] * block + torch.arange(block)).flatten()[:context]
        rows = torch.randn(context, width, generator=generator)
        ops.store_latent(cache, rows[:, : width - 4], rows[:, width - 4 :], slots)
    return cache, table


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("contexts", [(63, 5, 17), (1, 0, 3), (700, 9)])
def test_mla_decode_equals_the_definition_on_ragged_pages_between_nans(queries, contexts):
    cache, table = paged(contexts, block=16, width=100)
    q_latent, q_rope = (
        made(len(contexts), queries, 7, 96, grad=False),
        made(len(contexts), queries, 7, 4, seed=1),
    )
    context = torch.tensor(contexts, dtype=torch.int32)
    with torch.no_grad():
        fast, slow = (
            ops.mla_decode(q_latent, q_rope, cache, table, context, scale=0.2, impl=impl)
            for impl in (None, "reference")
        )
    assert torch.isfinite(fast).all()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_store_latent_skips_slot_minus_one():
    cache = torch.zeros(2, 4, 6)
    latent, rope = torch.ones(3, 4), torch.full((3, 2), 2.0)
    ops.store_latent(cache, latent, rope, torch.tensor([5, -1, 0]))
    assert cache.view(-1, 6)[[5, 0]].tolist() == [[1, 1, 1, 1, 2, 2]] * 2
    assert cache.count_nonzero() == 12


GROUPS = {"even": (9, 9, 9, 9, 9), "empty experts": (0, 20, 0, 25, 0), "one takes all": (0, 0, 45, 0, 0)}


@pytest.mark.parametrize("impl", ["grouped_mm", "loop"])
@pytest.mark.parametrize("spare", [0, 6])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_linear_and_its_gradients_equal_the_definition(name, spare, impl):
    ends = torch.tensor(GROUPS[name]).cumsum(0).to(torch.int32)
    inputs = [made(45 + spare, 12), made(5, 8, 12, seed=1)]
    compare(lambda x, w, impl: ops.grouped_linear(x, w, ends, impl=impl), inputs, impls=(impl, "reference"))


def test_grouped_linear_takes_widths_that_the_library_refuses_through_the_loop():
    ends = torch.tensor([3, 3, 10], dtype=torch.int32)
    compare(
        lambda x, w, impl: ops.grouped_linear(x, w, ends, impl=impl), [made(11, 7), made(3, 5, 7, seed=1)]
    )
    with pytest.raises(BackendError, match="16 bytes"):
        ops.grouped_linear(made(11, 7), made(3, 5, 7), ends, impl="grouped_mm")


@pytest.mark.parametrize("impl", ["two_ops", None])
@pytest.mark.parametrize("spare", [0, 6])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_swiglu_and_its_gradients_equal_the_definition(name, spare, impl):
    ends = torch.tensor(GROUPS[name]).cumsum(0).to(torch.int32)
    inputs = [made(45 + spare, 12), made(5, 8, 12, seed=1)]
    compare(lambda x, w, impl: ops.grouped_swiglu(x, w, ends, impl=impl), inputs, impls=(impl, "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_grouped_swiglu_has_the_bits_of_both_ops(columns, dtype):
    ends = torch.tensor(GROUPS["empty experts"]).cumsum(0).to(torch.int32)
    x, weight = made(50, 16, grad=False).to(dtype), made(5, 24, 16, seed=1, grad=False).to(dtype)
    if columns:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    found = ops.grouped_swiglu(x, weight, ends)
    assert found.shape == (50, 12)
    assert found.dtype == dtype
    assert torch.equal(found, ops.swiglu(ops.grouped_linear(x, weight, ends)))
    assert not found[45:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_swiglu_has_the_bits_of_both_ops_and_the_definitions_gradients(dtype):
    x, weight = made(50, 16), made(24, 16, seed=1)
    compare(
        lambda x, w, impl: ops.linear_swiglu(x, w, impl=impl), [x, weight], impls=("two_ops", "reference")
    )
    x, weight = (each.detach().to(dtype) for each in (x, weight))
    found = ops.linear_swiglu(x, weight)
    assert found.shape == (50, 12)
    assert torch.equal(found, ops.swiglu(ops.linear(x, weight)))
    with pytest.raises(ShapeError, match=r"linear_swiglu: rows \(50, 16\) and a weight \(24, 15\)"):
        ops.linear_swiglu(x, weight[:, 1:])
    with pytest.raises(ShapeError, match="must be even, not 23"):
        ops.linear_swiglu(x, weight[1:])


@pytest.mark.parametrize("chunk", [None, 1, 10, 100])
def test_linear_cross_entropy_and_its_gradients_equal_the_definition(chunk):
    target = torch.randint(0, 50, (TOKENS,), generator=torch.Generator().manual_seed(0))
    target[::5] = -100

    def run(hidden, weight, impl):
        return ops.linear_cross_entropy(hidden, weight, target, chunk=chunk, impl=impl)

    compare(run, [made(TOKENS, DIM), made(50, DIM, seed=1)])


def test_linear_cross_entropy_is_zero_where_ignored_and_finds_the_best_token():
    hidden, weight = made(TOKENS, DIM), made(50, DIM, seed=1)
    target = torch.full((TOKENS,), 7)
    target[3] = 49 - 50 + 1 - 1  # -1 as the ignored index
    loss, best = ops.linear_cross_entropy(
        hidden, weight, target, ignore_index=-1, chunk=9, return_argmax=True
    )
    assert loss.dtype == torch.float32
    assert loss[3] == 0
    assert (loss[torch.arange(TOKENS) != 3] > 0).all()
    assert torch.equal(best, (hidden @ weight.T).argmax(-1))


def test_wrong_operands_are_refused_with_the_two_numbers():
    with pytest.raises(ShapeError, match=r"44 columns .* \(43,\)"):
        ops.rms_norm(made(TOKENS, DIM), made(43), 1e-6)
    with pytest.raises(ShapeError, match="even, not 7"):
        ops.swiglu(made(TOKENS, 7))
    cu = pack([5])
    with pytest.raises(ShapeError, match="7 query heads are not a multiple of 2"):
        ops.attention(
            made(5, 7, 8), made(5, 2, 8), made(5, 2, 8), cu, cu, max_seqlen_q=5, max_seqlen_k=5, scale=1
        )
    cache, table = torch.zeros(2, 4, 10), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ShapeError, match="cache is 10 wide but queries are 12"):
        ops.mla_decode(made(1, 1, 2, 8), made(1, 1, 2, 4), cache, table, torch.tensor([1]), scale=1)
    with pytest.raises(ShapeError, match=r"12 wide .* expect 11"):
        ops.grouped_linear(made(9, 12), made(2, 3, 11), torch.tensor([1, 9], dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"grouped_swiglu: rows are 12 wide .* expect 11"):
        ops.grouped_swiglu(made(9, 12), made(2, 4, 11), torch.tensor([1, 9], dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"grouped_swiglu: 2 experts but ends has shape \(3,\)"):
        ops.grouped_swiglu(made(9, 12), made(2, 4, 12), torch.tensor([1, 9, 9], dtype=torch.int32))
    with pytest.raises(ShapeError, match="must be even, not 3"):
        ops.grouped_swiglu(made(9, 12), made(2, 3, 12), torch.tensor([1, 9], dtype=torch.int32))
    with pytest.raises(ConfigError, match="noaux_tc"):
        ops.route(
            made(3, 8, grad=False),
            None,
            scoring_func="sigmoid",
            topk_method="noaux",
            top_k=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
        )


def test_an_implementation_that_cannot_run_here_is_refused_not_swapped():
    with pytest.raises(BackendError, match=r"no implementation 'torsh'\. Did you mean 'torch'"):
        ops.rms_norm(made(TOKENS, DIM), made(DIM), 1e-6, impl="torsh")
    with pytest.raises(
        BackendError, match=r"torch: takes torch\.float32, torch\.float64, not torch\.bfloat16"
    ):
        ops.rms_norm(made(TOKENS, DIM).bfloat16(), made(DIM).bfloat16(), 1e-6, impl="torch")
