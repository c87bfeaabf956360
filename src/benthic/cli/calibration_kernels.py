"""What `benthic calibrate` times on a GPU beyond products and streams: our kernels, as steps call them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from benthic.kernels import ops
from benthic.kernels.bench.calls import ends_of
from benthic.plan.cost.ops import Attention, Gemm, GroupedGemm, MemoryBound, MlaDecode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from benthic.plan.cost.ops import Dtype, Op

    Calls = Iterator[tuple[Op, Callable[[], object]]]

_PARTS: Final = (3, 5)
"""Eighths of a row that its two documents take where rows hold several."""
_PAGE: Final = 64
_QK, _V, _HEADS = 192, 128, 16
_LATENT, _ROPE = 512, 64


@dataclass(frozen=True)
class Kernels:
    """Sizes: (rows, tokens) of attention, (requests, context) of decoding, rows and widths of the rest.

    Attention takes 0.5 ms or more, so that the host's launches do not show.
    """

    attention: tuple[tuple[int, int], ...]
    packed: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    expert_rows: tuple[int, ...]
    experts: int
    weights: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]
    heads: tuple[int, ...]
    columns: tuple[tuple[int, int], ...]


ON_GPU: Final = Kernels(
    attention=(
        (64, 1024),
        *((rows, 2048) for rows in (16, 32, 64)),
        *((rows, 4096) for rows in (4, 8, 16)),
        *((rows, 8192) for rows in (1, 2, 4)),
        *((rows, 16384) for rows in (1, 2)),
    ),
    packed=((16, 2048), (32, 2048), (4, 4096), (8, 4096), (2, 8192), (1, 16384)),
    rows=(4096, 16384, 32768),
    expert_rows=(128, 384, 768, 1536),
    experts=64,
    weights=((2816, 2048), (2048, 1408)),
    decode=tuple(itertools.product((1, 8, 32, 64, 128, 256), (1024, 4096))),
    heads=(16, 128),
    columns=((4096, 2048), (16384, 2048), (32768, 7168)),
)


def attention(device: str, sizes: Kernels) -> Calls:
    """Rows of one sequence, and rows of two documents that do not see each other; forward and backward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for packed, shapes in ((False, sizes.attention), (True, sizes.packed)):
        for rows, seq_len in shapes:
            lengths = [seq_len * part // sum(_PARTS) for part in _PARTS] if packed else [seq_len]
            kept = sum(length**2 for length in lengths) / seq_len**2
            attend, back = _both_ways(device, dtype, lengths * rows)
            for backward, call in ((False, attend), (True, back)):
                yield (
                    Attention(
                        rows=rows,
                        heads=_HEADS,
                        seq_len=seq_len,
                        qk_dim=_QK,
                        v_dim=_V,
                        backward=backward,
                        packed=packed,
                        kept=kept,
                    ),
                    call,
                )


def _both_ways(
    device: str, dtype: torch.dtype, lengths: list[int]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Causal attention of sequences of these lengths, and its gradients."""
    q, k, v = (
        torch.randn(sum(lengths), _HEADS, d, device=device, dtype=dtype, requires_grad=True)
        for d in (_QK, _QK, _V)
    )
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    attend = partial(
        ops.attention, q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, scale=_QK**-0.5
    )
    out = attend()
    back = partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)
    return attend, back


def gradients(device: str, sizes: Kernels) -> Calls:
    """Gradients of weights, added to a float32 sum."""
    wide = torch.bfloat16 if device == "cuda" else torch.float32
    word: Dtype = "bf16" if device == "cuda" else "fp32"
    for n, k in sizes.weights:
        total = torch.zeros(n, k, device=device)
        for m in sizes.rows:
            dy, x = (torch.randn(m, width, device=device, dtype=wide) for width in (n, k))
            op = Gemm(m=n, n=k, k=m, dtype=word, name="gradient")
            yield op, partial(ops.add_weight_gradient, total, dy, x)
            narrow = [ops.quantise_fp8_columns(side) for side in (dy, x)]
            narrow_op = Gemm(m=n, n=k, k=m, dtype="fp8", name="gradient")
            yield narrow_op, partial(ops.add_fp8_weight_gradient, total, narrow[0], narrow[1])
        yield from _experts(device, sizes, (n, k), wide, word)


def _experts(device: str, sizes: Kernels, weight: tuple[int, int], wide: torch.dtype, word: Dtype) -> Calls:
    (n, k), experts = weight, sizes.experts
    total = torch.zeros(experts, n, k, device=device)
    for each in sizes.expert_rows:
        rows = experts * each
        dy, x = (torch.randn(rows, width, device=device, dtype=wide) for width in (n, k))
        ends = ends_of(experts, each, device, drawn=True)
        op = partial(GroupedGemm, rows=rows, experts=experts, n=n, k=k, gradient=True)
        yield op(dtype=word), partial(ops.add_weight_gradient, total, dy, x, ends)
        columns = [ops.quantise_fp8_columns(side, ends) for side in (dy, x)]
        yield op(dtype="fp8"), partial(ops.add_fp8_weight_gradient, total, columns[0], columns[1], ends)


def tiles(device: str, sizes: Kernels) -> Calls:
    """Quantising for FP8 products: rows, columns, rows turned into columns; and weights turned round."""
    wide = torch.bfloat16 if device == "cuda" else torch.float32
    for rows, width in sizes.columns:
        x = torch.randn(rows, width, device=device, dtype=wide)
        narrow = ops.Fp8(*ops.quantise_fp8_rows(x))
        count = 1.0 * x.numel()
        yield MemoryBound(bytes=3 * count, name="quantise 1x128"), partial(ops.quantise_fp8_rows, x)
        yield MemoryBound(bytes=3 * count, name="quantise 128x1"), partial(ops.quantise_fp8_columns, x)
        yield MemoryBound(bytes=2 * count, name="retile"), partial(ops.retile_fp8, narrow)
    for n, k in sizes.weights:
        weights = ops.quantise_fp8_weight(torch.randn(sizes.experts, n, k, device=device, dtype=wide))
        yield (
            MemoryBound(bytes=2.0 * weights.values.numel(), name="transpose fp8"),
            partial(ops.turn_fp8, weights),
        )


def decoding(device: str, sizes: Kernels) -> Calls:
    """Absorbed attention of one token a request over pages of latents, in BF16 and in E4M3."""
    wide = torch.bfloat16 if device == "cuda" else torch.float32
    word: Dtype = "bf16" if device == "cuda" else "fp32"
    for heads, (requests, context) in itertools.product(sizes.heads, sizes.decode):
        query = torch.randn(requests, 1, heads, _LATENT + _ROPE, device=device, dtype=wide)
        pages = -(-context // _PAGE)
        table = torch.randperm(requests * pages, device=device).view(requests, pages).to(torch.int32)
        contexts = torch.full((requests,), context, dtype=torch.int32, device=device)
        cache = torch.randn(requests * pages, _PAGE, _LATENT + _ROPE, device=device, dtype=wide)
        for dtype, kept in ((word, cache), ("fp8", cache.to(torch.float8_e4m3fn))):
            op = MlaDecode(requests=requests, context=requests * context, heads=heads, cache_dtype=dtype)
            yield op, partial(_decode, query, kept, table, contexts)


def _decode(query: Tensor, cache: Tensor, table: Tensor, contexts: Tensor) -> Tensor:
    return ops.mla_decode(query[..., :_LATENT], query[..., _LATENT:], cache, table, contexts, scale=_QK**-0.5)
