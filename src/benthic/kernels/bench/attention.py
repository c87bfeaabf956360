"""Attention, forward and backward, and paged decode.

FLOPs of attention: 2 h s^2 (d_qk + d_v) a sequence, halved when causal; backward counts 2.5 times that.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benthic.kernels import ops
from benthic.kernels.bench.calls import accepted, forward_backward, implementations, trying
from benthic.kernels.bench.timing import WORST_ERROR, Bench, Make, relative

if TYPE_CHECKING:
    from collections.abc import Callable


def attention(bench: Bench) -> None:
    """Packed causal and full attention; a ragged pack of the same tokens; FlashAttention-2 as a peer."""
    sizes = [(2, 128)] if bench.small else [(4, 4096), (1, 16384)]
    heads = 2 if bench.small else 16
    for (sequences, length), (d, v), causal in itertools.product(
        sizes, [(128, 128), (192, 128)], [True, False]
    ):
        work = 2 * heads * sequences * length**2 * (d + v) / (2 if causal else 1)
        shape = f"b{sequences} s{length} h{heads} ({d},{v}) {'causal' if causal else 'full'}"
        make = _heads(bench, sequences * length, heads, d, v)
        run = _packed([length] * sequences, causal=causal, device=bench.device)
        _check_attention(bench, heads, d, v, causal=causal)
        for impl in implementations("attention", trying(run, *make(0))):
            forward_backward(
                bench, "attention", shape, impl, run, make, work, "TFLOP/s", backward=2.5, checked=True
            )
        if bench.device == "cuda" and d == v:
            peer = _flash_2(sequences, causal=causal)
            forward_backward(
                bench,
                "attention",
                shape,
                "sdpa FA2 (peer)",
                peer,
                make,
                work,
                "TFLOP/s",
                backward=2.5,
                checked=True,
            )
    lengths = [60, 4, 33, 31] if bench.small else [7000, 1, 129, 3000, 4096, 2158]
    for d, v in [(128, 128), (192, 128)]:
        work = sum(heads * length**2 * (d + v) for length in lengths)
        make = _heads(bench, sum(lengths), heads, d, v)
        run = _packed(lengths, causal=True, device=bench.device)
        shape = f"ragged {sum(lengths)} h{heads} ({d},{v}) causal"
        for impl in implementations("attention", trying(run, *make(0))):
            forward_backward(
                bench, "attention", shape, impl, run, make, work, "TFLOP/s", backward=2.5, checked=True
            )


def _heads(bench: Bench, tokens: int, heads: int, d: int, v: int) -> Make:
    return lambda seed: tuple(
        bench.random(tokens, heads, width, seed=seed * 10 + i, grad=True) for i, width in enumerate((d, d, v))
    )


def _packed(lengths: list[int], *, causal: bool, device: str) -> Callable[..., torch.Tensor]:
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def run(impl: str | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.attention(
            q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, scale=q.shape[-1] ** -0.5,
            causal=causal, impl=impl,
        )  # fmt: skip

    return run


def _flash_2(sequences: int, *, causal: bool) -> Callable[..., torch.Tensor]:
    def run(_impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def _check_attention(bench: Bench, heads: int, d: int, v: int, *, causal: bool) -> None:
    """Every implementation, values and the gradients that it takes part in, on two short sequences."""
    run = _packed([128, 128], causal=causal, device=bench.device)
    inputs = _heads(bench, 256, heads, d, v)(0)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = run("reference", *wide)
    seed = torch.randn_like(exact)
    expected = [exact, *torch.autograd.grad(exact, wide, seed)]
    for impl in implementations("attention", lambda impl: run(impl, *inputs)):
        with torch.set_grad_enabled(accepted(run, impl, *inputs)):
            out = run(impl, *inputs)
        grads = torch.autograd.grad(out, inputs, seed.to(out.dtype)) if out.requires_grad else ()
        errors = [relative(fast, slow) for fast, slow in zip([out, *grads], expected, strict=False)]
        if not max(errors) <= WORST_ERROR:
            msg = f"attention {impl} ({d}, {v}): errors {errors} of out, dq, dk, dv exceed {WORST_ERROR}"
            raise SystemExit(msg)


def decode(bench: Bench) -> None:
    """Paged absorbed decode: bytes of the cache a second, and FLOPs."""
    batches = [(2, 100)] if bench.small else [(64, 4096), (128, 4096), (256, 8192)]
    for heads, (sequences, context) in itertools.product([16] if bench.small else [16, 64, 128], batches):
        _decode_lines(bench, heads, sequences, context)


def _decode_lines(bench: Bench, heads: int, sequences: int, context: int) -> None:
    pages = -(-context // 64)
    cache = bench.random(sequences * pages, 64, 576)
    table = torch.randperm(sequences * pages, device=bench.device).view(sequences, pages).to(torch.int32)
    contexts = torch.full((sequences,), context, dtype=torch.int32, device=bench.device)
    query = bench.random(sequences, 1, heads, 576, seed=1)

    def run(impl: str, q: torch.Tensor) -> torch.Tensor:
        return ops.mla_decode(q[..., :512], q[..., 512:], cache, table, contexts, scale=0.07, impl=impl)

    few, exactly = slice(0, 2), cache.double() if bench.small else cache
    for impl in implementations("mla_decode", trying(run, query)):
        latent, rope = query[few].double().split((512, 64), dim=-1)
        exact = ops.mla_decode(latent, rope, exactly, table[few], contexts[few], scale=0.07, impl="reference")
        error = relative(run(impl, query)[few], exact)
        seconds = bench.time(partial(run, impl), [(query,)])
        shape, tokens = f"{sequences} x {context}, {heads} heads", sequences * context
        bench.add("mla_decode", shape, impl, seconds, tokens * 576 * bench.dtype.itemsize, "TB/s", error)
        bench.add("mla_decode", shape, impl, seconds, 2 * tokens * heads * (576 + 512), "TFLOP/s", error)
