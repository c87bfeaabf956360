"""Attention for Hopper against its float64 definition: lengths, masks, strides, and others' NaNs."""

from __future__ import annotations

import pytest
import torch

from benthic.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str),
]
HEADS = [(192, 128), (128, 128), (64, 64)]


def starts_of(lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def made(*shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def attend(q, k, v, queries, keys, impl, *, causal=True):
    return ops.attention(
        q, k, v, starts_of(queries), starts_of(keys),
        max_seqlen_q=max(queries), max_seqlen_k=max(keys), scale=q.shape[-1] ** -0.5,
        causal=causal, return_lse=True, impl=impl,
    )  # fmt: skip


def assert_close(found, exact, dtype):
    worst = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    assert torch.isfinite(found).all()
    assert (found.double() - exact).norm() <= worst * exact.norm()


@pytest.mark.parametrize("dims", HEADS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "groups"),
    [
        ((1000, 3, 129, 640, 128), None, 1),
        ((1, 300, 64), (700, 301, 65), 2),  # chunks of prompts, with key heads shared
        ((256, 0, 5), (128, 40, 0), 1),  # queries that see no key, and none at all
        ((5,), (0,), 1),
        ((0, 900, *[0] * 30, 70), None, 1),
        ((256, 256), None, 1),
    ],
    ids=["packs", "chunks", "blind", "no keys", "few of many", "equal ones"],
)
def test_values_gradients_and_sums_are_those_of_the_definition(dims, causal, queries, keys, groups, dtype):
    width, value = dims
    keys = keys or queries
    q = made(sum(queries), 4, width, dtype=dtype)
    k = made(sum(keys), 4 // groups, width, dtype=dtype, seed=1)
    v = made(sum(keys), 4 // groups, value, dtype=dtype, seed=2)
    grad = made(sum(queries), 4, value, dtype=dtype, seed=3)
    results = []
    for impl, precision in (("gluon", dtype), ("reference", torch.float64)):
        leaves = [x.to(precision).requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, queries, keys, impl, causal=causal)
        results.append((lse, [out, *torch.autograd.grad(out, leaves, grad.to(precision))]))
    (lse, found), (exact_lse, exact) = results
    for ours, theirs in zip(found, exact, strict=True):
        assert_close(ours, theirs, dtype)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    seen = ~exact_lse.isneginf()
    assert torch.all((lse[seen] - exact_lse[seen]).abs() < 1e-3)


def test_a_sequence_keeps_clear_of_the_numbers_of_the_next(dtype):
    lengths = (100, 200, 60)
    q, k, v = (made(360, 2, width, dtype=dtype, seed=width) for width in (192, 192, 128))
    alone, _ = attend(q[:100], k[:100], v[:100], (100,), (100,), "gluon")
    k[100:300], v[100:300] = torch.nan, torch.inf
    out, _ = attend(q, k, v, lengths, lengths, "gluon")
    assert torch.equal(out[:100], alone)
    assert torch.isfinite(out[300:]).all()


@pytest.mark.parametrize("dims", HEADS, ids=str)
def test_gradients_keep_clear_of_the_numbers_beside_them_and_are_the_same_bits_every_time(dims, dtype):
    width, value = dims
    starts, lengths = starts_of((100, 200, 60)), (100, 200, 60)

    def gradients(operands, grad):
        leaves = [x.clone().requires_grad_() for x in operands]
        out = ops.attention(
            *leaves, starts, starts, max_seqlen_q=200, max_seqlen_k=200, scale=0.1, impl="gluon"
        )
        return torch.autograd.grad(out, leaves, grad)

    widths = (width, width, value, value)
    *operands, grad = (made(sum(lengths), 4, w, dtype=dtype, seed=seed) for seed, w in enumerate(widths))
    clean = gradients(operands, grad)
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(gradients(operands, grad), clean, strict=True))
    for x in (*operands, grad):
        x[100:300] = torch.nan
    for found, alone in zip(gradients(operands, grad), clean, strict=True):
        assert torch.equal(found[:100], alone[:100])
        assert torch.equal(found[300:], alone[300:])


def test_operands_may_be_cut_out_of_others(dtype):
    both = made(333, 4, 256, dtype=dtype)
    q, k = made(333, 4, 200, dtype=dtype, seed=1)[..., 8:], made(333, 4, 195, dtype=dtype, seed=2)[..., 3:]
    v = both[..., 128:]
    out, _ = attend(q, k, v, (333,), (333,), "gluon")
    exact, _ = attend(q.double(), k.double(), v.double(), (333,), (333,), "reference")
    assert_close(out, exact, dtype)


def test_a_repeated_call_gives_the_same_bits_also_from_a_graph(dtype):
    q, k, v = (made(700, 16, width, dtype=dtype, seed=width) for width in (192, 192, 128))
    first, _ = attend(q, k, v, (500, 200), (500, 200), "gluon")
    assert all(torch.equal(first, attend(q, k, v, (500, 200), (500, 200), "gluon")[0]) for _ in range(20))
    starts, graph = starts_of((500, 200)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(
            q, k, v, starts, starts, max_seqlen_q=500, max_seqlen_k=500, scale=192**-0.5, impl="gluon"
        )
    graph.replay()
    assert torch.equal(out, first)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [((1000, 3, 129, 640), None), ((1, 300, 64), (700, 301, 65)), ((256, 0, 5), (128, 40, 0)), ((5,), (0,))],
    ids=["packs", "chunks", "blind", "no keys"],
)
def test_heads_in_parts_give_the_bits_of_joined_ones_wherever_the_parts_lie(queries, keys, dtype):
    keys = keys or queries
    rows, context, heads = sum(queries), sum(keys), 3
    q = made(rows + 1, heads, 192, dtype=dtype)[1:]
    kv = made(context, heads, 256, dtype=dtype, seed=1)
    latents = made(context, 576, dtype=dtype, seed=2)
    rotated = made(rows, heads, 64, dtype=dtype, seed=3)
    bounds = starts_of(queries), starts_of(keys)
    lengths = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys), "scale": 192**-0.5}

    def attended(q_rope, k_rope, impl):
        parts = q[..., :128], q_rope, kv[..., :128], k_rope, kv[..., 128:]
        return ops.attention_of_parts(*parts, *bounds, **lengths, impl=impl)

    for q_rope in (rotated, q[..., 128:]):
        for k_rope in (latents[:, 512:], latents[:, 512:].contiguous(), latents[:, 3:67]):
            assert torch.equal(*(attended(q_rope, k_rope, impl) for impl in ("gluon", "joined")))
    wide = [x.double() for x in (q[..., :128], rotated, kv[..., :128], latents[:, 512:], kv[..., 128:])]
    exact = ops.attention_of_parts(*wide, *bounds, **lengths, impl="reference")
    assert_close(attended(rotated, latents[:, 512:], "gluon"), exact, dtype)


def test_parts_keep_clear_of_the_numbers_of_the_next_sequence(dtype):
    lengths = (100, 200, 60)
    q, kv, latents = (made(360, *shape, dtype=dtype) for shape in ((2, 192), (2, 256), (576,)))

    def attended(rows, lengths):
        own = q[rows], kv[rows], latents[rows]
        parts = own[0][..., :128], own[0][..., 128:], own[1][..., :128], own[2][:, 512:], own[1][..., 128:]
        starts = starts_of(lengths)
        longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        return ops.attention_of_parts(*parts, starts, starts, **longest, scale=0.1, impl="gluon")

    alone = attended(slice(100), (100,))
    kv[100:300], latents[100:300] = torch.nan, torch.inf
    assert torch.equal(attended(slice(None), lengths)[:100], alone)
