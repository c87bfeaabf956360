"""Ops that are bound by memory, experts, the head's loss, updates: each checked, then timed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.bench.calls import ends_of, forward_backward, implementations, trying
from benthic.kernels.bench.timing import Bench, Make, relative

if TYPE_CHECKING:
    from collections.abc import Callable


def roofs(bench: Bench) -> None:
    """Copy bandwidth and the rate of a plain product, in this run."""
    elements = (1 << 20) if bench.small else (1 << 29)
    pairs = [(bench.random(elements), torch.empty(elements, device=bench.device, dtype=bench.dtype))]
    seconds = bench.time(lambda x, y: y.copy_(x), pairs)
    moved = 2 * elements * bench.dtype.itemsize
    bench.add("roof: copy", f"{elements} elements", "torch", seconds, moved, "TB/s", None)
    n = 256 if bench.small else 8192
    seconds = bench.time(torch.mm, [(bench.random(n, n), bench.random(n, n, seed=1))])
    bench.add("roof: product", f"{n}^3", "torch", seconds, 2 * n**3, "TFLOP/s", None)


def memory_bound(bench: Bench) -> None:
    """Row-wise ops on at least 256 MB, forward and backward."""
    rows, width = (64, 256) if bench.small else (32768, 7168)
    weight = bench.random(width, seed=5)
    angle, by_row = torch.rand(rows, 32, device=bench.device), torch.rand(rows, device=bench.device)
    one = _rows(bench, rows, width)
    # what is read and written, forward and backward, in tensors of rows x width
    cases: list[tuple[str, Callable[..., Any], Make, float, float]] = [
        ("rms_norm", lambda impl, x: ops.rms_norm(x, weight, 1e-6, impl=impl), one, 2, 3),
        (
            "add_rms_norm",
            lambda impl, x, r: ops.add_rms_norm(x, r, weight, 1e-6, impl=impl)[0],
            _rows(bench, rows, width, count=2),
            4,
            3,
        ),
        ("swiglu", lambda impl, x: ops.swiglu(x, impl=impl), one, 1.5, 2.5),
        (
            "weighted_swiglu_gradient",
            lambda impl, x, r: ops.weighted_swiglu_gradient(x, r, by_row, impl=impl)[0],
            lambda seed: (*one(seed), bench.random(rows, width // 2, seed=seed + 100, grad=True)),
            2.5,
            1,
        ),
        (
            "rope",
            lambda impl, x: ops.rope(x, angle.cos(), angle.sin(), impl=impl),
            _rows(bench, rows, width // 64, 64),
            2,
            2,
        ),
    ]
    for name, run, make, forth, back in cases:
        size = rows * width * bench.dtype.itemsize * forth
        for impl in implementations(name, trying(run, *make(0))):
            forward_backward(
                bench, name, f"{rows}x{width}", impl, run, make, size, "TB/s", backward=back / forth
            )
    if bench.device == "cuda":
        norm = lambda _, x: F.rms_norm(x, (width,), weight, 1e-6)  # noqa: E731 (a peer in one line)
        forward_backward(
            bench, "rms_norm", f"{rows}x{width}", "torch (peer)", norm, _rows(bench, rows, width),
            2 * rows * width * bench.dtype.itemsize, "TB/s",
        )  # fmt: skip


def _rows(bench: Bench, *shape: int, count: int = 1) -> Make:
    return lambda seed: tuple(bench.random(*shape, seed=seed * 10 + i, grad=True) for i in range(count))


def head_dims(bench: Bench) -> None:
    """Two parts of heads side by side, as queries, keys and gradients of both products are made."""
    tokens, heads = (64, 4) if bench.small else (16384, 16)
    row = tokens * bench.dtype.itemsize

    def shared(impl: str, x: torch.Tensor) -> torch.Tensor:
        return ops.join_head_dims(x[..., :128], x[:, 0, 128:], impl=impl)

    def both(impl: str, x: torch.Tensor) -> torch.Tensor:
        return ops.join_head_dims(x[..., :128], x[..., 128:], impl=impl)

    cases: list[tuple[str, Callable[..., torch.Tensor], int, int]] = [
        ("128 + 64", both, 192, 2 * heads * 192),
        ("128 + 64 of all heads", shared, 192, heads * (128 + 192) + 64),
        ("128 + 128", both, 256, 2 * heads * 256),
    ]
    for dims, run, width, each in cases:
        operands = bench.sets(_rows(bench, tokens, heads, width), row * each)
        names = implementations("join_head_dims", trying(run, *operands[0]))
        for impl in dict.fromkeys([*names, "reference"]):  # the definition is what torch has
            error = relative(run(impl, *operands[0]), run("reference", *operands[0]))
            seconds = bench.time(partial(run, impl), operands)
            shape = f"{tokens} x {heads} x ({dims})"
            bench.add("join_head_dims", shape, impl, seconds, row * each, "TB/s", error)


def _grouped_lines(bench: Bench, count: int, rows: int, width: int, out: int, *, drawn: bool = False) -> None:
    ends, word = ends_of(count, rows, bench.device, drawn=drawn), " random" if drawn else ""

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        x = bench.random(count * rows, width, seed=seed, grad=True)
        return x, bench.random(count, out, width, seed=seed + 1, grad=True)

    def run(impl: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.grouped_linear(x, weight, ends, impl=impl)

    work = 2 * count * rows * width * out
    for impl in implementations("grouped_linear", trying(run, *make(0))):
        shape = f"{count}x{rows} ({width}->{out}){word}"
        forward_backward(bench, "grouped_linear", shape, impl, run, make, work, "TFLOP/s", backward=2)


def _grouped_swiglu_lines(
    bench: Bench, count: int, rows: int, width: int, out: int, *, drawn: bool = False
) -> None:
    """The first product of experts with SwiGLU, in one kernel and in two."""
    ends, word = ends_of(count, rows, bench.device, drawn=drawn), " random" if drawn else ""

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        return bench.random(count * rows, width, seed=seed), bench.random(count, out, width, seed=seed + 1)

    def run(impl: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.grouped_swiglu(x, weight, ends, impl=impl)

    operands = bench.sets(make, (rows + out) * count * width * bench.dtype.itemsize)
    shape, work = f"{count}x{rows} ({width}->{out}){word}", 2 * count * rows * width * out
    _product_lines(bench, "grouped_swiglu", shape, run, operands, work)


def _product_lines(
    bench: Bench,
    op: str,
    shape: str,
    run: Callable[..., Any],
    operands: list[tuple[torch.Tensor, ...]],
    work: float,
) -> None:
    """A line for each way to compute a product of inference, beside its definition."""
    for impl in implementations(op, trying(run, *operands[0])):
        error = relative(run(impl, *operands[0]), run("reference", *operands[0]))
        bench.add(op, shape, impl, bench.time(partial(run, impl), operands), work, "TFLOP/s", error)


def _linear_swiglu_lines(bench: Bench, rows: int, width: int, out: int) -> None:
    """The same of one weight."""

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        return bench.random(rows, width, seed=seed), bench.random(out, width, seed=seed + 1)

    def run(impl: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_swiglu(x, weight, impl=impl)

    operands = bench.sets(make, (rows * (width + out) + out * width) * bench.dtype.itemsize)
    _product_lines(bench, "linear_swiglu", f"{rows} ({width}->{out})", run, operands, 2 * rows * width * out)


def experts(bench: Bench) -> None:
    """Grouped products at the shapes of V3 and Moonlight, with permute and unpermute.

    "random" is as routing has it: where as many rows are meant for each expert, no tile is left half empty.
    """
    shapes = [(4, 32, 64, 32)] if bench.small else [
        (8, 4096, 7168, 4096), (8, 4096, 2048, 7168), (32, 256, 7168, 4096), (64, 768, 2048, 2816), (64,
        768, 1408, 2048), (64, 6, 2048, 2816), (64, 6, 1408, 2048),
    ]  # fmt: skip
    for shape in shapes:
        _grouped_lines(bench, *shape)
    for rows in (32,) if bench.small else (96, 192, 384, 1536):
        few = (4, rows, 64, 32) if bench.small else (64, rows, 2048, 2816)
        _grouped_lines(bench, *few, drawn=True)
        _grouped_swiglu_lines(bench, *few, drawn=True)
        if not bench.small:
            _grouped_lines(bench, 64, rows, 1408, 2048, drawn=True)
    if not bench.small:
        _grouped_swiglu_lines(bench, 8, 4096, 7168, 4096)
        _grouped_swiglu_lines(bench, 64, 6, 2048, 2816)
    shared = (64, 32) if bench.small else (2048, 5632)
    for rows in (64,) if bench.small else (2048, 4096, 16384):
        _linear_swiglu_lines(bench, rows, *shared)
    tokens, width, top_k = (64, 64, 2) if bench.small else (16384, 7168, 8)
    expert = torch.rand(tokens, 64, device=bench.device).topk(top_k).indices.to(torch.int32)
    weight = torch.rand(tokens, top_k, device=bench.device)
    maps = ops.permute(bench.random(tokens, 8), expert, 64, impl="reference").maps
    row = width * bench.dtype.itemsize * tokens
    for impl in implementations(
        "unpermute", lambda impl: ops.unpermute(bench.random(tokens * top_k, 8), maps, weight, impl=impl)
    ):
        make = _rows(bench, tokens * top_k, width)
        forward_backward(
            bench, "unpermute", f"{tokens} x {top_k} x {width}", impl,
            lambda impl, x: ops.unpermute(x, maps, weight, impl=impl), make, row * (top_k + 1), "TB/s",
            backward=(2 * top_k + 1) / (top_k + 1),
        )  # fmt: skip
        forward_backward(
            bench, "permute (with sort)", f"{tokens} x {top_k} x {width}", impl,
            lambda impl, x: ops.permute(x, expert, 64, impl=impl).rows_RD, _rows(bench, tokens, width),
            row * (top_k + 1), "TB/s", backward=1,
        )  # fmt: skip


def update(bench: Bench) -> None:
    """AdamW of a float32 master with bfloat16 moments, alone, split and with the new master's FP8 copy."""
    rows, width = (256, 256) if bench.small else (16384, 7168)
    master, gradient = (bench.random(rows, width, seed=seed).float() for seed in (0, 1))
    first, second = (torch.zeros_like(master, dtype=torch.bfloat16) for _ in range(2))
    copy = ops.quantise_fp8_weight(master)
    by = ops.AdamWStep(0.9, 0.95, 1e-8, step_size=1e-4, decay=1e-5, correction=1.0)
    plain = partial(ops.adamw, master, gradient, first, second, by)
    narrow = partial(ops.adamw_fp8, master, gradient, first, second, by, copy)
    weight, remainder = master.bfloat16(), torch.zeros_like(master, dtype=torch.int16)
    split = partial(ops.adamw_split, weight, remainder, gradient, first, second, by)
    cases: list[tuple[str, str, Callable[..., Any], int]] = [
        ("adamw", "", plain, 20),
        ("adamw_split", "", split, 20),
        ("adamw_fp8", "", narrow, 21),
        ("adamw_fp8", ", at random", partial(narrow, seed=0), 21),
    ]
    for op, how, run, each in cases:
        for impl in implementations(op, lambda impl, run=run: run(impl=impl)):  # type: ignore[misc]
            seconds = bench.time(partial(run, impl=impl), [()])
            bench.add(op, f"{rows}x{width}{how}", impl, seconds, master.numel() * each, "TB/s", None)


def copies(bench: Bench) -> None:
    """What an expert-parallel rank of 8 does with its tokens: about 1.5 of 8 copies of each are here."""
    tokens, width, top_k = (64, 64, 8) if bench.small else (16384, 7168, 8)
    here = torch.rand(tokens, top_k, device=bench.device) < 1.5 / top_k
    row_AK = torch.where(here, here.flatten().cumsum(0).view_as(here) - 1, -1)
    copy_R = here.flatten().nonzero().squeeze(1)
    weight = torch.rand(tokens, top_k, device=bench.device)
    ends = torch.tensor([len(copy_R)], dtype=torch.int32, device=bench.device)
    row, rows = width * bench.dtype.itemsize, len(copy_R)
    dout = bench.random(tokens, width, seed=3)
    cases: list[tuple[str, Callable[..., Any], int, float]] = [
        (
            "gather_copies",
            lambda impl, x: ops.gather_copies(x, copy_R, ends, top_k=top_k, impl=impl),
            tokens,
            row * 2 * rows,
        ),
        (
            "sum_copies",
            lambda impl, x: ops.sum_copies(x, row_AK, weight, impl=impl),
            rows,
            row * (rows + tokens),
        ),
        (
            "sum_copies_backward",
            lambda impl, x: ops.sum_copies_backward(dout, x, row_AK, weight, impl=impl)[0],
            rows,
            row * (2 * rows + tokens),
        ),
    ]
    for name, run, count, moved in cases:
        _copy_lines(bench, name, f"{tokens} x {width}, {rows} copies", run, (count, width), moved)
    _spread_lines(bench, row_AK, rows, width)


def _spread_lines(bench: Bench, row_AK: torch.Tensor, rows: int, width: int) -> None:
    """Row tiles of tokens to the rows of their copies: what they hold, and what they are copied to."""
    tokens = row_AK.shape[0]
    moved = (width + 4 * -(-width // 128)) * (tokens + rows)
    operands = bench.sets(
        lambda seed: ops.quantise_fp8_rows(bench.random(tokens, width, seed=seed), by_column=True), moved
    )

    def run(impl: str, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ops.spread_fp8(ops.Fp8(values, scale), row_AK, rows=rows, impl=impl).values

    for impl in implementations("spread_fp8", trying(run, *operands[0])):
        error = relative(run(impl, *operands[0]).float(), run("reference", *operands[0]).float())
        took = bench.time(partial(run, impl), operands)
        bench.add("spread_fp8", f"{tokens} x {width}, {rows} copies", impl, took, moved, "TB/s", error)


def _copy_lines(
    bench: Bench, name: str, shape: str, run: Callable[..., Any], size: tuple[int, int], moved: float
) -> None:
    operands = bench.sets(lambda seed: (bench.random(*size, seed=seed),), moved)
    for impl in implementations(name, trying(run, *operands[0])):
        error = relative(run(impl, *operands[0]), run("reference", *operands[0]))
        bench.add(name, shape, impl, bench.time(partial(run, impl), operands), moved, "TB/s", error)


def head(bench: Bench) -> None:
    """Linear and cross-entropy without the logits matrix: three products' FLOPs, though four are done."""
    tokens, width, vocabulary = (64, 32, 500) if bench.small else (8192, 2048, 163840)
    target = torch.randint(vocabulary, (tokens,), device=bench.device)

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        hidden = bench.random(tokens, width, seed=seed, grad=True)
        return hidden, (bench.random(vocabulary, width, seed=seed + 1) / 45).detach().requires_grad_()

    def run(impl: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, weight, target, impl=impl)

    work = 2 * tokens * width * vocabulary
    for impl in ("chunked", "reference"):
        forward_backward(
            bench, "linear_cross_entropy", f"{tokens} x {width} x {vocabulary}", impl, run, make, work,
            "TFLOP/s", backward=2,
        )  # fmt: skip
