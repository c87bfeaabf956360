"""Definitions of the three FP8 products of a linear layer (DeepSeek-V3 report section 3.3).

Every product sums chunks of 128 along its inner dimension K: a chunk's products are summed first, then scaled
and added in float32. On Hopper this is where partial sums leave the tensor cores, which keep about 14 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels.reference.fp8 import dequantise, quantise
from benthic.kernels.reference.moe import squares_of

TILE = 128


class Fp8(NamedTuple):
    """E4M3 values and what they are multiplied with: one float32 scale a tile.

    Row tiles (1 x 128 along the inner dimension): values [R, K], scale [R, ceil(K / 128)].
    Block tiles (128 x 128): values [..., O, I], scale [..., ceil(O / 128), ceil(I / 128)].
    Column tiles (128 x 1, stored transposed, so that K is contiguous again): values [I, P], scale
    [I, P / 128], where P counts rows with each expert's padded by zeros to a multiple of 128.
    """

    values: Tensor
    scale: Tensor

    def transposed(self) -> Fp8:
        """Block tiles of the transposed matrix: views."""
        return Fp8(self.values.transpose(-1, -2), self.scale.transpose(-1, -2))


def by_column(scale: Tensor) -> Tensor:
    """The scales of each column side by side; a copy where they lie otherwise."""
    return scale if scale.stride() == (1, scale.shape[0]) else scale.t().contiguous().t()


def spaced(scale: Tensor) -> Tensor:
    """Scales `[..., O, I]` of which each row begins at a multiple of 4; a copy where they lie otherwise.

    What lies between rows are zeros, so cuBLAS may read them.
    """
    used = scale.shape[-1]
    if scale.stride(-1) == 1 and scale.stride(-2) == used + -used % 4:
        return scale
    if used % 4 == 0:  # padding by nothing would copy, and keep how they lie
        return scale.contiguous()
    return F.pad(scale, (0, -used % 4))[..., :used]


def quantise_weight(weight: Tensor, *, power_of_two: bool) -> Fp8:
    """Block tiles of one matrix `[O, I]`, or of each expert's `[E, O, I]`."""
    if weight.dim() == 2:
        return Fp8(*quantise(weight, TILE, TILE, power_of_two=power_of_two))
    parts = [quantise(matrix, TILE, TILE, power_of_two=power_of_two) for matrix in weight]
    return Fp8(torch.stack([v for v, _ in parts]), torch.stack([s for _, s in parts]))


def turn(tiles: Fp8) -> Fp8:
    """Block tiles of the transposed matrix, contiguous."""
    return Fp8(*(part.contiguous() for part in tiles.transposed()))


def spread(tiles: Fp8, row_AK: Tensor, rows: int) -> Fp8:
    """Row tiles of tokens, copied to the rows of their copies; rows of none are zeros."""
    parts = []
    for part in tiles:
        source = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
        out = source.new_zeros(rows, source.shape[1])
        for row_A in row_AK.unbind(1):
            here = row_A >= 0
            out[row_A[here]] = source[here]
        parts.append(out.view(part.dtype))
    return Fp8(*parts)


def padded_rows(rows: int, experts: int) -> int:
    """P: a multiple of 128 that holds every expert's rows padded, however they are divided."""
    return (-(-rows // TILE) if experts == 1 else rows // TILE + experts) * TILE


def quantise_columns(x_RI: Tensor, ends_E: Tensor | None, *, power_of_two: bool) -> Fp8:
    """Column tiles of the rows; no tile holds rows of two experts."""
    padded_PI = _pad_experts(x_RI.float(), ends_E)
    return Fp8(*quantise(padded_PI.T, 1, TILE, power_of_two=power_of_two))


def retile(rows: Fp8, ends_E: Tensor | None, *, power_of_two: bool) -> Fp8:
    """Row tiles to column tiles: dequantise, transpose, quantise again."""
    x_RI = dequantise(rows.values, rows.scale, 1, TILE, dtype=torch.float32)
    return quantise_columns(x_RI, ends_E, power_of_two=power_of_two)


def linear(x: Fp8, weight: Fp8, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """`x W^T` of row tiles with block tiles; rows past `ends_E[-1]` are zeros."""
    if ends_E is None:
        return _product(x, _by_rows(weight)).to(dtype)
    out_RO = x.values.new_zeros(x.values.shape[0], weight.values.shape[1], dtype=dtype)
    for expert, (start, end) in _spans(ends_E):
        rows = Fp8(x.values[start:end], x.scale[start:end])
        own = _by_rows(Fp8(weight.values[expert], weight.scale[expert]))
        out_RO[start:end] = _product(rows, own).to(dtype)
    return out_RO


def weight_gradient(dy: Fp8, x: Fp8, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """`dy^T x` of column tiles: [O, I], or [E, O, I] with zeros for an expert without rows."""
    if ends_E is None:
        return _product(dy, x).to(dtype)
    out_EOI = dy.scale.new_zeros(ends_E.shape[0], dy.values.shape[0], x.values.shape[0], dtype=dtype)
    first = 0
    for expert, (start, end) in _spans(ends_E):
        last = first - (start - end) // TILE
        tiles = [_columns(operand, first, last) for operand in (dy, x)]
        out_EOI[expert] = _product(*tiles).to(dtype)
        first = last
    return out_EOI


def add_weight_gradient(
    into: Tensor, dy: Fp8, x: Fp8, ends_E: Tensor | None, *, fresh: bool, squares: bool = False
) -> Tensor | None:
    """`into += dy^T x` in float32; with `fresh`, `into = dy^T x`."""
    gradient = weight_gradient(dy, x, ends_E, dtype=into.dtype)
    into.copy_(gradient if fresh else into + gradient)
    return squares_of(into) if squares else None


def _product(a: Fp8, b: Fp8) -> Tensor:
    """`a b^T` of [M, K] and [N, K], both with a scale per row and chunk of K."""
    acc_MN = a.scale.new_zeros(a.values.shape[0], b.values.shape[0])
    for chunk in range(a.scale.shape[1]):
        inner = slice(chunk * TILE, (chunk + 1) * TILE)
        part_MN = a.values[:, inner].float() @ b.values[:, inner].float().T
        acc_MN += part_MN * (a.scale[:, chunk, None] * b.scale[None, :, chunk])
    return acc_MN


def _by_rows(weight: Fp8) -> Fp8:
    """A block's scale repeated for each of its rows."""
    rows = weight.values.shape[0]
    return Fp8(weight.values, weight.scale.repeat_interleave(TILE, dim=0)[:rows])


def _columns(operand: Fp8, first: int, last: int) -> Fp8:
    """Tiles `first` to `last` of the inner dimension."""
    return Fp8(operand.values[:, first * TILE : last * TILE], operand.scale[:, first:last])


def _pad_experts(x_RI: Tensor, ends_E: Tensor | None) -> Tensor:
    """Each expert's rows followed by zeros up to a multiple of 128: `[P, I]`."""
    rows = x_RI.shape[0]
    if ends_E is None:
        return F.pad(x_RI, (0, 0, 0, padded_rows(rows, 1) - rows))
    padded_PI = x_RI.new_zeros(padded_rows(rows, ends_E.shape[0]), x_RI.shape[1])
    first = 0
    for _, (start, end) in _spans(ends_E):
        padded_PI[first : first + end - start] = x_RI[start:end]
        first += -(-(end - start) // TILE) * TILE
    return padded_PI


def _spans(ends_E: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Experts that have rows, each with the span of its rows."""
    found, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            found.append((expert, (start, end)))
        start = end
    return found
