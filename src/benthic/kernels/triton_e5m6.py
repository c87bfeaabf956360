"""Triton kernels of E5M6: eight values are three 32-bit words, or two are three bytes where rows are odd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.reference.e5m6 import E5M6_MAX, MIN_AMAX, TILE

_ROWS = 16


@triton.jit
def _quantise(
    x_ptr, packed_ptr, scale_ptr, rows, columns, tiles, row_units, stride,
    MAX: tl.constexpr, FLOOR: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One 1 x TILE tile of each of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = row < rows
    mask = kept[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), FLOOR)
    quotient = tl.div_rn(amax, MAX + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    exponent = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0).to(tl.int32)  # of the next power of two
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    pair = _pairs(_code(x * inverse[:, None]), ROWS, TILE)
    if WORDS:
        _store_words(packed_ptr, pair, row, kept, row_units, ROWS, TILE)
    else:
        _store_bytes(packed_ptr, pair, row, kept, row_units, TILE)
    tl.store(scale_ptr + row * tiles + tl.program_id(1), scale, mask=kept)


@triton.jit
def _code(y):
    """The 12 bits of the nearest value: sign, exponent, mantissa; ties to the even mantissa."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 17 of 23 mantissa bits go; a carry runs into the exponent, whose bias falls from 127 to 15
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - (112 << 6)
    # below 2^-14 in steps of 2^-20: adding 2^23 rounds to an integer and leaves it in the low bits
    shifted = magnitude.to(tl.float32, bitcast=True) * 1048576.0 + 8388608.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.minimum(tl.where(magnitude < (113 << 23), subnormal, normal), 1983)  # 1983: the largest value
    return code | (((bits >> 31) & 1) << 11)


@triton.jit
def _pairs(code, ROWS: tl.constexpr, TILE: tl.constexpr):
    even, odd = tl.split(tl.reshape(code, [ROWS, TILE // 2, 2]))
    return even | (odd << 12)


@triton.jit
def _store_words(packed_ptr, pair, row, kept, row_words, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Four pairs of 24 bits are three words."""
    evens, odds = tl.split(tl.reshape(pair, [ROWS, TILE // 8, 2, 2]))
    pair_0, pair_2 = tl.split(evens)
    pair_1, pair_3 = tl.split(odds)
    word = (tl.program_id(1) * (TILE // 8) + tl.arange(0, TILE // 8)) * 3
    at = packed_ptr + row[:, None] * row_words + word[None, :]
    mask = kept[:, None] & (word < row_words)[None, :]
    tl.store(at, pair_0 | (pair_1 << 24), mask=mask)
    tl.store(at + 1, (pair_1 >> 8) | (pair_2 << 16), mask=mask)
    tl.store(at + 2, (pair_2 >> 16) | (pair_3 << 8), mask=mask)


@triton.jit
def _store_bytes(packed_ptr, pair, row, kept, row_bytes, TILE: tl.constexpr):
    byte = (tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)) * 3
    at = packed_ptr + row[:, None] * row_bytes + byte[None, :]
    mask = kept[:, None] & (byte < row_bytes)[None, :]
    tl.store(at, (pair & 0xFF).to(tl.uint8), mask=mask)
    tl.store(at + 1, ((pair >> 8) & 0xFF).to(tl.uint8), mask=mask)
    tl.store(at + 2, (pair >> 16).to(tl.uint8), mask=mask)


@triton.jit
def _dequantise(
    packed_ptr, scale_ptr, out_ptr, rows, columns, tiles, row_units,
    WORDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = row < rows
    if WORDS:
        pair = _load_words(packed_ptr, row, kept, row_units, ROWS, TILE)
    else:
        pair = _load_bytes(packed_ptr, row, kept, row_units, TILE)
    code = tl.reshape(tl.join(pair & 0xFFF, (pair >> 12) & 0xFFF), [ROWS, TILE])
    magnitude = code & 0x7FF
    normal = ((magnitude + (112 << 6)) << 17).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 64, magnitude.to(tl.float32) * 9.5367431640625e-07, normal)  # 2^-20
    sign = (code & 0x800) << 20  # set as a bit: Triton's minus is 0 - value, which loses the sign of zeros
    value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    scale = tl.load(scale_ptr + row * tiles + tl.program_id(1), mask=kept, other=0.0)
    mask = kept[:, None] & (column < columns)[None, :]
    out = (value * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], out, mask=mask)


@triton.jit
def _load_words(packed_ptr, row, kept, row_words, ROWS: tl.constexpr, TILE: tl.constexpr):
    word = (tl.program_id(1) * (TILE // 8) + tl.arange(0, TILE // 8)) * 3
    at = packed_ptr + row[:, None] * row_words + word[None, :]
    mask = kept[:, None] & (word < row_words)[None, :]
    word_0 = tl.load(at, mask=mask, other=0)
    word_1 = tl.load(at + 1, mask=mask, other=0)
    word_2 = tl.load(at + 2, mask=mask, other=0)
    pair_0 = word_0 & 0xFFFFFF
    pair_1 = ((word_0 >> 24) & 0xFF) | ((word_1 & 0xFFFF) << 8)
    pair_2 = ((word_1 >> 16) & 0xFFFF) | ((word_2 & 0xFF) << 16)
    pair_3 = (word_2 >> 8) & 0xFFFFFF
    both = tl.join(tl.join(pair_0, pair_2), tl.join(pair_1, pair_3))
    return tl.reshape(both, [ROWS, TILE // 2])


@triton.jit
def _load_bytes(packed_ptr, row, kept, row_bytes, TILE: tl.constexpr):
    byte = (tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)) * 3
    at = packed_ptr + row[:, None] * row_bytes + byte[None, :]
    mask = kept[:, None] & (byte < row_bytes)[None, :]
    low = tl.load(at, mask=mask, other=0).to(tl.int32)
    middle = tl.load(at + 1, mask=mask, other=0).to(tl.int32)
    high = tl.load(at + 2, mask=mask, other=0).to(tl.int32)
    return low | (middle << 8) | (high << 16)


def quantise(x_TD):
    """See `benthic.kernels.ops.quantise_e5m6`."""
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    rows, width = x_TD.shape
    tiles = cdiv(width, TILE)
    packed = torch.empty(rows, 3 * cdiv(width, 2), dtype=torch.uint8, device=x_TD.device)
    scale = torch.empty(rows, tiles, dtype=torch.float32, device=x_TD.device)
    units = _units(packed, width)
    if packed.numel():
        _quantise[(cdiv(rows, _ROWS), tiles)](
            x_TD, units, scale, rows, width, tiles, units.shape[1], x_TD.stride(0),
            MAX=E5M6_MAX, FLOOR=MIN_AMAX, WORDS=units.dtype == torch.int32, ROWS=_ROWS, TILE=TILE,
        )  # fmt: skip
    return packed, scale


def dequantise(packed, scale_Ta, width, *, dtype):
    """See `benthic.kernels.ops.dequantise_e5m6`."""
    packed, scale_Ta = packed.contiguous(), scale_Ta.contiguous()
    rows, tiles = scale_Ta.shape
    out = torch.empty(rows, width, dtype=dtype, device=packed.device)
    units = _units(packed, width)
    if out.numel():
        _dequantise[(cdiv(rows, _ROWS), tiles)](
            units, scale_Ta, out, rows, width, tiles, units.shape[1],
            WORDS=units.dtype == torch.int32, ROWS=_ROWS, TILE=TILE,
        )  # fmt: skip
    return out


def _units(packed, width):
    """The bytes as words, where every row is whole words and starts at one."""
    whole = width % 8 == 0 and packed.data_ptr() % 4 == 0
    return packed.view(torch.int32) if whole and packed.numel() else packed
