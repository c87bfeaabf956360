# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Matrices of bytes turned round in one pass: words of four go through, and are cut and put together anew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.reference.fp8_linear import Fp8
from benthic.kernels.relaunch import remembered

_SIDE = 32


@remembered
@triton.jit
def _turn_bytes(
    from_ptr, to_ptr, row_words, column_words,
    SIDE: tl.constexpr,
):  # fmt: skip
    """Words [4 column_words, row_words] of one matrix to words [4 row_words, column_words], SIDE^2 groups."""
    matrix = tl.program_id(2).to(tl.int64) * row_words * column_words * 4
    word = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    group = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (group < column_words)[:, None] & (word < row_words)[None, :]
    first = from_ptr + matrix + (4 * group.to(tl.int64) * row_words)[:, None] + word[None, :]
    a = tl.load(first, mask=mask, other=0)
    b = tl.load(first + row_words, mask=mask, other=0)
    c = tl.load(first + 2 * row_words, mask=mask, other=0)
    d = tl.load(first + 3 * row_words, mask=mask, other=0)
    to = to_ptr + matrix + (4 * word.to(tl.int64) * column_words)[None, :] + group[:, None]
    for byte in tl.static_range(4):
        low = ((a >> 8 * byte) & 255) | (((b >> 8 * byte) & 255) << 8)
        high = ((c >> 8 * byte) & 255) | (((d >> 8 * byte) & 255) << 8)
        tl.store(to + byte * column_words, low | (high << 16), mask=mask)


def turn_fp8(tiles):
    """See `benthic.kernels.ops.turn_fp8`."""
    *matrices, outer, inner = tiles.values.shape
    turned = torch.empty(*matrices, inner, outer, dtype=tiles.values.dtype, device=tiles.values.device)
    if turned.numel():
        count, rows, columns = turned.numel() // (outer * inner), inner // 4, outer // 4
        _turn_bytes[(cdiv(rows, _SIDE), cdiv(columns, _SIDE), count)](
            tiles.values.contiguous().view(torch.int32), turned.view(torch.int32), rows, columns,
            SIDE=_SIDE, num_warps=4,
        )  # fmt: skip
    return Fp8(turned, tiles.scale.transpose(-1, -2).contiguous())
