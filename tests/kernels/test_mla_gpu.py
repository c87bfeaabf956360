"""MLA decode for Hopper against its float64 definition: pages cut anywhere, many shapes, others' NaNs."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import BackendError
from benthic.kernels import gluon_mla, gluon_mla_rows, gluon_mla_wide, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str),
]
SCALE = 192**-0.5


def made(contexts, queries, heads, dtype):
    """Queries, and contexts in pages in random order; what belongs to no context is NaN."""
    generator = torch.Generator("cuda").manual_seed(0)
    pages = [-(-context // 64) for context in contexts]
    order = torch.randperm(sum(pages) + 2, generator=generator, device="cuda")
    cache = torch.full((sum(pages) + 2, 64, 576), torch.nan, dtype=dtype, device="cuda")
    table = torch.full((len(contexts), max(pages) + 1), 2**30, dtype=torch.int32, device="cuda")
    for row, (context, own) in enumerate(zip(contexts, order[: sum(pages)].split(pages), strict=True)):
        table[row, : len(own)] = own.int()
        tokens = torch.full((len(own) * 64, 576), torch.nan, dtype=dtype, device="cuda")
        tokens[:context] = torch.randn(context, 576, generator=generator, device="cuda").to(dtype)
        cache[own] = tokens.view(-1, 64, 576)
    shape = len(contexts), queries, heads, 576
    query = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    return *query.split((512, 64), dim=-1), cache, table, torch.tensor(contexts, device="cuda").int()


def decode(operands, impl=None):
    """By name: the first choice may be another."""
    rows = operands[0].shape[1] * operands[0].shape[2]
    return ops.mla_decode(*operands, scale=SCALE, impl=impl or ("gluon" if rows <= 32 else "gluon_wide"))


def assert_close(found, operands, dtype):
    latent, rope, cache, *where = operands
    exact = decode((latent.double(), rope.double(), cache.double(), *where), "reference")
    worst = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    assert torch.isfinite(found).all()
    errors = (found.double() - exact).flatten(2).norm(dim=-1)
    assert (errors <= worst * exact.flatten(2).norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("queries", "heads"),
    [(1, 16), (1, 5), (2, 16), (3, 5), (4, 8), (1, 64), (1, 128), (2, 64), (4, 16), (1, 40), (3, 50)],
    ids=str,
)
@pytest.mark.parametrize(
    "contexts",
    [
        (1,),
        (63, 64, 65, 66),
        (0, 4097, 0, 3, 1000, 0),
        (40000,),
        tuple(range(0, 900, 3)),
        (4160,) * 8,
        (1030,) * 200,
    ],
    ids=["one token", "a page", "ragged", "long", "many", "alike, pieces", "alike, groups"],
)
def test_outputs_are_those_of_the_definition(contexts, queries, heads, dtype):
    operands = made(contexts, queries, heads, dtype)
    assert_close(decode(operands), operands, dtype)


@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize(("module", "heads"), [(gluon_mla, 16), (gluon_mla_wide, 128)])
def test_shares_may_begin_and_end_anywhere(module, heads, programs, dtype, monkeypatch):
    launcher = gluon_mla_rows if module is gluon_mla else module
    monkeypatch.setattr(launcher, "multiprocessors", lambda _device: programs)
    operands = made((130, 0, 64, 1, 700, 65), 1, heads, dtype)
    assert_close(module.mla_decode(*operands, scale=SCALE), operands, dtype)


@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (1, 5), (2, 16), (3, 5)], ids=str)
@pytest.mark.parametrize(
    "contexts",
    [
        (1,),
        (63, 64, 65, 66),
        (0, 4097, 0, 3, 1000, 0),
        (40000,),
        tuple(range(0, 900, 3)),
        (4160,) * 8,
        (1030,) * 200,
    ],
    ids=["one token", "a page", "ragged", "long", "many", "alike, pieces", "alike, groups"],
)
def test_a_cache_in_e4m3_is_widened_as_it_is_read(contexts, queries, heads, dtype):
    latent, rope, cache, *where = made(contexts, queries, heads, torch.bfloat16)
    operands = latent, rope, cache.to(torch.float8_e4m3fn), *where
    if dtype is torch.bfloat16:
        assert_close(decode(operands, "gluon_fp8"), operands, dtype)
    else:
        with pytest.raises(BackendError, match="takes queries in bfloat16"):
            decode((latent.to(dtype), rope.to(dtype), *operands[2:]), "gluon_fp8")


@pytest.mark.parametrize("heads", [16, 128])
def test_queries_may_lie_across(heads, dtype):
    latent, *rest = made((65, 1000), 1, heads, dtype)
    across = latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert torch.equal(decode((across, *rest)), decode((latent, *rest)))


@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_reads_contexts_as_they_are_and_repeats_to_the_last_bit(heads, dtype):
    operands = made((300, 64, 2000, 129), 1, heads, dtype)
    context, graph = operands[-1], torch.cuda.CUDAGraph()
    decode(operands)
    with torch.cuda.graph(graph):
        captured = decode(operands)
    for less in (0, 1, 63, 64):
        context -= less
        context.clamp_(min=0)
        for _ in range(10):
            graph.replay()
            assert torch.equal(captured, decode(operands))
        assert_close(captured, operands, dtype)
