# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What Gluon kernels share that cut squares of 128 x 128 into E4M3 both ways, some rows at a time.

A thread has four rows of eight columns of a part. How many rows that makes is its layout's, which functions
ask the tensors for: kernels of four and of eight warps have parts of 32 and of 64 rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from benthic.kernels.gluon_tiles import meet
from benthic.kernels.triton_e4m3 import quotient

TILE = gl.constexpr(128)
STAGED = gl.constexpr(gl.SwizzledSharedLayout(4, 8, 8, [1, 0]))
"""Words of four values, 32 of each column."""
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def clear_from(square, kept, PARTS: gl.constexpr, PART: gl.constexpr):
    """Zero the rows of a square from `kept` on."""
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, PARTS))
    for first in gl.static_range(0, TILE, PART):
        part = square.slice(first, PART)
        value = part.load(PARTS)
        part.store(gl.where((row < kept - first)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    meet()


@gluon.jit
def wide(x):
    """Numbers of 16 bits in float32."""
    if x.dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = x.to(gl.float32)
    return x


@gluon.jit
def words_of(x, by, inverse):
    """Words of four rows in E4M3: [rows / 4, columns]."""
    return packed(quotient(x, by[None, :], inverse[None, :]))


@gluon.jit
def packed(x):
    """Float32 values as words of four rows in E4M3: [rows / 4, columns]."""
    even, odd = gl.split(x.reshape([x.shape[0] // 4, 2, 2, TILE]).permute((0, 3, 1, 2)))
    x_0, x_2 = gl.split(even)
    x_1, x_3 = gl.split(odd)
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [x_0, x_1, x_2, x_3], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def larger(a, b):
    """Whichever of two 16-bit numbers has the larger magnitude, with some sign; two at a time."""
    if a.dtype == gl.bfloat16:
        INSTRUCTION: gl.constexpr = "max.xorsign.abs.bf16x2 $0, $1, $2;"
    else:
        INSTRUCTION: gl.constexpr = "max.xorsign.abs.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(INSTRUCTION, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)


@gluon.jit
def largest_of_rows(x):
    """The largest magnitude of each row of a part in 16 bits."""
    AT: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    a, b = gl.split(x.reshape([x.shape[0], TILE // 8, 2, 4]).permute((0, 1, 3, 2)))
    a, b = gl.split(larger(a, b).reshape([x.shape[0], TILE // 8, 2, 2]).permute((0, 1, 3, 2)))
    found = gl.abs(larger(a, b).to(gl.float32)).reshape([x.shape[0], TILE // 4])
    return gl.convert_layout(gl.max(found, axis=1), AT)


@gluon.jit
def largest_of_fours(x):
    """Of each four rows of a part in 16 bits, which a thread has, the number of largest magnitude."""
    a, b = gl.split(x.reshape([x.shape[0] // 4, 2, 2, TILE]).permute((0, 2, 3, 1)))
    a, b = gl.split(larger(a, b).permute((0, 2, 1)))
    return larger(a, b)


@gluon.jit
def largest_of_columns(fours, LINE: gl.constexpr):
    """The largest magnitude of each column of what `largest_of_fours` gives."""
    found = gl.abs(fours.to(gl.float32)).reshape([fours.shape[0], TILE])
    return gl.convert_layout(gl.max(found, axis=0), LINE)


@gluon.jit
def store_row_values(x, by, inverse, values_ptr, first: gl.constexpr, columns, height, width):
    """Values of a part, whose rows have scales `by`, of a square with `height` rows and `width` columns."""
    values = quotient(x, by[:, None], inverse[:, None]).to(gl.float8e4nv)
    row = first + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, x.type.layout))
    place = (row * columns)[:, None] + column[None, :]
    gl.store(values_ptr + place, values, mask=(row < height)[:, None] & (column < width)[None, :])
