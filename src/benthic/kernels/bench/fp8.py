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

    op, size = f"{prefix}fp8_weight_gradient", padded_rows(count * rows, count) * (outer + inner)
    _lines(bench, op, f"{shape} ({inner}->{outer})", gradient, bench.sets(columns, size), work)


def _rows(x_RI: torch.Tensor) -> ops.Fp8:
    return ops.Fp8(*ops.quantise_fp8_rows(x_RI))


def _lines(
    bench: Bench, op: str, shape: str, run: Callable[..., torch.Tensor], sets: list[Any], work: float
) -> None:
    """Every implementation beside the definition in float32."""
    exact = run("reference", *sets[0])
    for impl in implementations(op, trying(run, *sets[0])):
        error = relative(run(impl, *sets[0]), exact)
        bench.add(op, shape, impl, bench.time(partial(run, impl), sets), work, "TFLOP/s", error)
