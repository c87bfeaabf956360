"""Every Triton kernel against the float64 definition: values, gradients, odd sizes, NaN-filled outputs.

Not collected by itself. `test_interpreter.py` runs it in Triton's CPU interpreter (float32, small sizes) and
`test_gpu.py` on a GPU (bfloat16, float16 and float32, larger sizes).
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl

from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.tile_lists import TileLists
from benthic.kernels.triton_e4m3 import scaled
from benthic.kernels.triton_pack_tiles import grid_of, listed

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32]
# Relative root-mean-square error against float64: a few roundings of the dtype's own precision.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    # torch.use_deterministic_algorithms does the same after importing the compiler, which takes seconds
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # noqa: FBT003 (positional there)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(False)  # noqa: FBT003


def made(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def close_fp8(fast, exact, dtype):
    """Hopper adds FP8 products with 13 bits of fraction inside a chunk of 128, so float32 is not reached."""
    close(fast, exact, torch.float16 if ON_GPU and dtype == torch.float32 else dtype)


def close(fast, exact, dtype):
    assert fast.dtype in (dtype, torch.float32)
    assert torch.isfinite(fast).all()
    error, size = (fast.double() - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    assert error <= TOLERANCE[dtype] * size + 1e-12, f"relative error {error / size:.2e}"
    worst = (fast.double() - exact).abs().max()
    assert worst <= 20 * TOLERANCE[dtype] * exact.abs().max() + 1e-12, f"one element is off by {worst:.2e}"


def compare(function, inputs, dtype, *, impl="triton"):
    """Values and gradients of an implementation against the definition in float64 on the same inputs."""
    results = []
    for name, precision in ((impl, None), ("reference", torch.float64)):
        leaves = [x.detach().to(precision or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, impl=name)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [
            made(*out.shape, dtype=dtype, seed=9 + i).detach().to(out.dtype) for i, out in enumerate(outputs)
        ]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for fast, exact in zip(*results, strict=True):
        close(fast, exact, dtype)


TOKENS = 1023 if ON_GPU else 63
WIDTHS = [44, 512, 2048, 7168] if ON_GPU else [44]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(dtype, width):
    inputs = [made(TOKENS, width, dtype=dtype), made(width, dtype=dtype, seed=1)]
    compare(lambda x, w, impl: ops.rms_norm(x, w, 1e-6, impl=impl), inputs, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_with_many_tiles_a_program(dtype, width, monkeypatch):
    norm = importlib.import_module("benthic.kernels.triton_norm")
    monkeypatch.setattr(norm, "_WARPS", 2 * norm.backward_tile(width, 4)[2])
    tokens = TOKENS if ON_GPU else 7 * norm.backward_tile(width, 4)[0] - 1
    inputs = [made(tokens, width, dtype=dtype), made(width, dtype=dtype, seed=1)]
    compare(lambda x, w, impl: ops.add_rms_norm(x, None, w, 1e-6, impl=impl), inputs, dtype)


def test_rms_norm_of_a_strided_slice(dtype):
    inputs = [made(TOKENS, 57, dtype=dtype), made(40, dtype=dtype, seed=1)]
    compare(lambda x, w, impl: ops.rms_norm(x[:, :40], w, 1e-6, impl=impl), inputs, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_of_a_residual_sum(dtype, width):
    inputs = [made(TOKENS, width, dtype=dtype, seed=seed) for seed in (0, 1)] + [
        made(width, dtype=dtype, seed=2)
    ]
    compare(lambda x, r, w, impl: ops.add_rms_norm(x, r, w, 1e-6, impl=impl), inputs, dtype)


def test_a_norm_that_hands_on_its_input_adds_the_gradients_of_both(dtype):
    inputs = [made(TOKENS, 57, dtype=dtype), made(40, dtype=dtype, seed=1)]
    compare(lambda x, w, impl: ops.add_rms_norm(x[:, :40], None, w, 1e-6, impl=impl), inputs, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(dtype, width):
    compare(lambda x, impl: ops.swiglu(x, impl=impl), [made(TOKENS, 2 * width, dtype=dtype)], dtype)


@pytest.mark.parametrize("shape", [(TOKENS, 7, 12), (TOKENS, 64)])
def test_rope_of_a_strided_slice(dtype, shape):
    angle = made(TOKENS, shape[-1] // 2, dtype=torch.float32, seed=3).detach()
    wide = made(*shape[:-1], shape[-1] + 9, dtype=dtype)
    compare(
        lambda x, impl: ops.rope(x[..., 9:], angle.cos(), angle.sin(), impl=impl),
        [wide],
        dtype,
    )


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 16, 64), (TOKENS, 7, 12), (300, 3, 64)])
@pytest.mark.parametrize("asked", ["both", "queries", "keys"])
def test_rotations_of_both_have_the_bits_of_each_alone(dtype, tokens, heads, width, asked):
    angle = made(tokens, width // 2, dtype=torch.float32, seed=3).detach()
    angles = angle.cos(), angle.sin()
    query = made(tokens, heads, width + 9, dtype=dtype)
    key = made(tokens, 40 + width, dtype=dtype, seed=1)
    wanted = {"both": (0, 1), "queries": (0,), "keys": (1,)}[asked]
    grads = [
        made(*shape, dtype=dtype, seed=2).detach() for shape in ((tokens, heads, width), (tokens, width))
    ]
    results = []
    for rotate in (
        lambda q, k: ops.rope_both(q, k, *angles, impl="triton"),
        lambda q, k: [ops.rope(x, *angles, impl="triton") for x in (q, k)],
    ):
        outs = rotate(query[..., 9:], key[:, 40:])
        leaves = [(query, key)[i] for i in wanted]
        given = torch.autograd.grad([outs[i] for i in wanted], leaves, [grads[i] for i in wanted])
        results.append([*outs, *given])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    exact = ops.rope_both(query[..., 9:], key[:, 40:], *angles, impl="reference")
    for ours, theirs in zip(results[0], exact, strict=False):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)


WIDTHS_OF_HEADS = [(7, 128, 64), (16, 128, 128), (3, 12, 5), (1, 44, 9)]


@pytest.mark.parametrize("shared", [False, True], ids=["of each head", "of all heads"])
@pytest.mark.parametrize(("heads", "first", "second"), WIDTHS_OF_HEADS)
def test_join_head_dims_of_views_moves_every_bit(dtype, heads, first, second, shared):
    wide = made(TOKENS, heads, first + second + 8, dtype=dtype)
    other = made(TOKENS, second + 8, dtype=dtype, seed=1) if shared else wide
    dout = made(TOKENS, heads, first + second, dtype=dtype, seed=2).detach()
    results = []
    for impl in ("triton", "reference"):
        parts = wide[..., :first], other[..., -second:]
        out = ops.join_head_dims(*parts, impl=impl)
        results.append([out, *torch.autograd.grad(out, parts, dout)])
    assert all(torch.equal(fast, exact) for fast, exact in zip(*results, strict=True))
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize(("heads", "first", "second"), WIDTHS_OF_HEADS)
def test_split_head_dims_joins_gradients_to_the_bit(dtype, heads, first, second):
    wide = made(TOKENS, heads, first + second, dtype=dtype)
    grads = made(TOKENS, heads, first + 8, dtype=dtype), made(TOKENS, heads, second, dtype=dtype, seed=1)
    grads = grads[0].detach()[..., :first], grads[1].detach()
    results = []
    for impl in ("triton", "reference"):
        parts = ops.split_head_dims(wide, first, impl=impl)
        assert all(part.untyped_storage().data_ptr() == wide.data_ptr() for part in parts)
        results.append([*parts, *torch.autograd.grad(parts, wide, grads)])
    assert all(torch.equal(fast, exact) for fast, exact in zip(*results, strict=True))


def test_joins_of_no_tokens_and_of_transposed_operands(dtype):
    assert ops.join_head_dims(made(0, 4, 8, dtype=dtype), made(0, 4, dtype=dtype), impl="triton").shape == (
        0,
        4,
        12,
    )
    parts = made(8, 4, TOKENS, dtype=dtype).permute(2, 1, 0), made(4, TOKENS, dtype=dtype).t()
    assert torch.equal(*(ops.join_head_dims(*parts, impl=impl) for impl in ("triton", "reference")))


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 16, 64), (TOKENS, 7, 12)])
def test_rope_and_norm_at_once_give_the_bits_of_each_alone(dtype, tokens, heads, width):
    angle = made(tokens, width // 2, dtype=torch.float32, seed=3).detach()
    query = made(tokens, heads, width + 9, dtype=dtype).detach()[..., 9:]
    latent, key = made(tokens, 160 + width, dtype=dtype, seed=1).detach().split((160, width), -1)
    weight, angles = made(160, dtype=dtype, seed=2).detach(), (angle.cos(), angle.sin())
    once = ops.rope_and_norm(query, key, latent, weight, 1e-6, *angles, impl="triton")
    apart = [ops.rope(x, *angles, impl="triton") for x in (query, key)]
    apart.append(ops.rms_norm(latent, weight, 1e-6, impl="triton"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(once, apart, strict=True))
    exact = ops.rope_and_norm(query, key, latent, weight, 1e-6, *angles, impl="reference")
    for ours, theirs in zip(once, exact, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kept", ["as wide", "E4M3"])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 16, 64), (TOKENS, 7, 12)])
def test_rope_and_norm_write_into_one_layers_slots_what_store_latent_does(
    dtype, tokens, heads, width, kept, alone
):
    """Other layers, and slots that no row has, stay as they are; so do those of rows whose slot is -1."""
    angle = made(tokens, width // 2, dtype=torch.float32, seed=3).detach()
    query = made(tokens, heads, width + 9, dtype=dtype).detach()[..., 9:]
    latent, key = made(tokens, 160 + width, dtype=dtype, seed=1).detach().split((160, width), -1)
    operands = query, key, 300 * latent, 300 * made(160, dtype=dtype, seed=2).detach(), 1e-6
    angles = angle.cos(), angle.sin()
    pages = tokens // 7 + 2
    slots = torch.randperm(pages * 7, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)
    slots[1::3] = -1
    cached = torch.float8_e4m3fn if kept == "E4M3" else dtype
    caches = [torch.full((3, pages, 7, 160 + width), torch.nan, device=DEVICE).to(cached) for _ in range(2)]
    apart = ops.rope_and_norm(*operands, *angles, impl="triton")
    ops.store_latent(caches[0][1], apart[2], apart[1], slots, impl="triton")
    once = ops.rope_norm_store(*operands, *angles, ops.Slots(caches[1][1], slots, alone), impl="triton")
    assert torch.equal(*(cache.view(torch.uint8) for cache in caches))
    assert caches[1].float()[[0, 2]].isnan().all()
    assert once[0].equal(apart[0])
    if alone:
        assert [x.shape for x in once[1:]] == [(0, width), (0, 160)]
    else:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(once[1:], apart[1:], strict=True))


def pack(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


PACKS = {
    "ragged": ((5, 1, 63, 40), (5, 1, 63, 40)),
    "longer context": ((5, 1, 40), (9, 30, 70)),
    "surplus queries": ((9, 6, 40), (4, 6, 10)),
    "an empty sequence": ((5, 0, 3), (7, 2, 3)),
}
HEADS = [(2, 1, 12, 8), (2, 2, 44, 16), (1, 1, 192, 128)]
if ON_GPU:
    PACKS |= {
        "long": ((700, 1, 129, 257), (700, 1, 129, 257)),
        "equal": ((512, 512), (512, 512)),
        "long context": ((130, 65), (1100, 300)),
    }
    HEADS += [(4, 2, 12, 8), (3, 3, 44, 16), (7, 7, 192, 128), (7, 7, 64, 64), (8, 2, 128, 128)]


def run_attention(name, *, causal, return_lse=False):
    lengths_q, lengths_k = PACKS[name]

    def run(q, k, v, impl):
        return ops.attention(
            q,
            k,
            v,
            pack(lengths_q),
            pack(lengths_k),
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            scale=q.shape[-1] ** -0.5,
            causal=causal,
            return_lse=return_lse,
            impl=impl,
        )

    return run


def attention_inputs(name, heads, dtype):
    lengths_q, lengths_k = PACKS[name]
    query_heads, key_heads, d, v = heads
    return [
        made(sum(lengths_q), query_heads, d, dtype=dtype),
        made(sum(lengths_k), key_heads, d, dtype=dtype, seed=1),
        made(sum(lengths_k), key_heads, v, dtype=dtype, seed=2),
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_attention(dtype, name, heads, causal):
    inputs = attention_inputs(name, heads, dtype)
    compare(run_attention(name, causal=causal), inputs, dtype)


@pytest.mark.parametrize("name", PACKS)
def test_attention_log_sum_exp(dtype, name):
    inputs = attention_inputs(name, (3, 3, 44, 16), dtype)
    run = run_attention(name, causal=True, return_lse=True)
    fast = run(*inputs, impl="triton")[1].double()
    exact = run(*(x.double() for x in inputs), impl="reference")[1]
    torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(7, 7, 64, 64), (4, 4, 128, 128), (7, 7, 192, 128)], ids=str)
def test_attention_through_cudnn(dtype, heads, causal):
    if dtype == torch.float32:
        pytest.skip("cuDNN attention takes bfloat16 and float16")
    inputs = attention_inputs("equal", heads, dtype)
    compare(run_attention("equal", causal=causal), inputs, dtype, impl="cudnn")
    run = run_attention("equal", causal=causal, return_lse=True)
    lse = run(*inputs, impl="cudnn")[1].double()
    exact = run(*(x.double() for x in inputs), impl="reference")[1]
    torch.testing.assert_close(lse, exact, rtol=1e-3, atol=1e-3)


def paged(contexts, *, block, latent, rope, dtype):
    """A cache full of NaN but for the contexts, pages in random order; also the block table."""
    generator = torch.Generator().manual_seed(0)
    pages = [-(-context // block) for context in contexts]
    cache = torch.full((sum(pages) + 2, block, latent + rope), torch.nan, dtype=dtype, device=DEVICE)
    order = torch.randperm(sum(pages), generator=generator) + 1
    table = torch.full((len(contexts), max(pages) + 1), 2**30, dtype=torch.int32)
    for row, (context, chosen) in enumerate(zip(contexts, order.split(pages), strict=True)):
        table[row, : len(chosen)] = chosen.to(torch.int32)
        slots = (chosen[:, None] * block + torch.arange(block)).flatten()[:context].to(DEVICE)
        rows = made(context, latent + rope, dtype=dtype, seed=row).detach()
        ops.store_latent(cache, rows[:, :latent], rows[:, latent:], slots, impl="triton")
    return cache, table.to(DEVICE)


DECODES = [(7, 1, 96, 4, 16), (3, 5, 20, 4, 7)]
if ON_GPU:
    DECODES += [(16, 1, 512, 64, 64), (16, 4, 512, 64, 64), (128, 1, 512, 64, 64), (128, 2, 512, 64, 64)]
CONTEXTS = [(63, 5, 17), (1, 0, 30)]
if ON_GPU:
    CONTEXTS += [(4097, 1, 700, 64, 0, 333), (9000,)]


@pytest.mark.parametrize("contexts", CONTEXTS, ids=str)
@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_mla_decode_on_ragged_pages_between_nans(dtype, shape, contexts):
    heads, queries, latent, rope, block = shape
    cache, table = paged(contexts, block=block, latent=latent, rope=rope, dtype=dtype)
    q_latent = made(len(contexts), queries, heads, latent, dtype=dtype).detach()
    q_rope = made(len(contexts), queries, heads, rope, dtype=dtype, seed=1).detach()
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    scale = (latent + rope) ** -0.5
    fast = ops.mla_decode(q_latent, q_rope, cache, table, context, scale=scale, impl="triton")
    exact = ops.mla_decode(
        q_latent.double(), q_rope.double(), cache.double(), table, context, scale=scale, impl="reference"
    )
    close(fast, exact, dtype)


ALONE = [(a, b) for a in DECODES for b in CONTEXTS] if ON_GPU else list(zip(DECODES, CONTEXTS, strict=True))


@pytest.mark.parametrize(("shape", "contexts"), ALONE, ids=str)
def test_mla_by_row_on_ragged_pages_between_nans(dtype, shape, contexts, monkeypatch):
    from benthic.kernels import triton_mla_by_row

    heads, queries, latent, rope, block = shape
    if not ON_GPU:  # several cuts, and more queries than partial outputs have room for
        monkeypatch.setattr(triton_mla_by_row, "CUT", 16)
        monkeypatch.setattr(triton_mla_by_row, "PART_BYTES", 4 * heads * latent * 10)
    cache, table = paged(contexts, block=block, latent=latent, rope=rope, dtype=dtype)
    sequence = torch.arange(len(contexts), dtype=torch.int32, device=DEVICE).repeat_interleave(queries)
    unseen = torch.arange(queries, dtype=torch.int32, device=DEVICE).repeat(len(contexts))
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)[sequence.long()] - unseen
    q_latent = made(len(sequence), heads, latent, dtype=dtype).detach()
    q_rope = made(len(sequence), heads, rope, dtype=dtype, seed=1).detach()
    readers, scale = (table, sequence, context), (latent + rope) ** -0.5
    fast = ops.mla_by_row(q_latent, q_rope, cache, *readers, scale=scale, impl="triton")
    wide = q_latent.double(), q_rope.double(), cache.double()
    close(fast, ops.mla_by_row(*wide, *readers, scale=scale, impl="reference"), dtype)


@pytest.mark.parametrize(("tokens", "dims"), [(1, (36, 40)), (20, (23, 9)), (TOKENS, (36, 40))], ids=str)
def test_products_by_row(dtype, tokens, dims, monkeypatch):
    from benthic.kernels import triton_by_row

    inner, outer = dims
    x, weight = (
        made(tokens, 3, inner, dtype=dtype).detach(),
        made(3, outer, inner, dtype=dtype, seed=1).detach(),
    )
    across = weight.transpose(1, 2).contiguous().transpose(1, 2)  # as W^UK lies
    exact = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    close(ops.heads_linear_by_row(x, weight, impl="triton"), exact, dtype)
    close(ops.heads_linear_by_row(x, across, impl="triton"), exact, dtype)
    close(ops.linear_by_row(x[:, 1], weight[1], impl="triton"), exact[:, 1], dtype)
    wide = ops.linear_by_row(x[:, 1], across[1], dtype=torch.float32, impl="triton")
    close(wide, exact[:, 1], dtype)
    ends = torch.tensor([tokens // 3, tokens // 3, tokens - tokens // 5], dtype=torch.int32, device=DEVICE)
    wide = x[:, 2].double(), weight.double(), ends
    for few_rows in (0, 32):  # rows find their expert, or experts their rows
        monkeypatch.setattr(triton_by_row, "FEW_ROWS", few_rows)
        fast = ops.grouped_linear_by_row(x[:, 2], weight, ends, impl="triton")
        close(fast, ops.grouped_linear_by_row(*wide, impl="reference"), dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_mla_decode_does_not_depend_on_the_number_of_splits(dtype, splits):
    from benthic.kernels import triton_mla

    cache, table = paged((63, 5, 0), block=8, latent=20, rope=4, dtype=dtype)
    q_latent, q_rope = made(3, 2, 3, 20, dtype=dtype).detach(), made(3, 2, 3, 4, dtype=dtype, seed=1).detach()
    context = torch.tensor((63, 5, 0), dtype=torch.int32, device=DEVICE)
    fast = triton_mla.mla_decode(q_latent, q_rope, cache, table, context, scale=0.2, splits=splits)
    exact = ops.mla_decode(
        q_latent.double(), q_rope.double(), cache.double(), table, context, scale=0.2, impl="reference"
    )
    close(fast, exact, dtype)


@pytest.mark.parametrize("shares", [1, 5, 132])
@pytest.mark.parametrize("contexts", [(1, 0, 65, 64, 700, 0), (0, 0), (9000,)], ids=str)
def test_parts_of_contexts_become_outputs(dtype, contexts, shares):
    """Parts and outputs as both decodes in Gluon leave them; the rest of their memory is NaN."""
    from benthic.kernels import gluon_mla_shares

    pages, places, rows = [-(-context // 64) for context in contexts], 2 * shares, 6
    length, taken = max(-(-sum(pages) // shares), 2), 0
    part = torch.full((places, 16, 512), torch.nan, device=DEVICE)
    lse = torch.full((places, 16), torch.nan, device=DEVICE)
    ends = torch.full((2, len(contexts)), -1, dtype=torch.int32, device=DEVICE)
    whole = torch.full((len(contexts), rows, 512), torch.nan, dtype=dtype, device=DEVICE)
    expected = torch.zeros(len(contexts), rows, 512, dtype=torch.float64, device=DEVICE)
    for sequence, context in enumerate(contexts):
        scores = 9 * made(rows, context, dtype=torch.float32, seed=sequence).detach()
        values = made(context, 512, dtype=torch.float32, seed=sequence + 9).detach()
        expected[sequence] = torch.softmax(scores.double() * math.log(2), -1) @ values.double()
        first, last = taken // length, (taken + pages[sequence] - 1) // length
        if context:
            ends[:, sequence] = torch.tensor([first, last])
        for share in range(first, last + 1) if first < last else ():
            begin = max(share * length - taken, 0) * 64
            seen = slice(begin, 64 * (length * (share + 1) - taken))
            place = 2 * share + (begin == 0)
            powers = torch.softmax(scores[:, seen].double() * math.log(2), -1).float()
            lse[place, :rows] = torch.logsumexp(scores[:, seen].double() * math.log(2), -1) / math.log(2)
            part[place, :rows] = powers @ values[seen]
        if context and first == last:
            whole[sequence] = expected[sequence]
        taken += pages[sequence]
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    for parts, height, columns in ((2, 4, 512), (4, 2, 512), (16, 1, 128)):
        out = whole.clone()
        gluon_mla_shares.combine[(len(contexts) * -(-rows // height), 512 // columns)](
            part, lse, out, context, ends, len(contexts), rows,
            PADDED=16, PARTS=parts, ROWS=height, COLUMNS=columns,
        )  # fmt: skip
        close(out, expected, dtype)


def test_store_latent_skips_slot_minus_one(dtype):
    latent, rope = made(6, 5, dtype=dtype).detach(), made(6, 2, dtype=dtype, seed=1).detach()
    caches = [torch.zeros(3, 4, 7, dtype=dtype, device=DEVICE) for _ in range(2)]
    slot = torch.tensor([3, -1, 11, 0, -1, 7], device=DEVICE)
    for cache, impl in zip(caches, ("triton", "reference"), strict=True):
        ops.store_latent(cache, latent, rope, slot, impl=impl)
    assert torch.equal(*caches)


@pytest.mark.parametrize("block", [4, 100])
def test_latent_blocks_are_copied_to_where_they_belong_and_nowhere_else(dtype, block):
    source = made(3 * 7 * block * 43, dtype=dtype).detach().view(3, 7, block, 43)
    caches = [torch.full((3, 5, block, 43), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    came, went = torch.tensor([6, 0, 6], device=DEVICE), torch.tensor([1, 4, 3], device=DEVICE)
    with_gaps = [torch.cat([x, torch.full_like(x[:2], -1)])[[0, 3, 1, 2, 4]] for x in (came, went)]
    for cache, impl in zip(caches, ("triton", "reference"), strict=True):
        ops.copy_blocks(source, with_gaps[0], cache, with_gaps[1], impl=impl)
        assert torch.equal(cache[:, went], source[:, came])
        assert cache[:, [0, 2]].isnan().all()
    narrow = source.to(torch.float8_e4m3fn)
    target = torch.zeros_like(narrow)
    ops.copy_blocks(narrow, came, target, went, impl="triton")
    assert torch.equal(target.view(torch.uint8)[:, went], narrow.view(torch.uint8)[:, came])


def test_an_fp8_latent_cache_is_stored_within_range_and_widened_as_mla_decode_reads_it(dtype):
    rows, slots = made(40, 24, dtype=dtype).detach(), torch.arange(40, device=DEVICE)
    rows[3, 5], rows[4, 21] = 1000.0, -1000.0  # beyond what E4M3 holds
    caches = [torch.zeros(6, 8, 24, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    for cache, impl in zip(caches, ("triton", "reference"), strict=True):
        ops.store_latent(cache, rows[:, :20], rows[:, 20:], slots, impl=impl)
    if ON_GPU:  # the interpreter's conversion drops the carry into the exponent
        assert torch.equal(*(cache.float() for cache in caches))
    for cache in caches:
        assert (cache.float()[0, 3, 5], cache.float()[0, 4, 21]) == (448.0, -448.0)
    table = torch.arange(5, dtype=torch.int32, device=DEVICE).view(1, 5)
    q_latent, q_rope = made(1, 2, 3, 20, dtype=dtype).detach(), made(1, 2, 3, 4, dtype=dtype, seed=1).detach()
    context = torch.tensor([37], dtype=torch.int32, device=DEVICE)
    fast = ops.mla_decode(q_latent, q_rope, caches[0], table, context, scale=0.2, impl="triton")
    exact = ops.mla_decode(
        q_latent.double(), q_rope.double(), caches[0], table, context, scale=0.2, impl="reference"
    )
    close(fast, exact, dtype)


GROUPS = {"uneven": (9, 20, 1, 7, 23), "empty experts": (0, 20, 0, 40, 0), "one takes all": (0, 0, 60, 0, 0)}


def grouped_inputs(name, spare, dims, dtype):
    scale = 40 if ON_GPU else 1
    sizes = [size * scale for size in GROUPS[name]]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    width, out = dims
    return ends, [made(sum(sizes) + spare, width, dtype=dtype), made(5, out, width, dtype=dtype, seed=1)]


@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [(36, 40), (23, 9)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_linear(dtype, name, dims, spare):
    ends, inputs = grouped_inputs(name, spare, dims, dtype)
    compare(lambda x, w, impl: ops.grouped_linear(x, w, ends, impl=impl), inputs, dtype)


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [(64, 192), (256, 512), (1408, 320), (2048, 1408)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_linear_in_gluon(dtype, name, dims, spare):
    if dtype != torch.bfloat16:
        pytest.skip("the gradient of weights takes bfloat16")
    ends, inputs = grouped_inputs(name, spare, dims, dtype)
    compare(lambda x, w, impl: ops.grouped_linear(x, w, ends, impl=impl), inputs, dtype, impl="gluon")


@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_swiglu(dtype, name, spare):
    ends, inputs = grouped_inputs(name, spare, (36, 40), dtype)
    compare(lambda x, w, impl: ops.grouped_swiglu(x, w, ends, impl=impl), inputs, dtype, impl="two_ops")


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [(64, 128), (192, 384), (1408, 640), (2048, 2816)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 64, 63, 65, 127), (700, 1, 0, 2, 129, 193), (0, 0, 0)], ids=str)
def test_grouped_swiglu_in_gluon_has_the_bits_of_both_ops(dtype, sizes, dims, spare):
    if dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone")
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    x = made(sum(sizes) + spare, dims[0], dtype=dtype, seed=2).detach()
    x[sum(sizes) :] = torch.nan  # they belong to nobody
    weight = made(len(sizes), dims[1], dims[0], dtype=dtype, seed=1).detach()
    for operand in (x, torch.cat([x, x], dim=1)[:, dims[0] :]):  # rows side by side with others too
        found = ops.grouped_swiglu(operand, weight, ends, impl="gluon")
        assert torch.equal(found, ops.swiglu(ops.grouped_linear(x, weight, ends, impl="gluon")))


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("dims", [(64, 128), (1408, 640), (2048, 5632)], ids=str)
@pytest.mark.parametrize("rows", [1, 255, 700, 4096])
def test_linear_swiglu_has_the_bits_of_one_expert(dtype, rows, dims):
    if dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone")
    x, weight = made(rows, dims[0], dtype=dtype, seed=2).detach(), made(*dims[::-1], dtype=dtype).detach()
    ends = torch.full((1,), rows, device=DEVICE, dtype=torch.int32)
    found = ops.linear_swiglu(x, weight, impl="gluon")
    assert torch.equal(found, ops.grouped_swiglu(x, weight[None], ends, impl="gluon"))
    close(found, ops.linear_swiglu(x.double(), weight.double(), impl="reference"), dtype)


DOZENS = {
    "like experts": (24, 31, 17, 32, 30, 19, 27),
    "uneven": (31, 0, 1, 33, 200, 64, 0),
    "none": (0, 0, 0),
    "full": (64, 128, 96, 32),
}


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [(64, 128), (1408, 640), (2048, 2816), (1408, 2048)], ids=str)
@pytest.mark.parametrize("name", DOZENS)
def test_products_of_dozens_of_rows_an_expert(dtype, name, dims, spare):
    """With rows that belong to nobody NaN, rows beside others, in a graph, and the same bits each time."""
    if dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone")
    dozens, sizes = importlib.import_module("benthic.kernels.gluon_dozens"), DOZENS[name]
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    x = made(sum(sizes) + spare, dims[0], dtype=dtype, seed=2).detach()
    x[sum(sizes) :] = torch.nan
    weight = made(len(sizes), dims[1], dims[0], dtype=dtype, seed=1).detach()
    sums = dozens.multiply(x, weight, ends, gated=False)
    if sum(sizes):
        close(sums, ops.grouped_linear(x.double(), weight.double(), ends, impl="reference"), dtype)
    assert not sums[sum(sizes) :].any()
    found = dozens.multiply(torch.cat([x, x], dim=1)[:, dims[0] :], weight, ends, gated=True)
    assert torch.equal(found, ops.swiglu(sums, impl="triton"))
    if not len(x):
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [dozens.multiply(x, weight, ends, gated=gated) for gated in (False, True)]
    for _ in range(20):
        recorded[0].fill_(torch.nan), recorded[1].fill_(torch.nan)
        graph.replay()
        assert torch.equal(recorded[0], sums)
        assert torch.equal(recorded[1], found)
    assert torch.equal(ops.grouped_linear(x, weight, ends, impl="gluon_dozens"), sums)
    assert torch.equal(ops.grouped_swiglu(x, weight, ends, impl="gluon_dozens"), found)


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(1000, 3, 129, 0, 640, 128), (300, *[0] * 33), (0, 0, 5), (1,) * 200, (1 + 128 * 9,)],
    ids=["packs", "one of many", "empty ones first", "many short ones", "one"],
)
def test_every_tile_of_a_pack_is_listed_once(dtype, lengths, last_first):
    if dtype != DTYPES[0]:
        pytest.skip("lists have no dtype of their own")
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    tiles = [
        (sequence, tile)
        for sequence, length in enumerate(lengths)
        for tile in (range(math.ceil(length / 128))[:: -1 if last_first else 1])
    ]
    places = (sum(lengths) + 127 * len(lengths)) // 128
    assert places >= len(tiles)
    found = listed(starts, places, 128, last_first=last_first).tolist()
    assert len(found) >= places
    assert [tuple(each) for each in found[: len(tiles)]] == tiles
    assert all(each == [-1, 0] for each in found[len(tiles) :])


def test_a_grid_is_listed_where_most_of_its_programs_had_no_tile(dtype):
    def asked(lengths, heads=16):
        starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
        grid, (_, together, is_list) = grid_of(
            starts, sum(lengths), max(lengths), 128, heads, last_first=True, lists=TileLists()
        )
        return grid, together, is_list

    assert asked((4096,) * 4) == ((8, 32, 8), 8, False)
    assert asked((4096,) * 4, heads=4) == ((4, 32, 4), 4, False)
    assert asked((4096, *[0] * 33)) == ((8, 65, 2), 8, True)
    assert asked((2048, 100, 64), heads=32) == ((8, 20, 4), 8, True)
    assert asked((1,) * 5000)[2] is False, "the list would be longer than the grid"


def test_lists_of_other_bounds_places_and_orders_are_kept_apart(dtype):
    if dtype != DTYPES[0]:
        pytest.skip("lists have no dtype of their own")
    starts, others = (
        torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        for bounds in ([0, 2048, 2148, 2212], [0, 64, 164, 2212])
    )
    lists = TileLists()

    def asked(bounds, *, rows=2212, last_first=True, heads=16):
        return grid_of(bounds, rows, 2048, 128, heads, last_first=last_first, lists=lists)[1][0]

    first = asked(starts)
    assert asked(starts, heads=32) is first
    apart = asked(others), asked(starts, last_first=False), asked(starts, rows=2340)
    assert len({id(each) for each in (first, *apart)}) == 4
    assert first.tolist()[:3] == [[0, 15], [0, 14], [0, 13]]
    assert [each.tolist()[0] for each in apart] == [[0, 0], [0, 0], [0, 15]]


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize(
    "sizes",
    [(1, 0, 64, 63, 65, 127), (0, 0, 0), (700, 1, 0, 2, 129, 193), (128, 191, 192, 255, 256, 257, 320, 449)],
    ids=str,
)
@pytest.mark.parametrize("dims", [(128, 512), (192, 1408)], ids=str)
def test_products_of_few_rows_in_gluon_beside_nan(dtype, sizes, dims):
    if dtype != torch.bfloat16:
        pytest.skip("the gradient of weights takes bfloat16")
    ends, rows, (inner, outer) = (
        torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32),
        sum(sizes),
        dims,
    )
    weight = made(len(sizes), outer, inner, dtype=dtype, seed=1).detach()
    for run, width in ((ops.grouped_linear, inner), (ops.grouped_input_gradient, outer)):
        x = made(rows + 70, width, dtype=dtype, seed=2).detach()
        x[rows:] = torch.nan  # they belong to nobody
        found = run(x, weight, ends, impl="gluon")
        assert not found[rows:].any()
        if rows:
            close(found[:rows], run(x[:rows].double(), weight.double(), ends, impl="reference"), dtype)
        last = ends.tolist()[-2]  # the last expert's rows and weights are its own
        spoilt = weight.clone()
        spoilt[-1] = torch.nan
        assert torch.equal(run(x, spoilt, ends, impl="gluon")[:last], found[:last])
        for row in {0, rows // 2, rows - 1} if rows else ():  # a row has the bits that it has alone
            expert = int((ends <= row).sum())
            one = torch.ones(1, dtype=torch.int32, device=DEVICE)
            alone = run(x[row : row + 1], weight[expert : expert + 1], one, impl="gluon")
            assert torch.equal(alone[0], found[row])


@pytest.mark.skipif(ON_GPU, reason="of the interpreter")
def test_bfloat16_grouped_products_are_refused_in_the_interpreter(dtype):
    x, w = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="interpreter multiplies bfloat16 matrices wrongly"):
        ops.grouped_linear(x, w, torch.tensor([4], dtype=torch.int32), impl="triton")


def skip_gluon_experts(impl, dims, dtype):
    if impl == "gluon" and (not ON_GPU or dtype == torch.float32 or any(width % 8 for width in dims)):
        pytest.skip("Gluon needs a GPU, numbers of 16 bits, and rows of a multiple of 16 bytes")


EXPERT_DIMS = [(16, 24), (23, 9)] + ([(256, 512), (512, 1024), (128, 512), (1408, 200)] if ON_GPU else [])
"""Widths of rows and of their outputs. Of the last four, three are whole tiles in Gluon, two are turned."""


@pytest.mark.parametrize("impl", ["triton", "gluon"])
@pytest.mark.parametrize("dims", EXPERT_DIMS, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_weight_gradient_in_float32(dtype, name, dims, impl):
    skip_gluon_experts(impl, dims, dtype)
    ends, (x, _) = grouped_inputs(name, 35, dims, dtype)
    dy = made(len(x), dims[1], dtype=dtype, seed=2).detach()
    fast = ops.weight_gradient(dy, x.detach(), ends, dtype=torch.float32, impl=impl)
    exact = ops.weight_gradient(dy.double(), x.detach().double(), ends, impl="reference")
    assert fast.dtype == torch.float32
    close(fast, exact, torch.float32)


@pytest.mark.parametrize("impl", ["triton", "grouped_mm", "gluon"])
@pytest.mark.parametrize("dims", EXPERT_DIMS, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_weight_gradients_are_added_to_float32_sums(dtype, name, dims, impl):
    if impl == "grouped_mm" and (dtype != torch.bfloat16 or dims[0] % 8):
        pytest.skip("the library's grouped product takes bfloat16 in rows of whole 16 bytes")
    skip_gluon_experts(impl, dims, dtype)
    width, out = dims
    ends, (x, _) = grouped_inputs(name, 35, (width, out), dtype)
    dy = made(len(x), out, dtype=dtype, seed=2).detach()
    sums = [made(5, out, width, dtype=torch.float32, seed=3).detach() for _ in range(2)]
    ops.add_weight_gradient(sums[0], dy, x.detach(), ends, impl=impl)
    exact = sums[1].double()
    ops.add_weight_gradient(exact, dy.double(), x.detach().double(), ends, impl="reference")
    close(sums[0], exact, dtype if impl == "grouped_mm" else torch.float32)
    first = torch.full_like(sums[0], torch.nan)
    ops.add_weight_gradient(first, dy, x.detach(), ends, fresh=True, impl=impl)
    exact.fill_(torch.nan)
    ops.add_weight_gradient(exact, dy.double(), x.detach().double(), ends, fresh=True, impl="reference")
    close(first, exact, dtype if impl == "grouped_mm" else torch.float32)


@pytest.mark.parametrize("impl", ["triton", "grouped_mm", "gluon", "reference"])
@pytest.mark.parametrize("dims", EXPERT_DIMS, ids=str)
@pytest.mark.parametrize("name", [*GROUPS, "no rows"])
def test_squares_of_grouped_weight_gradients_are_those_of_what_is_written(dtype, name, dims, impl):
    if impl == "grouped_mm" and (dtype != torch.bfloat16 or dims[0] % 8):
        pytest.skip("the library's grouped product takes bfloat16 in rows of whole 16 bytes")
    skip_gluon_experts(impl, dims, dtype)
    ends, (x, _) = grouped_inputs("uneven" if name == "no rows" else name, 35, dims, dtype)
    ends = torch.zeros_like(ends) if name == "no rows" else ends
    dy = made(len(x), dims[1], dtype=dtype, seed=2).detach()
    plain, sums, again = (torch.full((5, dims[1], dims[0]), math.nan, device=x.device) for _ in range(3))
    assert ops.add_weight_gradient(plain, dy, x.detach(), ends, fresh=True, impl=impl) is None
    parts = ops.add_weight_gradient(sums, dy, x.detach(), ends, fresh=True, squares=True, impl=impl)
    twice = ops.add_weight_gradient(again, dy, x.detach(), ends, fresh=True, squares=True, impl=impl)
    assert torch.equal(sums, plain)
    assert torch.equal(parts, twice)
    torch.testing.assert_close(parts.double().sum(), sums.double().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dims", [(128, 512), (1408, 200), (512, 1024)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 64, 63, 65), (0, 0, 0, 0, 0), (700, 1, 0, 2, 129)], ids=str)
def test_weight_gradients_of_few_rows_in_gluon_beside_nan(dtype, sizes, dims):
    skip_gluon_experts("gluon", dims, dtype)
    inner, outer = dims
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    rows = sum(sizes)
    whole = [made(rows + 70, width, dtype=dtype, seed=width).detach() for width in dims]
    for x in whole:
        x[rows:] = torch.nan
    before = made(3, 5, outer, inner, dtype=torch.float32, seed=3).detach()
    sums, again = before.clone(), before.clone()
    for into in (sums, again):
        ops.add_weight_gradient(into[1], whole[1], whole[0], ends, impl="gluon")
    assert torch.equal(sums, again)
    assert torch.equal(sums[[0, 2]], before[[0, 2]])
    exact = ops.weight_gradient(whole[1].double(), whole[0].double(), ends, impl="reference")
    close(sums[1], before[1] + exact, torch.float32)
    written = ops.weight_gradient(whole[1], whole[0], ends, dtype=torch.float32, impl="gluon")
    close(written, exact, torch.float32)
    if rows:  # what one expert has that is not a number stays its own
        first = next(expert for expert, size in enumerate(sizes) if size)
        whole[0][ends[first] - 1] = torch.inf
        whole[1][0] = torch.nan
        into = before[1].clone()
        ops.add_weight_gradient(into, whole[1], whole[0], ends, impl="gluon")
        assert into[first].isnan().all()
        others = [expert for expert in range(5) if expert != first]
        assert torch.equal(into[others], sums[1][others])


@pytest.mark.skipif(not ON_GPU, reason="a product in two dtypes needs a GPU")
def test_added_weight_gradients_are_not_rounded_before(dtype):
    if dtype == torch.float32:
        pytest.skip("products of float32 are added by the definition")
    dy, x = made(1023, 72, dtype=dtype).detach(), made(1023, 136, dtype=dtype, seed=1).detach()
    whole = made(3, 72, 136, dtype=torch.float32, seed=2).detach()
    exact = whole[1].double()
    ops.add_weight_gradient(exact, dy.double(), x.double(), impl="reference")
    before = whole.clone()
    ops.add_weight_gradient(whole[1], dy, x, impl="addmm")
    close(whole[1], exact, torch.float32)
    assert torch.equal(whole[[0, 2]], before[[0, 2]])
    whole[1].fill_(torch.nan)
    ops.add_weight_gradient(whole[1], dy, x, fresh=True, impl="addmm")
    close(whole[1], exact - before[1].double(), torch.float32)
    assert torch.equal(whole[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("count", [1, 4097, 70_001])
def test_narrow_gradients_accumulate_in_float32(dtype, count):
    if dtype == torch.float32:
        dtype = torch.bfloat16
    x = made(count, dtype=dtype).detach()
    held = [made(count + 300, dtype=torch.float32, seed=1).detach() for _ in range(2)]
    for each, impl in zip(held, ("triton", "reference"), strict=True):
        ops.accumulate(each[100 : 100 + count], x, impl=impl)
    assert torch.equal(*held)
    for each, impl in zip(held, ("triton", "reference"), strict=True):
        each[100 : 100 + count] = torch.nan
        ops.accumulate(each[100 : 100 + count], x, fresh=True, impl=impl)
        assert torch.equal(each[100 : 100 + count], x.float())
    assert torch.equal(*held)


HEADS_OF_WORDS = [(300, 24), (1, 8)] + ([(163840, 512), (32777, 64)] if ON_GPU else [])


@pytest.mark.parametrize("wide_sum", [False, True])
@pytest.mark.parametrize("words", HEADS_OF_WORDS, ids=str)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_cross_entropy_sum_makes_the_gradients_of_its_definition(dtype, words, wide_sum, impl, on_device):
    vocabulary, width = words
    factor = torch.tensor(1 / 80, device=DEVICE) if on_device else 1 / 80
    target = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target[::7] = -100
    results = []
    for name, precision in ((impl, dtype), ("reference", torch.float64)):
        hidden = made(TOKENS, width, dtype=dtype).detach().to(precision).requires_grad_()
        # logits of deviation 2 at any width: rounding one of size z moves its share by z 2^-9
        weight = (made(vocabulary, width, dtype=dtype, seed=1).detach() * 2 * width**-0.5).to(precision)
        weight.requires_grad_()
        into = torch.zeros_like(weight, dtype=torch.promote_types(precision, torch.float32))
        loss, total = ops.linear_cross_entropy_sum(
            hidden,
            weight,
            target,
            factor=factor,
            chunk=40,
            into_VD=into if wide_sum else None,
            impl=name,
        )
        loss.backward()
        assert (weight.grad is None) == wide_sum
        results.append((loss, total, hidden.grad, into if wide_sum else weight.grad))
    for fast, exact in zip(*results, strict=True):
        close(fast.detach(), exact.detach(), dtype)


@pytest.mark.skipif(not ON_GPU, reason="the library's grouped product on a GPU")
@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_linear_through_the_library(dtype, name, spare):
    if dtype != torch.bfloat16:
        pytest.skip("the library's grouped product takes bfloat16")
    ends, inputs = grouped_inputs(name, spare, (256, 128), dtype)
    compare(
        lambda x, w, impl: ops.grouped_linear(x, w, ends, impl=impl), inputs, dtype, impl="grouped_mm_cuda"
    )


def routed(tokens, experts, top_k):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, experts, generator=generator)
    return scores.topk(top_k, dim=1).indices.to(torch.int32).to(DEVICE)


GATES = {
    "moonlight": (64, 6, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    "v3": (256, 8, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}),
    "v2": (160, 6, {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}),
    "v2 lite": (64, 6, {"topk_method": "greedy", "norm_topk_prob": False}),
    "k2": (384, 8, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    "odd": (10, 3, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 5, "topk_group": 2}),
    "groups of one": (6, 2, {"topk_method": "group_limited_greedy", "n_group": 6, "topk_group": 3}),
}
BALANCES = [(1, 7, 5, 2), (3, 40, 10, 3), (2, 1, 4, 4)]
if ON_GPU:
    BALANCES += [(4, 4096, 64, 6), (2, 1000, 256, 8), (1, 130, 384, 8)]
PLAIN_GATE = {
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


@pytest.mark.parametrize("name", GATES)
def test_route(dtype, name):
    experts, top_k, settings = GATES[name]
    logits = made(TOKENS if ON_GPU else 5, experts, dtype=torch.float32).detach()
    bias = made(experts, dtype=torch.float32, seed=1).detach() * 0.3
    for given in (bias, None):
        gate = PLAIN_GATE | settings | {"top_k": top_k}
        fast = ops.route(logits, given, impl="triton", **gate)
        exact = ops.route(logits.double(), given, impl="reference", **gate)
        assert torch.equal(fast.expert_TK, exact.expert_TK)
        close(fast.scores_TE, exact.scores_TE, torch.float32)
        close(fast.weight_TK, exact.weight_TK, torch.float32)


@pytest.mark.parametrize("given", ["both", "scores", "weights"])
@pytest.mark.parametrize("name", GATES)
def test_gradients_of_route(dtype, name, given):
    experts, top_k, settings = GATES[name]
    logits = made(TOKENS if ON_GPU else 5, experts, dtype=torch.float32)
    gate = PLAIN_GATE | settings | {"top_k": top_k}

    def outputs(logits, impl):
        routing = ops.route(logits, None, impl="triton_autograd" if impl == "triton" else impl, **gate)
        return {"scores": (routing.scores_TE,), "weights": (routing.weight_TK,)}.get(
            given, (routing.scores_TE, routing.weight_TK)
        )

    compare(outputs, [logits], torch.float32)


@pytest.mark.parametrize(("rows", "tokens", "experts", "top_k"), BALANCES)
def test_balance_loss(dtype, rows, tokens, experts, top_k):
    scores = made(rows * tokens, experts, dtype=torch.float32).detach().sigmoid().requires_grad_()
    settings = {"top_k": top_k, "rows": rows, "factor": 0.3}
    if top_k < experts:
        compare(lambda x, impl: ops.balance_loss(x, **settings, impl=impl)[0][None], [scores], torch.float32)
    else:
        # every f is 1 and the loss constant: what is left of the gradient is rounding of its two equal terms
        (slope,) = torch.autograd.grad(ops.balance_loss(scores, **settings, impl="triton")[0], scores)
        term = 0.3 / (tokens * scores.detach().sum(1, keepdim=True))
        assert (slope.abs() <= TOLERANCE[torch.float32] * term).all()
    fast, exact = (ops.balance_loss(scores, **settings, impl=impl)[1] for impl in ("triton", "reference"))
    assert not fast.requires_grad
    torch.testing.assert_close(fast, exact)


def test_balance_loss_of_a_sequence_that_ranks_share(dtype):
    scores = made(2 * 20, 10, dtype=torch.float32).detach().sigmoid().requires_grad_()
    other = torch.rand(2, 10, device=DEVICE)

    def shared(x, impl):
        loss, _ = ops.balance_loss(
            x, top_k=3, rows=2, mean=lambda f_SE: (f_SE + other.to(f_SE.dtype)) / 2, impl=impl
        )
        return loss[None]

    compare(shared, [scores], torch.float32)


@pytest.mark.parametrize("tokens", [1, TOKENS, 1366])
def test_rows_of_experts_are_added_to_what_was_counted(dtype, tokens):
    expert = routed(tokens, 7, 3)
    fast, exact = torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE)
    ops.count_experts(fast, expert, impl="triton")
    ops.count_experts(exact, expert, impl="reference")
    assert torch.equal(fast, exact)


@pytest.mark.parametrize("tokens", [1, TOKENS, 1366])
def test_copies_are_placed_as_a_stable_sort_would_place_them(dtype, tokens):
    """Of nine experts, four are here; some copies are nobody's. The choice is a part of a wider matrix."""
    packed = torch.cat((routed(tokens, 9, 3), routed(tokens, 9, 3)), dim=1)
    packed[: tokens // 3] = -1
    experts = packed[:, :3]
    here = int(((experts >= 3) & (experts < 7)).sum())
    fast, exact = (
        ops.place_copies(experts, first=3, experts=4, rows=here, impl=impl)
        for impl in ("triton", "reference")
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fast, exact, strict=True))


@pytest.mark.parametrize("tokens", [1, TOKENS, 1366])
@pytest.mark.parametrize("ranks", [1, 3])
def test_tokens_leave_sorted_by_rank(dtype, ranks, tokens):
    experts = routed(tokens, 4 * ranks, 3)
    goes, counts = ops.choose_ranks(experts, per_rank=4, ranks=ranks, impl="triton")
    exact = ops.choose_ranks(experts, per_rank=4, ranks=ranks, impl="reference")
    assert torch.equal(goes, exact[0])
    assert torch.equal(counts, exact[1])
    rows = int(counts[:, 0].sum())
    fast, slow = (ops.place_departures(goes, rows=rows, impl=impl) for impl in ("triton", "reference"))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fast, slow, strict=True))


@pytest.mark.parametrize("given", [True, False])
def test_slots_on_the_way_home(dtype, given):
    experts, slots = routed(TOKENS, 12, 3), TOKENS + 5
    dweight = made(3 * slots, 3, dtype=torch.float32).detach() if given else None
    fast, exact = (
        ops.home_slots(experts, dweight, per_rank=4, ranks=3, max_tokens=slots, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(fast[0], exact[0])
    assert fast[1] is None if not given else torch.equal(fast[1], exact[1])


def test_route_chooses_distinct_experts_whatever_the_logits(dtype):
    experts, top_k, settings = GATES["v3"]
    logits = torch.zeros(4, experts, device=DEVICE)
    logits[1], logits[2, 7], logits[3] = torch.nan, torch.nan, -torch.inf
    chosen = ops.route(logits, None, impl="triton", top_k=top_k, **(PLAIN_GATE | settings)).expert_TK.tolist()
    assert all(len(set(row)) == top_k and min(row) >= 0 and max(row) < experts for row in chosen)
    assert chosen[0] == list(range(top_k))  # of equals the first
    assert chosen[2][0] == 7


@pytest.mark.parametrize("tokens", [1, TOKENS, 1366])  # 4,098 copies are more than a block counts
def test_rows_are_counted_as_a_stable_sort_would_place_them(dtype, tokens):
    expert = routed(tokens, 7, 3)
    x = made(tokens, 4, dtype=dtype).detach()
    fast, exact = (ops.permute(x, expert, 9, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(fast.ends_E, exact.ends_E)
    assert torch.equal(fast.maps.row_TK, exact.maps.row_TK)
    assert torch.equal(fast.maps.copy_R, exact.maps.copy_R)
    assert torch.equal(fast.rows_RD, exact.rows_RD)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        *((0, 6, 8), (1, 6, 64), (1, 8, 256), (67, 3, 9), (67, 1, 9)),
        *([(64, 6, 64), (256, 8, 256), (257, 6, 64), (341, 6, 64), (2048, 1, 8)] if ON_GPU else []),
    ],
)
@pytest.mark.parametrize("spread", ["all", "some", "equal logits", "one"])
def test_few_copies_are_sorted_and_gathered_as_many_are(dtype, spread, tokens, top_k, experts):
    """Also where most experts have no rows, and where every token chooses the same ones."""
    x = made(tokens, 36, dtype=dtype).detach()
    if spread == "equal logits":
        logits = torch.zeros(tokens, experts, device=DEVICE)
        expert = ops.route(logits, None, **(PLAIN_GATE | GATES["k2"][2]), top_k=top_k).expert_TK
    elif spread == "one":  # a single expert owns all rows
        expert = torch.full((tokens, top_k), experts - 2, device=DEVICE).int()
    else:
        expert = routed(tokens, experts if spread == "all" else 8, top_k)
    few, many, exact = (
        ops.permute(x, expert, experts, impl=impl) for impl in ("few_copies", "triton", "reference")
    )
    for found in (few, many):
        assert torch.equal(found.rows_RD, exact.rows_RD)
        assert torch.equal(found.ends_E, exact.ends_E)
        assert torch.equal(found.maps.row_TK, exact.maps.row_TK)
        assert torch.equal(found.maps.copy_R, exact.maps.copy_R)


@pytest.mark.parametrize("impl", ["few_copies", "triton", "reference", None])
def test_rows_that_pad_a_batch_go_where_the_first_one_goes(dtype, impl):
    expert, x = routed(67, 8, 3), made(67, 36, dtype=dtype).detach()
    slot = torch.arange(67, device=DEVICE)
    slot[3::2] = -1  # as rows of drafts that a sequence has not
    followed = torch.where((slot < 0)[:, None], expert[:1], expert)
    found, exact = ops.permute(x, expert, 8, slot_T=slot, impl=impl), ops.permute(x, followed, 8)
    assert torch.equal(found.rows_RD, exact.rows_RD)
    assert torch.equal(found.ends_E, exact.ends_E)
    assert torch.equal(found.maps.row_TK, exact.maps.row_TK)
    assert torch.equal(found.maps.copy_R, exact.maps.copy_R)


def test_many_copies_are_refused_by_the_kernel_of_few(dtype):
    expert, x = routed(700, 8, 3), made(700, 4, dtype=dtype).detach()
    with pytest.raises(BackendError, match="made for few rows"):
        ops.permute(x, expert, 8, impl="few_copies")


@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [(36, 40), (23, 9)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_linear_of_few_rows(dtype, name, dims, spare):
    ends, (x, weight) = grouped_inputs(name, spare, dims, dtype)
    x, weight = x.detach(), weight.detach()
    if len(x) > 32 * len(weight):
        with pytest.raises(BackendError, match="made for few rows"):
            ops.grouped_linear(x, weight, ends, impl="few_rows")
        return
    exact = ops.grouped_linear(x.double(), weight.double(), ends, impl="reference")
    fast = ops.grouped_linear(x, weight, ends, impl="few_rows")
    close(fast, exact, dtype)
    assert not fast[int(ends[-1]) :].any()


GATED = [(36, 40), (23, 18), (136, 130), (16, 2)]


@pytest.mark.parametrize("spare", [0, 35])
@pytest.mark.parametrize("dims", [*GATED, *([(2048, 2816)] if ON_GPU else [])], ids=str)
@pytest.mark.parametrize("sizes", [(3, 0, 1, 17), (70, 0, 0, 5, 2), (0, 0, 1), (0, 0, 0)], ids=str)
def test_grouped_swiglu_of_few_rows_has_the_bits_of_both_ops(dtype, sizes, dims, spare):
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    for kind in dict.fromkeys((dtype, torch.float16)):
        x = made(sum(sizes) + spare, dims[0], dtype=kind, seed=2).detach()
        x[sum(sizes) :] = torch.nan  # they belong to nobody
        weight = made(len(sizes), dims[1], dims[0], dtype=kind, seed=1).detach()
        sums = ops.grouped_linear(x, weight, ends, impl="few_rows")
        exact = ops.swiglu(sums, impl="triton")
        beside = torch.cat([torch.full_like(x, torch.nan), x], dim=1)[:, dims[0] :]
        for operand in (x, beside):
            found = ops.grouped_swiglu(operand, weight, ends, impl="few_rows")
            assert found.dtype == kind
            assert torch.equal(found, exact)
        if sum(sizes):
            close(found, ops.swiglu(sums.double(), impl="reference"), kind)


def test_swiglu_with_more_rows_is_refused_by_the_product_of_few(dtype):
    x, weight = made(65, 36, dtype=dtype).detach(), made(2, 40, 36, dtype=dtype).detach()
    ends = torch.tensor([3, 65], device=DEVICE).int()
    with pytest.raises(BackendError, match="made for few rows"):
        ops.grouped_swiglu(x, weight, ends, impl="few_rows")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "sizes", [(0, 2, 0, 1, 0), (1, 0, 0, 0, 3), (0, 0, 0, 0, 2), (0, 0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("spare", [0, 1])
def test_experts_without_rows_have_no_programs_where_rows_are_fewer(dtype, spare, sizes, fp8):
    """A row gives the bits that it gives among many, where every expert has programs."""
    weight, rows = made(5, 72, 136, dtype=dtype, seed=1).detach(), sum(sizes) + spare
    if not rows:
        return
    x = made(rows + 8, 136, dtype=dtype).detach()
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    if fp8:
        blocks = ops.quantise_fp8_weight(weight.float(), impl="reference")
        few, many = (
            ops.fp8_linear(fp8_rows(part.float()), blocks, ends, dtype=dtype, impl="few_rows")
            for part in (x[:rows], x)
        )
    else:
        few, many = (ops.grouped_linear(part, weight, ends, impl="few_rows") for part in (x[:rows], x))
        close(few, ops.grouped_linear(x[:rows].double(), weight.double(), ends, impl="reference"), dtype)
        gated = [ops.grouped_swiglu(part, weight, ends, impl="few_rows") for part in (x[:rows], x)]
        assert torch.equal(gated[0], ops.swiglu(few, impl="triton"))
        assert torch.equal(gated[0], gated[1][:rows])
    assert torch.equal(few, many[:rows])
    assert not few[sum(sizes) :].any()


@pytest.mark.skipif(not ON_GPU, reason="about the order in which tensor cores add")
@pytest.mark.parametrize("op", [ops.grouped_linear, ops.grouped_swiglu], ids=lambda op: op.__name__)
def test_a_row_of_few_gives_the_same_bits_whoever_is_beside_it(dtype, op):
    weight = made(4, 320, 448, dtype=dtype, seed=1).detach()
    x = made(120, 448, dtype=dtype).detach()
    one = torch.tensor([1], device=DEVICE).int()
    alone = [op(row[None], weight[:1], one, impl="few_rows") for row in x[:5]]
    for rows in (5, 17, 30, 120):
        ends = torch.tensor([rows] * 4, device=DEVICE).int()
        found = op(x[:rows], weight, ends, impl="few_rows")
        assert torch.equal(found[:5], torch.cat(alone))


@pytest.mark.parametrize(("columns", "width"), [(40, 96), (9, 1500), (576, 1024), (2100, 16), (20, 4096)])
def test_linear_of_few_rows(dtype, columns, width):
    if ON_GPU and dtype == torch.float32:
        pytest.skip("registers hold weights of 16 bits")
    x, weight = made(8, width, dtype=dtype).detach(), made(columns, width, dtype=dtype, seed=1).detach()
    exact = torch.nn.functional.linear(x.double(), weight.double())
    for rows in (1, 3, 8):
        close(ops.linear(x[:rows], weight, impl="few_rows"), exact[:rows], dtype)
    beside_nan = torch.full((columns + 2, width + 8), torch.nan, dtype=dtype, device=DEVICE)
    beside_nan[1:-1, :width] = weight
    rows_beside_nan = torch.full((7, width + 8), torch.nan, dtype=dtype, device=DEVICE)
    rows_beside_nan[:5, :width] = x[:5]
    found = ops.linear(rows_beside_nan[:5, :width], beside_nan[1:-1, :width], impl="few_rows")
    assert torch.equal(found, ops.linear(x, weight, impl="few_rows")[:5])
    turned = ops.linear(x.t().contiguous().t(), weight.t().contiguous().t(), impl="few_rows")
    assert torch.equal(turned[:5], found)
    assert ops.linear(x[:0], weight, impl="few_rows").shape == (0, columns)


def test_gate_logits(dtype):
    x, weight = made(35, 96, dtype=dtype).detach(), made(10, 96, dtype=dtype, seed=1).detach()
    exact = torch.nn.functional.linear(x.double(), weight.double())
    close(ops.gate_logits(x, weight), exact, torch.float32)
    few = [ops.gate_logits(part, weight, impl="few_rows") for part in (x, x[:1], x[3:9])]
    close(few[0], exact, torch.float32)
    assert torch.equal(few[0][:1], few[1])  # a program holds one row or four
    assert torch.equal(few[0][3:9], few[2])


def test_gate_gradients(dtype):
    x, weight = made(70, 96, dtype=dtype).detach(), made(16, 96, dtype=dtype, seed=1).detach()
    sizes = torch.logspace(-6, 0, 70, device=DEVICE)[:, None]
    dlogits = made(70, 16, dtype=torch.float32, seed=2).detach() * sizes
    dx, dweight = ops.gate_gradients(dlogits, x, weight)
    assert (dx.dtype, dweight.dtype) == (dtype, dtype)
    close(dx, dlogits.double() @ weight.double(), dtype)
    close(dweight, dlogits.double().t() @ x.double(), dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_permute(dtype, width):
    expert = routed(TOKENS, 5, 3)

    def run(x, impl):
        permuted = ops.permute(x, expert, 6, impl=impl)
        assert permuted.ends_E.tolist()[-1] == TOKENS * 3
        return permuted.rows_RD

    compare(run, [made(TOKENS, width, dtype=dtype)], dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_unpermute(dtype, width):
    maps = ops.permute(made(TOKENS, 4, dtype=dtype), routed(TOKENS, 5, 3), 6, impl="reference").maps
    inputs = [made(TOKENS * 3, width, dtype=dtype), made(TOKENS, 3, dtype=torch.float32, seed=1)]
    compare(lambda rows, weight, impl: ops.unpermute(rows, maps, weight, impl=impl), inputs, dtype)


@pytest.mark.parametrize("count", [1, 2])
def test_rows_that_come_home_are_added_to_what_is_beside_them(dtype, count):
    maps = ops.permute(made(TOKENS, 4, dtype=dtype), routed(TOKENS, 5, 3), 6, impl="reference").maps
    inputs = [made(TOKENS * 3, 48, dtype=dtype), made(TOKENS, 3, dtype=torch.float32, seed=1)]
    inputs += [made(TOKENS, 48, dtype=dtype, seed=2 + index) for index in range(count)]

    def run(rows, weight, *beside, impl):
        return ops.unpermute(rows, maps, weight, beside, impl=impl)

    compare(run, inputs, dtype)
    rows, weight, *beside = (each.detach() for each in inputs)
    apart = ops.added(ops.unpermute(rows, maps, weight, impl="triton"), tuple(beside))
    assert torch.equal(run(rows, weight, *beside, impl="triton"), apart)


@pytest.mark.parametrize("width", [*WIDTHS, 48])
@pytest.mark.parametrize("count", [0, 1, 2])
@torch.no_grad()
def test_a_sum_that_is_normed_where_it_is_made_is_that_of_two_ops(dtype, count, width):
    maps = ops.permute(made(TOKENS, 4, dtype=dtype), routed(TOKENS, 5, 3), 6, impl="reference").maps
    rows, weight = made(TOKENS * 3, width, dtype=dtype), made(TOKENS, 3, dtype=torch.float32, seed=1)
    beside = tuple(made(TOKENS, width, dtype=dtype, seed=2 + index) for index in range(count))
    norm = made(width, dtype=dtype, seed=7)

    def run(impl, of=slice(None)):
        own = type(maps)(maps.row_TK[of], maps.copy_R)
        ops_of = rows, own, weight[of], tuple(each[of] for each in beside), norm, 1e-6
        return ops.unpermute_norm(*ops_of, impl=impl)

    normed, summed = run("triton")
    apart = ops.unpermute(rows, maps, weight, beside, impl="triton")
    assert torch.equal(summed, apart), "bits of the sum alone"
    double = [each.double() for each in (rows, weight, norm)]
    exact = ops.unpermute_norm(
        double[0], maps, double[1], tuple(each.double() for each in beside), double[2], 1e-6, impl="reference"
    )
    close(normed, ops.rms_norm(apart.double(), norm.double(), 1e-6, impl="reference"), dtype)
    close(summed, exact[1], dtype)
    for few, all_of in zip(run("triton", slice(5, 6)), (normed, summed), strict=True):
        assert torch.equal(few[0], all_of[5]), "whatever else is in the batch"


def absent(tokens, top_k):
    """Rows of copies of which some are elsewhere (-1); also how many rows there are, three of them unused."""
    here = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(3)) < 0.6
    here[:2] = False
    row = torch.where(here, here.flatten().cumsum(0).view(tokens, top_k) - 1, -1)
    return row.to(DEVICE), int(here.sum()) + 3


@pytest.mark.parametrize("width", WIDTHS)
def test_gather_copies_leaves_rows_past_the_end_alone(dtype, width):
    x, ends = made(TOKENS, width, dtype=dtype).detach(), torch.tensor([4, 20], dtype=torch.int32)
    copy = torch.randperm(TOKENS * 3, generator=torch.Generator().manual_seed(5))[:25]
    copy, ends = copy.to(DEVICE), ends.to(DEVICE)
    fast = ops.gather_copies(x, copy, ends, top_k=3, impl="triton")
    exact = ops.gather_copies(x, copy, ends, top_k=3, impl="reference")
    assert fast.shape == exact.shape == (25, width)
    assert torch.equal(fast[:20], x[copy[:20] // 3])
    assert torch.equal(exact[:20], fast[:20])
    assert fast[20:].isnan().all()  # never written


@pytest.mark.parametrize("width", [35, 256, 2048])
@pytest.mark.parametrize("by_column", [False, True])
def test_tiles_of_tokens_go_to_the_rows_of_their_copies(dtype, width, by_column):
    row, rows = absent(TOKENS, 3)
    x = made(TOKENS, width, dtype=dtype).detach()
    tiles = ops.Fp8(*ops.quantise_fp8_rows(x, by_column=by_column))
    fast, exact = (ops.spread_fp8(tiles, row, rows=rows, impl=i) for i in ("triton", "reference"))
    same_bits(*(ops.Fp8(*(part[:-3] for part in each)) for each in (fast, exact)))
    token, copy = (row >= 0).nonzero(as_tuple=True)
    assert torch.equal(fast.values.float()[row[token, copy]], tiles.values.float()[token])
    assert torch.equal(fast.scale[row[token, copy]], tiles.scale[token])
    assert fast.scale.stride() == (1, rows)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("few", [False, True])
def test_sum_copies_skips_absent_ones(dtype, width, few, monkeypatch):
    moves = importlib.import_module("benthic.kernels.triton_permute")
    monkeypatch.setattr(moves, "FEW_ROWS", 0 if few else TOKENS)
    row, rows = absent(TOKENS, 3)
    x, weight = made(rows, width, dtype=dtype).detach(), made(TOKENS, 3, dtype=torch.float32, seed=1).detach()
    x[-3:] = torch.nan
    for given in (weight, None):
        exact = ops.sum_copies(x.double(), row, given, impl="reference")
        close(ops.sum_copies(x, row, given, impl="triton"), exact, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_summed_copies(dtype, width):
    row, rows = absent(TOKENS, 3)
    x, weight = made(rows, width, dtype=dtype).detach(), made(TOKENS, 3, dtype=torch.float32, seed=1).detach()
    dout = made(TOKENS, width, dtype=dtype, seed=2).detach()
    fast = ops.sum_copies_backward(dout, x, row, weight, impl="triton")
    exact = ops.sum_copies_backward(dout.double(), x.double(), row, weight.double(), impl="reference")
    close(fast[0][:-3], exact[0][:-3], dtype)
    close(fast[1], exact[1], dtype)


def test_sum_copies_definition_is_the_derivative_of_its_sum(dtype):
    row, rows = absent(9, 3)
    x, weight = made(rows, 5, dtype=torch.float64), made(9, 3, dtype=torch.float64, seed=1)
    dout = made(9, 5, dtype=torch.float64, seed=2).detach()
    copies = torch.where(row >= 0, weight, 0.0).unsqueeze(-1) * x[row.clamp(min=0)]
    torch.testing.assert_close(
        ops.sum_copies(x.detach(), row, weight.detach(), impl="reference"), copies.sum(1)
    )
    derived = torch.autograd.grad(copies.sum(1), (x, weight), dout)
    ours = ops.sum_copies_backward(dout, x.detach(), row, weight.detach(), impl="reference")
    for mine, theirs in zip(ours, derived, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("quantise", [ops.quantise_fp8_rows, ops.quantise_fp8_blocks])
def test_fp8_tiles(dtype, quantise, power_of_two):
    x = made(150, 300, dtype=dtype).detach() * 3
    values, scale = quantise(x, power_of_two=power_of_two, impl="triton")
    exact, exact_scale = quantise(x, power_of_two=power_of_two, impl="reference")
    assert torch.equal(scale, exact_scale)
    differ = values.float() != exact.float()
    if ON_GPU:
        assert not differ.any()
    else:  # the interpreter's conversion drops the carry into the exponent and rounds some ties up
        differ &= exact.float().abs().frexp().mantissa != 0.5
        assert differ.float().mean() < 1e-3


def test_fp8_values_are_those_of_a_division(dtype):
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 448.0, 1 / 3, -5e-4, 6e4]], dtype=torch.float32).to(dtype)
    x = x.repeat(1, 16).to(DEVICE)
    if ON_GPU:  # the interpreter's conversion rounds some of these otherwise
        x = torch.cat((x, made(1, 2**16, dtype=dtype).detach() * 2.0**-9), dim=1)
    fast, exact = (ops.quantise_fp8_rows(x, impl=impl) for impl in ("triton", "reference"))
    same_bits(ops.Fp8(*fast), exact)


def test_fp8_dequantise(dtype):
    values, scale = ops.quantise_fp8_blocks(made(150, 300, dtype=torch.float32).detach(), impl="reference")
    results = [ops.dequantise_fp8(values, scale, dtype=dtype, impl=impl) for impl in ("triton", "reference")]
    assert torch.equal(*results)


def test_fp8_rows_come_back(dtype):
    values, scale = ops.quantise_fp8_rows(made(50, 300, dtype=torch.float32).detach(), impl="reference")
    results = [ops.dequantise_fp8_rows(values, scale, dtype=dtype, impl=i) for i in ("triton", "reference")]
    assert torch.equal(*results)
    wire = torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), dim=1)  # as rows travel
    parts = wire[:, :300].view(values.dtype), wire[:, 300:].view(torch.float32)
    assert not any(part.is_contiguous() for part in parts)
    assert torch.equal(ops.dequantise_fp8_rows(*parts, dtype=dtype, impl="triton"), results[1])


def fp8_rows(x):
    return ops.Fp8(*ops.quantise_fp8_rows(x, impl="reference"))


def same_tiles(fast, exact):
    """Equal scales, and values that differ only where the interpreter rounds differently."""
    assert torch.equal(fast.scale, exact.scale)
    differ = fast.values.float() != exact.values.float()
    if ON_GPU:
        assert not differ.any()
    else:
        differ &= exact.values.float().abs().frexp().mantissa != 0.5
        assert differ.float().mean() < 2e-3


@pytest.mark.parametrize(("name", "power_of_two"), [(None, True), *((name, False) for name in GROUPS)])
def test_fp8_columns(dtype, name, power_of_two):
    ends, (x, _) = grouped_inputs(name or "uneven", 35, (150, 8), dtype)
    ends, x = None if name is None else ends, x.detach() * 3
    options = {"power_of_two": power_of_two}
    fast, exact = (ops.quantise_fp8_columns(x, ends, **options, impl=i) for i in ("triton", "reference"))
    same_tiles(fast, exact)
    rows = fp8_rows(x)
    fast, exact = (ops.retile_fp8(rows, ends, **options, impl=i) for i in ("triton", "reference"))
    same_tiles(fast, exact)


@pytest.mark.parametrize("shape", [(4, 8), (3, 132, 260)] + ([(8, 1408, 2048)] if ON_GPU else []), ids=str)
def test_fp8_weights_are_turned_round(dtype, shape):
    weight = made(*shape, dtype=dtype).detach()
    tiles = ops.quantise_fp8_weight(weight)
    same_bits(
        ops.turn_fp8(tiles, impl="triton"), ops.quantise_fp8_weight(weight.transpose(-1, -2).contiguous())
    )


@triton.jit
def _scaled(x_ptr, scale_ptr, out_ptr, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out_ptr + at, scaled(tl.load(x_ptr + at), tl.load(scale_ptr + at)))


def test_a_quotient_of_three_products_is_that_of_a_division(dtype):
    """Quotients of small numbers, many of them borders of two E4M3 values, and of any."""
    largest = torch.arange(128, 256, dtype=torch.float32, device=DEVICE)[:, None]
    x = torch.cat((torch.arange(256, device=DEVICE) % largest, -made(128, 256, dtype=torch.float32)), dim=1)
    x, scale = x.detach(), (largest / largest.new_full((), 448.0)).expand(-1, 512).contiguous()
    x[:, :2] = x.new_tensor([0.0, -0.0])
    found = torch.empty_like(x)
    for row in range(0, 128, 8):
        _scaled[(1,)](x[row : row + 8], scale[row : row + 8], found[row : row + 8], size=4096)
    assert torch.equal(found.view(torch.int32), (x / scale).view(torch.int32))


def same_bits(fused, apart):
    values, scale = apart
    assert torch.equal(fused.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(fused.scale, scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("columns", [256, 2048] if ON_GPU else [150, 256])
@pytest.mark.parametrize("name", [None, *GROUPS])
def test_fp8_rows_and_columns_at_once(dtype, name, columns, power_of_two):
    ends, (x, _) = grouped_inputs(name or "uneven", 35, (columns, 8), dtype)
    ends, x = None if name is None else ends, x.detach() * 3
    options = {"power_of_two": power_of_two}
    rows, columns = ops.quantise_fp8_both(x, ends, **options, impl="triton")
    same_bits(rows, ops.quantise_fp8_rows(x, **options, impl="triton"))
    same_bits(columns, ops.quantise_fp8_columns(x, ends, **options, impl="triton"))
    exact = ops.quantise_fp8_both(x, ends, **options, impl="reference")
    same_tiles(rows, exact[0])
    same_tiles(columns, exact[1])


@pytest.mark.parametrize("rows", [1, 127, 129, 257])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("width", [128] if ON_GPU else [40, 128])
def test_fp8_rows_of_nobody_have_row_tiles_and_no_column_tiles(dtype, rows, experts, width):
    x, ends = made(rows, width, dtype=dtype).detach(), torch.ones(experts, dtype=torch.int32, device=DEVICE)
    by_row, by_column = ops.quantise_fp8_both(x, ends, impl="triton")
    same_bits(by_row, ops.quantise_fp8_rows(x, impl="triton"))
    same_bits(by_column, ops.quantise_fp8_columns(x, ends, impl="triton"))
    assert not by_column.values.float()[:, 1:].any()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_to_fp8(dtype, width, power_of_two):
    gate_up = made(TOKENS, 2 * width + 3, dtype=dtype).detach()[:, : 2 * width] * 3
    fused = ops.swiglu_fp8(gate_up, power_of_two=power_of_two, impl="triton")
    wide = ops.swiglu(gate_up, impl="triton")
    same_bits(fused, ops.quantise_fp8_rows(wide, power_of_two=power_of_two, impl="triton"))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_of_swiglu_alone_has_the_bits_of_autograds(dtype, width):
    gate_up = made(TOKENS, 2 * width, dtype=dtype)
    dy = made(TOKENS, width, dtype=dtype, seed=1).detach()
    (exact,) = torch.autograd.grad(ops.swiglu(gate_up, impl="triton"), gate_up, dy)
    assert torch.equal(ops.swiglu_gradient(gate_up.detach(), dy, impl="triton"), exact)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", [None, *GROUPS])
@pytest.mark.parametrize("impl", ["two_ops", "gluon"])
def test_the_gradient_of_swiglu_to_fp8_both_ways(dtype, impl, name, power_of_two):
    skip_gluon(impl)
    if impl == "gluon" and dtype == torch.float32:
        pytest.skip("squares come in 16 bits")
    ends, (x, _) = grouped_inputs(name or "uneven", 35, (256, 8), dtype)
    ends, gate_up = None if name is None else ends, (x.detach() * 3)
    gate_up[:3, :4] = gate_up.new_tensor([-100.0, 100.0, -87.0, 0.0])
    dy = made(len(x), 128, dtype=dtype, seed=1).detach()
    options = {"power_of_two": power_of_two}
    wide = ops.swiglu_gradient(gate_up, dy)
    rows, columns = ops.swiglu_gradient_fp8_both(gate_up, dy, ends, **options, impl=impl)
    same_bits(rows, ops.quantise_fp8_rows(wide, **options))
    same_bits(columns, ops.quantise_fp8_columns(wide, ends, **options))


def weights_of(rows):
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(5)) * 2 - 0.5
    weight[min(3, rows - 1)] = 0.0
    return weight.to(DEVICE)


@pytest.mark.parametrize("width", [*WIDTHS, 1408, 2816] if ON_GPU else [*WIDTHS, 2100])
def test_the_gradient_of_weighted_rows_of_swiglu(dtype, width):
    tokens = TOKENS if width < 2049 or ON_GPU else 3
    gate_up = made(tokens, 2 * width + 3, dtype=dtype).detach()[:, : 2 * width]
    dy, weight = made(tokens, width, dtype=dtype, seed=1).detach(), weights_of(tokens)
    fast, dweight = ops.weighted_swiglu_gradient(gate_up, dy, weight, impl="triton")
    wide = [x.double() for x in (gate_up, dy, weight)]
    exact, exact_weight = ops.weighted_swiglu_gradient(*wide, impl="reference")
    close(fast, exact, dtype)
    close(dweight, exact_weight, torch.float32)
    ones, again = ops.weighted_swiglu_gradient(gate_up, dy, torch.ones_like(weight), impl="triton")
    assert torch.equal(ones, ops.swiglu_gradient(gate_up, dy, impl="triton"))
    assert torch.equal(again, dweight)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", [None, *GROUPS])
@pytest.mark.parametrize("impl", ["two_ops", "gluon"])
def test_the_gradient_of_weighted_rows_of_swiglu_to_fp8_both_ways(dtype, impl, name, power_of_two):
    skip_gluon(impl)
    if impl == "gluon" and dtype == torch.float32:
        pytest.skip("squares come in 16 bits")
    ends, (x, _) = grouped_inputs(name or "uneven", 35, (512, 8), dtype)
    ends, gate_up = None if name is None else ends, (x.detach() * 3)
    gate_up[:3, :4] = gate_up.new_tensor([-100.0, 100.0, -87.0, 0.0])
    dy, weight = made(len(x), 256, dtype=dtype, seed=1).detach(), weights_of(len(x))
    options = {"power_of_two": power_of_two}
    wide, _ = ops.weighted_swiglu_gradient(gate_up, dy, weight)
    operands = [t.double() for t in (gate_up, dy, weight)]
    _, exact = ops.weighted_swiglu_gradient(*operands, impl="reference")
    rows, columns, dweight = ops.weighted_swiglu_gradient_fp8_both(
        gate_up, dy, weight, ends, **options, impl=impl
    )
    same_bits(rows, ops.quantise_fp8_rows(wide, **options))
    same_bits(columns, ops.quantise_fp8_columns(wide, ends, **options))
    close(dweight, exact, torch.float32)


# narrower rows are padded to a tile, which the plain norm does not do: its sums have another order
@pytest.mark.parametrize("width", [100, 300] + ([512, 2048, 7168] if ON_GPU else []))
@pytest.mark.parametrize("power_of_two", [False, True])
def test_norms_to_fp8(dtype, width, power_of_two):
    x, residual = (made(TOKENS, width + 16, dtype=dtype, seed=s).detach()[:, :width] for s in (0, 1))
    weight, options = made(width, dtype=dtype, seed=2).detach(), {"power_of_two": power_of_two}
    fused = ops.rms_norm_fp8(x, weight, 1e-6, **options, impl="triton")
    wide = ops.rms_norm(x, weight, 1e-6, impl="triton")
    same_bits(fused, ops.quantise_fp8_rows(wide, **options, impl="triton"))
    fused, total = ops.add_rms_norm_fp8(x, residual, weight, 1e-6, **options, impl="triton")
    wide, exact = ops.add_rms_norm(x, residual, weight, 1e-6, impl="triton")
    assert torch.equal(total, exact)
    same_bits(fused, ops.quantise_fp8_rows(wide, **options, impl="triton"))


def test_a_norm_to_fp8_of_rows_narrower_than_a_tile(dtype):
    x, weight = made(TOKENS, 44, dtype=dtype).detach(), made(44, dtype=dtype, seed=1).detach()
    values, scale = ops.rms_norm_fp8(x, weight, 1e-6, impl="triton")
    exact = ops.rms_norm(x.double(), weight.double(), 1e-6, impl="reference")
    found = ops.dequantise_fp8_rows(values, scale, dtype=torch.float32, impl="reference")
    assert (found - exact).norm() < 0.06 * exact.norm()  # E4M3, and the interpreter drops carries


@pytest.mark.parametrize("shape", [(150, 300), (3, 128, 150), (3, 150, 44)], ids=str)
def test_fp8_weights(dtype, shape):
    weight = made(*shape, dtype=dtype).detach()
    fast, exact = (ops.quantise_fp8_weight(weight, impl=impl) for impl in ("triton", "reference"))
    same_tiles(fast, exact)


FP8_DIMS = [(300, 150), (128, 48)] + ([(2048, 1408), (7168, 2048)] if ON_GPU else [])


def skip_gluon(impl, *widths, dtype=None):
    if "gluon" in impl and (not ON_GPU or any(width % 16 for width in widths)):
        pytest.skip("Gluon needs a GPU, and rows of a multiple of 16 bytes")
    if impl == "gluon_three" and dtype == torch.float32:
        pytest.skip("results that leave by TMA are in 16 bits")


@pytest.mark.parametrize("impl", ["triton", "cublas", "gluon", "gluon_three"])
@pytest.mark.parametrize("dims", [*FP8_DIMS, (304, 144)], ids=str)
def test_fp8_linear(dtype, dims, impl):
    inner, outer = dims
    skip_gluon(impl, *dims, dtype=dtype)
    if impl == "cublas" and (not ON_GPU or inner % 128 or dtype == torch.float16):
        pytest.skip("cuBLAS needs a GPU, whole tiles, and a result in bfloat16 or float32")
    x, weight = made(TOKENS, inner, dtype=torch.float32), made(outer, inner, dtype=torch.float32, seed=1)
    rows, blocks = fp8_rows(x.detach()), ops.quantise_fp8_weight(weight.detach(), impl="reference")
    fast = ops.fp8_linear(rows, blocks, dtype=dtype, impl=impl)
    close_fp8(fast, ops.fp8_linear(rows, blocks, dtype=torch.float32, impl="reference").double(), dtype)
    dy = fp8_rows(made(TOKENS, outer, dtype=torch.float32, seed=2).detach())
    if outer % 128 == 0 or impl != "cublas":
        fast = ops.fp8_linear(dy, blocks.transposed(), dtype=dtype, impl=impl)
        exact = ops.fp8_linear(dy, blocks.transposed(), dtype=torch.float32, impl="reference")
        close_fp8(fast, exact.double(), dtype)


@pytest.mark.skipif(not ON_GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 100, 128])
@pytest.mark.parametrize("dims", [(304, 144), (7168, 2112), (512, 32768), (7168, 4096)], ids=str)
def test_fp8_linear_in_shares(dtype, rows, dims):
    """Every tile cut and none, tiles of 64 and of 128 rows, with the same bits each time and in a graph."""
    if dtype == torch.float32:
        pytest.skip("results leave in 16 bits")
    inner, outer = dims
    x, weight = made(rows, inner, dtype=torch.float32), made(outer, inner, dtype=torch.float32, seed=1)
    x, blocks = fp8_rows(x.detach()), ops.quantise_fp8_weight(weight.detach(), impl="reference")
    fast = ops.fp8_linear(x, blocks, dtype=dtype, impl="gluon_split")
    close_fp8(fast, ops.fp8_linear(x, blocks, dtype=torch.float32, impl="reference").double(), dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = ops.fp8_linear(x, blocks, dtype=dtype, impl="gluon_split")
    for _ in range(20):
        graph.replay()
        assert torch.equal(recorded, fast)
        assert torch.equal(ops.fp8_linear(x, blocks, dtype=dtype, impl="gluon_split"), fast)
    dy = fp8_rows(made(rows, outer, dtype=torch.float32, seed=2).detach())
    fast = ops.fp8_linear(dy, blocks.transposed(), dtype=dtype, impl="gluon_split")
    exact = ops.fp8_linear(dy, blocks.transposed(), dtype=torch.float32, impl="reference")
    close_fp8(fast, exact.double(), dtype)


@pytest.mark.parametrize("name", [None, *GROUPS])
@pytest.mark.parametrize("dims", FP8_DIMS, ids=str)
def test_fp8_linear_of_few_rows(dtype, dims, name):
    inner, outer = dims
    experts = 1 if name is None else 5
    x, weight = (
        made(16 * experts, inner, dtype=torch.float32),
        made(experts, outer, inner, dtype=torch.float32),
    )
    ends = torch.tensor(GROUPS[name or "uneven"], device=DEVICE).cumsum(0).to(torch.int32)
    rows, blocks = fp8_rows(x.detach()), ops.quantise_fp8_weight(weight.detach(), impl="reference")
    if name is None:
        ends, blocks = None, ops.Fp8(blocks.values[0], blocks.scale[0])
    fast = ops.fp8_linear(rows, blocks, ends, dtype=dtype, impl="few_rows")
    close_fp8(fast, ops.fp8_linear(rows, blocks, ends, dtype=torch.float32, impl="reference").double(), dtype)


@pytest.mark.parametrize("impl", ["triton", "cublas", "gluon_three"])
@pytest.mark.parametrize("dims", FP8_DIMS, ids=str)
def test_fp8_weight_gradient(dtype, dims, impl):
    skip_gluon(impl, *dims)
    if impl == "cublas" and (not ON_GPU or any(d % 16 for d in dims) or dtype == torch.float16):
        pytest.skip("cuBLAS needs a GPU, widths of a multiple of 16, and a result in bfloat16 or float32")
    tiles = [
        ops.quantise_fp8_columns(made(TOKENS, d, dtype=torch.float32, seed=d).detach(), impl="reference")
        for d in dims
    ]
    fast = ops.fp8_weight_gradient(*tiles, dtype=dtype, impl=impl)
    close_fp8(fast, ops.fp8_weight_gradient(*tiles, impl="reference").double(), dtype)


@pytest.mark.parametrize(
    ("impl", "dims"), [("triton", (300, 150)), ("gluon", (304, 400)), ("gluon_three", (304, 400))]
)
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_fp8_products(dtype, name, impl, dims):
    skip_gluon(impl, dtype=dtype)
    ends, (x, weight) = grouped_inputs(name, 35, dims, torch.float32)
    rows, blocks = fp8_rows(x.detach()), ops.quantise_fp8_weight(weight.detach(), impl="reference")
    fast = ops.fp8_linear(rows, blocks, ends, dtype=dtype, impl=impl)
    close_fp8(fast, ops.fp8_linear(rows, blocks, ends, dtype=torch.float32, impl="reference").double(), dtype)
    dy = made(len(x), dims[1], dtype=torch.float32, seed=2).detach()
    tiles = [ops.quantise_fp8_columns(t, ends, impl="reference") for t in (dy, x.detach())]
    fast = ops.fp8_weight_gradient(*tiles, ends, dtype=dtype, impl={"gluon": "gluon_three"}.get(impl, impl))
    close_fp8(fast, ops.fp8_weight_gradient(*tiles, ends, impl="reference").double(), dtype)


@pytest.mark.parametrize("impl", ["triton", "cublas", "gluon_three"])
@pytest.mark.parametrize("dims", FP8_DIMS, ids=str)
def test_fp8_weight_gradients_are_added_to_float32_sums(dtype, dims, impl):
    skip_gluon(impl, *dims)
    if impl == "cublas" and (not ON_GPU or any(d % 16 for d in dims)):
        pytest.skip("cuBLAS needs a GPU and widths of a multiple of 16")
    tiles = [ops.quantise_fp8_columns(made(TOKENS, d, dtype=dtype, seed=d).detach()) for d in dims]
    whole = made(3, *dims, dtype=torch.float32, seed=3).detach()
    before = whole.clone()
    ops.add_fp8_weight_gradient(whole[1], *tiles, impl=impl)
    gradient = ops.fp8_weight_gradient(*tiles, impl=impl)
    assert torch.equal(whole[1], before[1] + gradient)
    whole[1].fill_(torch.nan)
    ops.add_fp8_weight_gradient(whole[1], *tiles, fresh=True, impl=impl)
    assert torch.equal(whole[1], gradient)
    same_squares(whole[1], tiles, None, impl=impl)
    assert torch.equal(whole[::2], before[::2])


def same_squares(into, tiles, ends, *, impl):
    """Parts of the sum of squares of what is written, the same ones every time."""
    gradient = into.clone()
    into.fill_(torch.nan)
    parts = ops.add_fp8_weight_gradient(into, *tiles, ends, fresh=True, squares=True, impl=impl)
    assert torch.equal(into, gradient)
    assert torch.equal(
        parts, ops.add_fp8_weight_gradient(into, *tiles, ends, fresh=True, squares=True, impl=impl)
    )
    torch.testing.assert_close(parts.double().sum(), gradient.double().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("impl", "dims"), [("triton", (150, 44)), ("gluon_three", (304, 400))])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_fp8_weight_gradients_are_added_to_float32_sums(dtype, name, impl, dims):
    skip_gluon(impl)
    inner, outer = dims
    ends, (x, _) = grouped_inputs(name, 35, (inner, 8), dtype)
    dy = made(len(x), outer, dtype=dtype, seed=2).detach()
    tiles = [ops.quantise_fp8_columns(t, ends) for t in (dy, x.detach())]
    into = made(5, outer, inner, dtype=torch.float32, seed=3).detach()
    gradient = ops.fp8_weight_gradient(*tiles, ends, impl=impl)
    exact = into + gradient
    ops.add_fp8_weight_gradient(into, *tiles, ends, impl=impl)
    assert torch.equal(into, exact)
    into.fill_(torch.nan)
    ops.add_fp8_weight_gradient(into, *tiles, ends, fresh=True, impl=impl)
    assert torch.equal(into, gradient)
    same_squares(into, tiles, ends, impl=impl)


@pytest.mark.parametrize("width", [1, 7, 128, 300, 304] + ([2048, 16384] if ON_GPU else []))
def test_e5m6_tiles(dtype, width):
    """Bit for bit, over scales from the smallest to beyond float16, with zeros of both signs."""
    x = made(TOKENS, width, dtype=torch.float32).detach()
    x = (x * torch.logspace(-6, 4, TOKENS, device=DEVICE)[:, None]).to(dtype)
    x[3], x[4, ::2] = 0.0, -0.0
    fast, exact = (ops.quantise_e5m6(x, impl=impl) for impl in ("triton", "reference"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fast, exact, strict=True))
    back = [ops.dequantise_e5m6(*exact, width, dtype=dtype, impl=impl) for impl in ("triton", "reference")]
    assert torch.equal(*back)
    assert torch.equal(*(rows.signbit() for rows in back))


def test_e5m6_has_the_same_value_for_every_code(dtype):
    code = torch.arange(4096, dtype=torch.int32, device=DEVICE).view(32, 128)
    pair = code[:, 0::2] | (code[:, 1::2] << 12)
    packed = torch.stack((pair & 0xFF, (pair >> 8) & 0xFF, pair >> 16), dim=2).to(torch.uint8).flatten(1)
    scale = torch.full((32, 1), 0.25, device=DEVICE)
    fast, exact = (
        ops.dequantise_e5m6(packed, scale, 128, dtype=dtype, impl=impl) for impl in ("triton", "reference")
    )
    finite = (code & 0x7FF) <= 1983
    assert torch.equal(fast[finite], exact[finite])


@pytest.mark.parametrize("count", [1, 2049, 70_001])
def test_adamw(dtype, count):
    """`dtype` is that of moments and weight. Three updates: the second starts from rounded moments."""
    results, running = [], torch.full((count,), torch.nan, device=DEVICE, dtype=dtype)
    for impl, precision in (("triton", torch.float32), ("reference", torch.float64)):
        master = made(count, dtype=precision, seed=1).detach()
        moments = [torch.zeros(count, device=DEVICE, dtype=dtype) for _ in range(2)]
        for step in (1, 2, 3):
            gradient = 0.1 * made(count, dtype=precision, seed=step).detach()
            by = ops.AdamWStep(0.9, 0.999, 1e-8, 1e-3 / (1 - 0.9**step), 1e-4, 1 - 0.999**step, scale=0.7)
            ops.adamw(master, gradient, *moments, by, running=running, impl=impl)
        results.append((master, *moments, running.clone()))
    (master, *fast), (exact, *slow) = results
    assert torch.equal(fast[2], master.to(dtype))
    close(master, exact, torch.float32 if dtype == torch.float32 else torch.float16)
    for ours, theirs in zip(fast, slow, strict=True):
        close(ours, theirs.double(), dtype)


def test_adamw_leaves_what_lies_behind_its_operands(dtype):
    held = [torch.full((300,), 3.0, device=DEVICE, dtype=d) for d in (torch.float32,) * 2 + (dtype,) * 3]
    by = ops.AdamWStep(0.9, 0.95, 1e-8, step_size=0.1, decay=0.0, correction=0.05)
    *operands, running = (t[1:257] for t in held)
    ops.adamw(*operands, by, running=running, impl="triton")
    assert all((t[:1] == 3.0).all() and (t[257:] == 3.0).all() for t in held)
    assert (held[0][1:257] != 3.0).all()


def halves(master):
    """A bfloat16 weight and an int16 remainder."""
    found = tuple(torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    ops.split_master(master, *found)
    return found


@pytest.mark.parametrize("count", [1, 2049, 70_001])
def test_adamw_of_split_masters_is_adamw_of_whole_ones_bit_for_bit(dtype, count):
    """`dtype` is that of moments. A weight is infinite where its master is above the greatest bfloat16."""
    master = made(count, dtype=torch.float32, seed=1).detach()
    master[7::11], master[8::11] = 3.4e38, 0.0
    weight, remainder = halves(master)
    whole, split = ([torch.zeros(count, device=DEVICE, dtype=dtype) for _ in range(2)] for _ in range(2))
    for step in (1, 2, 3):
        gradient = 0.1 * made(count, dtype=torch.float32, seed=step).detach()
        by = ops.AdamWStep(0.9, 0.999, 1e-8, 1e-3 / (1 - 0.9**step), 1e-8, 1 - 0.999**step, scale=0.7)
        ops.adamw(master, gradient, *whole, by, impl="triton")
        ops.adamw_split(weight, remainder, gradient, *split, by, impl="triton")
        assert torch.equal(ops.join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
        assert all(torch.equal(*pair) for pair in zip((weight, remainder), halves(master), strict=True))
        assert all(torch.equal(*pair) for pair in zip(split, whole, strict=True))
    assert weight[7::11].isinf().all()


def test_adamw_of_split_masters_keeps_nan_and_what_lies_behind_its_operands(dtype):
    held = [*halves(torch.full((300,), 3.001, device=DEVICE)), torch.full((300,), 3.0, device=DEVICE)]
    held += [torch.full((300,), 3.0, device=DEVICE, dtype=dtype) for _ in range(2)]
    before = [t.clone() for t in held]
    held[2][5] = torch.nan
    by = ops.AdamWStep(0.9, 0.95, 1e-8, step_size=0.1, decay=0.0, correction=0.05)
    ops.adamw_split(*(t[1:257] for t in held), by, impl="triton")
    for now, then in zip(held, before, strict=True):
        assert torch.equal(now[:1], then[:1])
        assert torch.equal(now[257:], then[257:])
    for master in (held[0], ops.join_master(*held[:2])):
        assert master.isnan().nonzero().tolist() == [[5]]
        assert (master[1:257] != master[0]).all()


def updated(shape, dtype, *, impl, **options):
    """Masters, moments and copy after two updates."""
    master = made(*shape, dtype=torch.float32, seed=1).detach()
    moments = [torch.zeros(shape, device=DEVICE, dtype=dtype) for _ in range(2)]
    copy = ops.quantise_fp8_weight(master, impl="reference")
    for step in (1, 2):
        gradient = 0.1 * made(*shape, dtype=torch.float32, seed=step).detach()
        by = ops.AdamWStep(0.9, 0.999, 1e-8, 1e-2 / (1 - 0.9**step), 1e-4, 1 - 0.999**step, scale=0.7)
        if options:
            ops.adamw_fp8(master, gradient, *moments, by, copy, impl=impl, **options)
        else:
            ops.adamw(master, gradient, *moments, by, impl=impl)
    return master, moments, copy


WEIGHTS = [(150, 300), (3, 128, 150), (3, 150, 44)] + ([(8, 1408, 2048)] if ON_GPU else [])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_adamw_that_quantises_is_adamw_and_quantising(dtype, shape, power_of_two):
    master, moments, copy = updated(shape, dtype, impl="triton", power_of_two=power_of_two)
    exact, apart, _ = updated(shape, dtype, impl="triton")
    assert torch.equal(master, exact)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moments, apart, strict=True))
    same_bits(copy, ops.quantise_fp8_weight(master, power_of_two=power_of_two, impl="triton"))


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_adamw_rounds_a_copy_at_random_as_it_is_defined_to(dtype, shape):
    master, _, copy = updated(shape, dtype, impl="triton", seed=-7)
    still = ops.AdamWStep(0.9, 0.999, 1e-8, step_size=0.0, decay=0.0, correction=1.0)
    same = master.clone(), *(torch.zeros(shape, device=DEVICE) for _ in range(3))
    exact = ops.quantise_fp8_weight(master, impl="reference")
    ops.adamw_fp8(*same, still, exact, seed=-7, impl="reference")
    assert torch.equal(same[0], master)
    same_bits(copy, exact)


ROWS, VOCAB = (70, 163_840) if ON_GPU else (3, 700)


@pytest.fixture
def _small_pieces(monkeypatch):
    """The interpreter takes its time for every piece and digit: two pieces, and digits of bfloat16."""
    if not ON_GPU:
        sample = importlib.import_module("benthic.kernels.triton_sample")
        monkeypatch.setattr(sample, "PIECE", 512)
        monkeypatch.setattr(sample, "STRETCH", 256)
        monkeypatch.setitem(sample.SPARE_BITS, torch.float32, 16)
        monkeypatch.setattr(importlib.import_module("benthic.kernels.triton_best"), "PIECE", 256)


def logits_of(rows, scale, *, dtype, seed=0):
    """Logits with a gap behind every row; those of the interpreter as bfloat16 has them."""
    logits = scale * made(rows, VOCAB + 3, dtype=dtype, seed=seed).detach()
    return (logits if ON_GPU else logits.bfloat16().to(dtype))[:, :VOCAB]


def drawn_alike(logits, temperature, filters):
    """Draws of the kernel and of the definition, which may differ where the number falls on a border."""
    rows = logits.shape[0]
    seed = torch.arange(rows, device=DEVICE) * 7919 - 3
    position = torch.arange(rows, device=DEVICE) * 13
    settings = (temperature.to(DEVICE), seed, position, filters)
    found = ops.draw_tokens(logits, *settings, impl="triton")
    exact = ops.draw_tokens(logits, *settings, impl="reference")
    assert (found != exact).sum() <= rows // 30, (found, exact)
    return found


def filters_of(rows, *, min_p=0.0, top_k=None, top_p=1.0):
    top_k = VOCAB if top_k is None else top_k
    return ops.Filters(
        torch.full((rows,), min_p, device=DEVICE),
        torch.full((rows,), top_k, device=DEVICE),
        torch.full((rows,), top_p, device=DEVICE),
        top_k,
        some_top_k=top_k < VOCAB,
        some_top_p=top_p < 1.0,
    )


@pytest.mark.usefixtures("_small_pieces")
def test_tokens_are_drawn_as_defined_at_every_temperature(dtype):
    logits = logits_of(ROWS, 4, dtype=dtype)
    temperature = torch.tensor([0.0, 0.3, 1.0, 1.7, 0.0, 1e-4] * ROWS)[:ROWS]
    found = drawn_alike(logits, temperature, None)
    greedy = temperature == 0.0
    assert torch.equal(found[greedy], logits.argmax(-1)[greedy])
    assert found.dtype == torch.int64


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize(
    "kept",
    [{"top_p": 0.6}, {"top_k": 40}, {"min_p": 0.05}, {"min_p": 1e-3, "top_k": 300, "top_p": 0.9}],
    ids=str,
)
def test_filters_keep_what_they_are_defined_to_keep(dtype, kept):
    logits = logits_of(ROWS, 3, dtype=dtype, seed=4)
    logits[::2] = logits[::2].round()  # many alike
    temperature = torch.tensor([0.8, 1.0, 1.4, 0.0] * ROWS)[:ROWS]
    drawn_alike(logits, temperature, filters_of(ROWS, **kept))


@pytest.mark.usefixtures("_small_pieces")
def test_a_token_is_drawn_from_the_few_that_are_left(dtype):
    logits = torch.full((4, VOCAB), -torch.inf, dtype=dtype, device=DEVICE)
    logits[:, 600] = 5.0
    logits[0, 7], logits[1, VOCAB - 1] = 5.0, 1.0
    temperature = torch.full((4,), 0.5)
    for filters in (None, filters_of(4, min_p=1e-5, top_k=3, top_p=0.999)):
        found = drawn_alike(logits, temperature, filters).tolist()
        assert found[2:] == [600, 600]
        assert found[0] in (7, 600)
        assert found[1] in (600, VOCAB - 1)


@pytest.mark.usefixtures("_small_pieces")
def test_no_token_is_drawn_from_what_is_not_finite(dtype):
    logits = logits_of(4, 1, dtype=dtype)
    logits[0, 690], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0])
    for filters in (None, filters_of(4, top_p=0.5)):
        found = drawn_alike(logits, temperature, filters).tolist()
        assert found[:3] == [-1, -1, -1]
        assert 0 <= found[3] < VOCAB


@pytest.mark.usefixtures("_small_pieces")
def test_the_best_token_is_the_first_of_the_greatest_and_none_where_that_is_not_finite(dtype):
    logits = logits_of(9, 4, dtype=dtype, seed=2).clamp(-9, 9)
    logits[0, 5], logits[0, VOCAB - 1], logits[0, 300] = 10, 10, 10
    logits[1, 690:], logits[2, :] = 11, -5
    logits[3, 400], logits[4, 3], logits[5], logits[6, 699] = torch.nan, torch.inf, -torch.inf, torch.nan
    logits[6, 2] = torch.inf
    logits[7], logits[7, 600:] = -0.0, 0.0
    logits[8, :-1] = -torch.inf
    found, exact = (ops.best_tokens(logits, impl=impl) for impl in ("triton", "reference"))
    assert found.dtype == torch.int64
    assert found.tolist() == exact.tolist()
    assert found.tolist() == [5, 690, 0, -1, -1, -1, -1, 0, VOCAB - 1]
    assert ops.best_tokens(logits[:0], impl="triton").shape == (0,)


def judged(logits, fed, owner, impl):
    """What is noted, between lines and numbers that nobody may write."""
    sequences, queries = fed.shape
    lines = torch.full((sequences + 3, queries + 1), -7, device=DEVICE)
    home, newest, row = (
        torch.full((n + 1,), -9, device=DEVICE) for n in (fed.numel() + sequences, *[sequences] * 2)
    )
    ops.judge_greedy(logits, fed, ops.Notes(home[:-1], newest[:-1], row[:-1], owner, lines[:, 1:]), impl=impl)
    return [each.tolist() for each in (home, newest, row, lines)]


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_greedy_drafts_hold_up_to_the_first_that_is_not_the_best_token(dtype, queries):
    logits = logits_of(6 * queries, 2, dtype=dtype, seed=5)
    logits[2 * queries + min(1, queries - 1), 40] = torch.nan  # the row behind a draft that holds
    fed = torch.randint(VOCAB, (6, queries), device=DEVICE)
    best = logits.argmax(-1).view(6, queries)
    for sequence in range(6):  # so many of its drafts hold, and after the first other one another would
        fed[sequence, 1:] = best[sequence, :-1]
        fed[sequence, sequence + 1 : sequence + 2] += 1
    owner = torch.tensor([7, 3, 0, 5, 8, 1], device=DEVICE)
    found, exact = (judged(logits, fed, owner, impl) for impl in ("triton", "reference"))
    assert found == exact
    held = found[0][6 * queries : -1]
    assert held[:2] == [0, min(1, queries - 1)]
    assert held[5] == queries - 1
    assert found[1][2] == -1 or queries > 2
    assert -9 not in found[0][:-1]
