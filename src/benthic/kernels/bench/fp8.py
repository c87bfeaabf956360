"""Quantisers of FP8, and products of what they give: dense, expert by expert, and gradients of weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from benthic.kernels import ops
from benthic.kernels.bench.calls import implementations, trying
from benthic.kernels.bench.timing import Bench, relative
from benthic.kernels.reference.fp8_linear import padded_rows

if TYPE_CHECKING:
    from collections.abc import Callable

DENSE: Final = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
"""Outputs and inputs of DeepSeek-V3's products: q_a with kv_a, q_b, kv_b, o, an expert's two."""
DENSE_ROWS: Final = (4096, 128, 64)
GROUPED: Final = [
    (4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048),
    (32, 256, 4096, 7168), (32, 256, 7168, 2048), (64, 1536, 2816, 2048), (64, 1536, 2048, 1408),
    (64, 24, 2816, 2048), (64, 24, 2048, 1408), (64, 6, 2816, 2048), (64, 6, 2048, 1408),
]  # fmt: skip
"""Experts, rows of each, outputs and inputs: of DeepSeek-V3; of Moonlight in training (16,384
tokens) and in decodes of 256 and 64 sequences."""


def quantisers(bench: Bench) -> None:
    """Quantisers on at least 256 MB."""
    x = bench.random(*((256, 256) if bench.small else (32768, 7168)))
    for name, quantise in (("1x128", ops.quantise_fp8_rows), ("128x128", ops.quantise_fp8_blocks)):
        _quantiser_lines(bench, f"quantise {name}", quantise, x)


def _quantiser_lines(bench: Bench, name: str, quantise: Callable[..., Any], x: torch.Tensor) -> None:
    for impl in implementations("quantise_fp8", lambda impl: quantise(x, impl=impl)):
        fast, exact = (quantise(x, impl=each)[0].float() for each in (impl, "reference"))
        seconds = bench.time(partial(quantise, impl=impl), [(x,)])
        moved = x.numel() * (bench.dtype.itemsize + 1)
        shape = f"{x.shape[0]}x{x.shape[1]}"
        bench.add(name, shape, impl, seconds, moved, "TB/s", relative(fast, exact))


def fused(bench: Bench) -> None:
    """What quantises as it reads or computes, on at least 256 MB: bytes that one pass must move."""
    rows, width = (256, 256) if bench.small else (32768, 7168)
    weight, wide = bench.random(width, seed=5), bench.dtype.itemsize
    x, residual = bench.random(rows, width), bench.random(rows, width, seed=1)
    ends = (torch.arange(1, 9, device=bench.device) * (rows // 8)).to(torch.int32)
    by_row = torch.rand(rows, device=bench.device)
    cases: list[tuple[str, Callable[..., Any], tuple[torch.Tensor, ...], float]] = [
        ("quantise_fp8_both", lambda impl, x: ops.quantise_fp8_both(x, ends, impl=impl), (x,), wide + 2),
        ("swiglu_fp8", lambda impl, x: ops.swiglu_fp8(x, impl=impl), (x,), wide + 0.5),
        (
            "swiglu_gradient_fp8_both",
            lambda impl, x, r: ops.swiglu_gradient_fp8_both(x, r, ends, impl=impl),
            (x, bench.random(rows, width // 2, seed=2)),
            1.5 * wide + 2,
        ),
        (
            "weighted_swiglu_gradient_fp8_both",
            lambda impl, x, r: ops.weighted_swiglu_gradient_fp8_both(x, r, by_row, ends, impl=impl),
            (x, bench.random(rows, width // 2, seed=2)),
            1.5 * wide + 2,
        ),
        ("rms_norm_fp8", lambda impl, x: ops.rms_norm_fp8(x, weight, 1e-6, impl=impl), (x,), wide + 1),
        (
            "add_rms_norm_fp8",
            lambda impl, x, r: ops.add_rms_norm_fp8(x, r, weight, 1e-6, impl=impl),
            (x, residual),
            3 * wide + 1,
        ),
    ]
    for op, run, operands, each in cases:
        exact = _widened(run("reference", *operands))
        for impl in implementations(op, trying(run, *operands)):
            error = relative(_widened(run(impl, *operands)), exact)
            seconds = bench.time(partial(run, impl), [operands])
            bench.add(op, f"{rows}x{width}", impl, seconds, rows * width * each, "TB/s", error)


def _widened(tiles: ops.Fp8 | tuple[ops.Fp8, Any]) -> torch.Tensor:
    """Row tiles times their scales; a value on the border of two may fall to either."""
    rows = tiles if isinstance(tiles, ops.Fp8) else tiles[0]
    return ops.dequantise_fp8_rows(*rows, dtype=torch.float32)


def products(bench: Bench) -> None:
    """`x W^T` and `dy^T x` of operands that are quantised already: that has lines of its own."""
    for outer, inner in [(48, 128)] if bench.small else DENSE:
        for rows in (9,) if bench.small else DENSE_ROWS:
            _product_lines(bench, 1, rows, outer, inner)
    for shape in [(3, 9, 48, 128)] if bench.small else GROUPED:
        _product_lines(bench, *shape)


def _product_lines(bench: Bench, count: int, rows: int, outer: int, inner: int) -> None:
    """One shape: forward, and where a group has enough rows for training, the gradient of its weight."""
    grouped = count > 1
    ends = (torch.arange(1, count + 1, device=bench.device) * rows).to(torch.int32) if grouped else None
    prefix, shape = ("grouped_", f"{count}x{rows}") if grouped else ("", str(rows))
    work = 2 * count * rows * outer * inner

    def make(seed: int) -> tuple[ops.Fp8, ops.Fp8]:
        weight = bench.random(*((count,) if grouped else ()), outer, inner, seed=seed + 1)
        return _rows(bench.random(count * rows, inner, seed=seed)), ops.quantise_fp8_weight(weight)

    def forward(impl: str, x: ops.Fp8, weight: ops.Fp8) -> torch.Tensor:
        return ops.fp8_linear(x, weight, ends, dtype=bench.dtype, impl=impl)

    size = count * outer * inner + count * rows * inner
    _lines(bench, f"{prefix}fp8_linear", f"{shape} ({inner}->{outer})", forward, bench.sets(make, size), work)
    if rows < 256 and not bench.small:
        return

    def columns(seed: int) -> tuple[ops.Fp8, ops.Fp8]:
        dy, x = (bench.random(count * rows, width, seed=seed + width) for width in (outer, inner))
        return ops.quantise_fp8_columns(dy, ends), ops.quantise_fp8_columns(x, ends)

    def gradient(impl: str, dy: ops.Fp8, x: ops.Fp8) -> torch.Tensor:
        return ops.fp8_weight_gradient(dy, x, ends, impl=impl)

    total = torch.zeros(*((count,) if grouped else ()), outer, inner, device=bench.device)

    def added(impl: str, dy: ops.Fp8, x: ops.Fp8) -> torch.Tensor:
        ops.add_fp8_weight_gradient(total, dy, x, ends, impl=impl)
        return total

    size = padded_rows(count * rows, count) * (outer + inner)
    sets, shape = bench.sets(columns, size), f"{shape} ({inner}->{outer})"
    _lines(bench, f"{prefix}fp8_weight_gradient", shape, gradient, sets, work)
    _lines(bench, f"add_{prefix}fp8_weight_gradient", shape, added, sets, work, checked=True)


def _rows(x_RI: torch.Tensor) -> ops.Fp8:
    return ops.Fp8(*ops.quantise_fp8_rows(x_RI))


def _lines(
    bench: Bench, op: str, shape: str, run: Callable[..., torch.Tensor], sets: list[Any], work: float,
    *, checked: bool = False,
) -> None:  # fmt: skip
    """Every implementation beside the definition in float32, unless it was checked with another op."""
    exact = None if checked else run("reference", *sets[0])
    for impl in implementations(op, trying(run, *sets[0])):
        error = None if exact is None else relative(run(impl, *sets[0]), exact)
        bench.add(op, shape, impl, bench.time(partial(run, impl), sets), work, "TFLOP/s", error)
