"""Products and attention by row on a CPU: a row has the bits it has alone, wherever it stands."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import BackendError, ShapeError
from benthic.kernels import native, ops

needs_compiler = pytest.mark.skipif(native.build_refusal() is not None, reason=str(native.build_refusal()))
EXPERTS = 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_columns(weight: torch.Tensor) -> torch.Tensor:
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def dense(x: torch.Tensor, outer: int, impl: str | None = None) -> torch.Tensor:
    return ops.linear_by_row(x[:, 0], random(outer, x.shape[2], seed=1), impl=impl)


def dense_in_columns(x: torch.Tensor, outer: int, impl: str | None = None) -> torch.Tensor:
    return ops.linear_by_row(x[:, 0], in_columns(random(outer, x.shape[2], seed=1)), impl=impl)


def heads(x: torch.Tensor, outer: int, impl: str | None = None) -> torch.Tensor:
    return ops.heads_linear_by_row(x, random(x.shape[1], outer, x.shape[2], seed=1), impl=impl)


def one_expert(x: torch.Tensor, outer: int, impl: str | None = None) -> torch.Tensor:
    ends_E = torch.tensor([0, 0, x.shape[0], x.shape[0], x.shape[0]], dtype=torch.int32)
    weight = random(EXPERTS, outer, x.shape[2], seed=1)
    return ops.grouped_linear_by_row(x[:, 1], weight, ends_E, impl=impl)


PRODUCTS = (dense, dense_in_columns, heads, one_expert)


@needs_compiler
@pytest.mark.parametrize(("inner", "outer"), [(300, 48), (37, 9), (16, 513)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_of_a_product_has_the_bits_it_has_alone(product, inner: int, outer: int) -> None:
    x = random(41, 3, inner)
    together = product(x, outer)
    torch.testing.assert_close(together, product(x, outer, "reference"), rtol=1e-5, atol=1e-5 * inner**0.5)
    for first, last in ((0, 1), (40, 41), (3, 10), (7, 31)):
        assert torch.equal(product(x[first:last], outer), together[first:last])


@needs_compiler
def test_experts_by_row_give_their_own_rows_and_zeros_behind_the_last() -> None:
    x, weight = random(30, 24), random(EXPERTS, 11, 24, seed=1)
    ends = torch.tensor([4, 4, 19, 20, 26], dtype=torch.int32)
    found = ops.grouped_linear_by_row(x, weight, ends)
    expected = ops.grouped_linear(x, weight, ends, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[26:] == 0).all()
    for start, (expert, end) in zip((0, 4, 4, 19, 20), enumerate(ends.tolist()), strict=True):
        assert torch.equal(found[start:end], ops.linear_by_row(x[start:end], weight[expert]))


@needs_compiler
@pytest.mark.parametrize("num_heads", [1, 7, 16])
def test_a_query_has_the_bits_it_has_alone_wherever_its_pages_lie_and_however_wide_its_table(
    num_heads: int,
) -> None:
    latent, rotary, block, contexts = 40, 8, 13, [70, 1, 0, 33, 71, 69, -2]
    table = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(2, 12).to(torch.int32)
    sequence = torch.tensor([0, 1, 0, 1, 0, 1, 1], dtype=torch.int32)
    q_latent, q_rope = random(7, num_heads, latent), random(7, num_heads, rotary, seed=1)
    cache, context = random(24, block, latent + rotary, seed=2), torch.tensor(contexts, dtype=torch.int32)
    together = ops.mla_by_row(q_latent, q_rope, cache, table, sequence, context, scale=0.3)
    exact = ops.mla_by_row(q_latent, q_rope, cache, table, sequence, context, scale=0.3, impl="reference")
    torch.testing.assert_close(together, exact, rtol=1e-5, atol=1e-5)
    assert (together[[2, 6]] == 0).all()
    moved = cache.flip(0).contiguous()
    for row, seen in enumerate(contexts):
        pages = 23 - table[sequence[row], : max(1, -(-seen // block))]
        alone = ops.mla_by_row(
            q_latent[row : row + 1],
            q_rope[row : row + 1],
            moved,
            pages.unsqueeze(0),
            torch.zeros(1, dtype=torch.int32),
            context[row : row + 1],
            scale=0.3,
        )
        assert torch.equal(alone[0], together[row])


def test_operands_that_disagree_are_refused_with_both_numbers() -> None:
    with pytest.raises(ShapeError, match="rows are 8 wide but weights expect 9"):
        ops.linear_by_row(random(2, 8), random(3, 9))
    with pytest.raises(ShapeError, match="2 heads of rows but 3 of weights"):
        ops.heads_linear_by_row(random(4, 2, 8), random(3, 5, 8))
    with pytest.raises(ShapeError, match=r"3 experts but ends has shape \(2,\)"):
        ops.grouped_linear_by_row(random(4, 8), random(3, 5, 8), torch.tensor([1, 4], dtype=torch.int32))
    queries, table = (random(2, 3, 8), random(2, 3, 4)), torch.zeros(1, 1, dtype=torch.int32)
    one = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ShapeError, match="a cache 13 wide"):
        ops.mla_by_row(*queries, random(1, 4, 13), table, one, one, scale=1.0)
    with pytest.raises(ShapeError, match=r"2 queries, sequences \(1,\)"):
        ops.mla_by_row(*queries, random(1, 4, 12), table, one[:1], one, scale=1.0)


def test_products_by_row_compute_no_gradients_but_by_definition() -> None:
    x = random(3, 8).requires_grad_()
    with pytest.raises(BackendError, match="computes no gradients"):
        ops.linear_by_row(x, random(2, 8), impl="triton" if native.build_refusal() else "native")
