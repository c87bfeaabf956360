"""Whole and divided tiles of FP8 products in Gluon: what is divided, and the kernel run by Python.

In Python layouts are left out; loads, barriers, what a program multiplies and hands over are not.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gluon_threads import Described, Pointer, each_program, gluon_language, in_python, load, take
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import fp8_waves, gluon_fp8_tiles
from benthic.kernels import gluon_fp8 as module
from benthic.kernels.host import cdiv
from benthic.kernels.ops.fp8_linear import FP8_LINEAR
from benthic.kernels.table import Case

DEEPSEEK_V3 = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
TAILS = {
    4096: [(132, 94), (3960, 13), (5472, 0), (1056, 156), (528, 75), (1056, 20)],
    2048: [(0, 75), (1848, 19), (2736, 0), (396, 206), (132, 94), (396, 26)],
}
"""Whole tiles and a program's chunks of the others."""


@pytest.mark.parametrize("rows", TAILS)
def test_last_waves_of_deepseek_v3_are_divided_over_an_h200(rows):
    assert [
        fp8_waves.tail(cdiv(rows, 128) * cdiv(n_dim, 192), cdiv(k_dim, 128), 132)
        for n_dim, k_dim in DEEPSEEK_V3
    ] == TAILS[rows]


@pytest.mark.parametrize(
    ("rows", "right"),
    [
        (4096, ["gluon", "gluon_three", "gluon_three", "cublas", "cublas", "cublas"]),
        (2048, ["gluon", "gluon_three", "gluon_three", "cublas", "cublas", "cublas"]),
        (1024, ["gluon_three", "cublas", "gluon_three", "cublas", "cublas", "cublas"]),
        (512, ["cublas", "cublas", "gluon_three", "cublas", "cublas", "cublas"]),
    ],
)
def test_products_with_short_sums_or_half_a_last_wave_are_ours(rows, right):
    assert [fp8_waves.fastest(rows, n_dim, k_dim, 132) for n_dim, k_dim in DEEPSEEK_V3] == right


@pytest.mark.parametrize(
    ("inner", "fastest", "chosen"),
    [
        (7168, "gluon", "gluon"),
        (7168, "gluon_three", "gluon_three"),
        (7168, "cublas", "cublas"),
        (7120, "cublas", "gluon"),
    ],
)
def test_cublas_runs_what_ours_is_slower_at_and_what_it_can(inner, fastest, chosen):
    case = Case("cuda", torch.bfloat16, (inner, 2112), many=True, fastest=fastest)
    assert FP8_LINEAR.select(case)[0].name == chosen


@given(st.integers(1, 900), st.integers(1, 200), st.integers(1, 140))
def test_pieces_of_all_programs_are_all_chunks_and_a_begun_tile_is_the_next_programs_last(
    tiles, k_tiles, processors
):
    whole, share = fp8_waves.tail(tiles, k_tiles, processors)
    programs = min(tiles, processors)
    seen = {tile: [] for tile in range(tiles)}
    for program in range(programs):
        pieces = list(pieces_of(program, programs, k_tiles, tiles, whole, share))
        for tile, first, last in pieces:
            assert 0 <= first < last <= k_tiles
            seen[tile].append((first, last, program))
        of_tail = [piece for piece in pieces if piece[0] >= whole]
        assert all(last == k_tiles for _, _, last in of_tail[1:])  # only its first is gone on with
        assert all(first == 0 for _, first, _ in of_tail[:-1])  # and only its last is begun by another
        assert sum(last - first for _, first, last in of_tail) <= share
    for parts in seen.values():
        if len(parts) == 1:
            assert parts[0][:2] == (0, k_tiles)
        else:
            (_, ahead, one), (behind, _, other) = sorted(parts)
            assert (ahead, one) == (behind, other - 1)
    if share:
        assert whole % processors == 0
        assert whole // processors * k_tiles + share + fp8_waves.HAND_OVER < cdiv(tiles, processors) * k_tiles


def pieces_of(program, programs, k_tiles, tiles, whole, share):
    """The kernel's own function until it is behind the last tile."""
    language = gluon_language(program_id=lambda _: program, num_programs=lambda _: programs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gl", language)
        for step in range(tiles + 1):
            piece = module._piece.fn(step, k_tiles, tiles, whole, share, share > 0)
            if piece[0] >= tiles:
                return
            yield piece


class Scalar(int):
    """A number as a kernel has it."""

    def to(self, _dtype):
        return self


def of_scalars(name):
    def operator(self, other):
        result = getattr(int, name)(self, other)
        return result if result is NotImplemented else Scalar(result)

    return operator


for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):
    setattr(Scalar, f"__{name}__", of_scalars(f"__{name}__"))


def of_two(function, of_tensors):
    """Of numbers, or of a tensor and a number."""
    return lambda left, right: (
        of_tensors(left, torch.tensor(right))
        if isinstance(left, torch.Tensor)
        else Scalar(function(left, right))
    )


def number(pointer, *, mask=True, other=None):
    found = take(pointer, mask=mask, other=other)
    return Scalar(found) if isinstance(found, int) else found


def raised(pointer, by, *, sem, scope):
    assert (sem, scope) == ("release" if by else "acquire", "gpu")
    before = int(pointer.data[pointer.at])
    pointer.data[pointer.at] += by
    return before


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(
        load=number,
        atomic_add=raised,
        minimum=of_two(min, torch.minimum),
        maximum=of_two(max, torch.maximum),
    )

    def product(x, weight, zero, *, use_acc, is_async):
        assert (use_acc, is_async) == (False, True)
        return zero + x.data @ weight.data

    in_python(monkeypatch, (module, gluon_fp8_tiles), gl=found, load=load, warpgroup_mma=product)
    return found


def made(count, rows, n_dim, k_dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k_dim, generator=generator)
    weight = torch.randn(count * n_dim, k_dim, generator=generator)
    x_scale = torch.rand(rows, cdiv(k_dim, 128), generator=generator)
    return x, weight, x_scale, torch.rand(count, cdiv(n_dim, 128), cdiv(k_dim, 128), generator=generator)


def run(language, operands, ends, programs, whole, share):
    """Program after program, as one waits for none but the one before it."""
    x, weight, x_scale, weight_scale = operands
    (rows, k_dim), experts = x.shape, weight_scale.shape[0]
    n_dim = len(weight) // experts
    out = Pointer(torch.full((rows, n_dim), torch.nan))
    parts, n_tiles = Pointer(torch.full((2 * programs * 64 * 192,), torch.nan)), cdiv(n_dim, 192)
    for _ in each_program(language, programs, Scalar):
        module._rows_times_blocks(
            Described(x, 64, 128), Described(weight, 128, 128), Described(weight, 64, 128), Pointer(x_scale),
            Pointer(weight_scale), out, parts, Pointer(ends), rows, experts, n_dim, cdiv(k_dim, 128), n_tiles,
            cdiv(rows, 128) * n_tiles, whole, share, weight_scale.shape[1], *x_scale.stride(),
            OUT_LAYOUT=None, TOGETHER=4, TAIL=share > 0, REGISTERS=0, FEW_REGISTERS=0,
        )  # fmt: skip
    assert (out.written == 1).all()
    assert parts.written.max() <= 1
    return out.data.view(rows, n_dim)


def exact(operands, sizes):
    x, weight, x_scale, weight_scale = operands
    wide = x * x_scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    weights = weight.view(weight_scale.shape[0], -1, x.shape[1])
    scales = weight_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = weights * scales[:, : weights.shape[1], : weights.shape[2]]
    outs = [part @ weight.T for part, weight in zip(wide.split(sizes), weights, strict=True)]
    return torch.cat(outs)


@pytest.mark.parametrize(("rows", "n_dim", "k_dim"), [(300, 200, 600), (384, 192, 640), (130, 580, 900)])
@pytest.mark.parametrize("programs", [2, 4])
def test_divided_tiles_have_the_bits_of_whole_ones(language, rows, n_dim, k_dim, programs):
    operands, k_tiles = made(1, rows, n_dim, k_dim), cdiv(k_dim, 128)
    tiles = cdiv(rows, 128) * cdiv(n_dim, 192)
    whole = run(language, operands, torch.tensor([rows]), programs, tiles, 0)
    torch.testing.assert_close(whole, exact(operands, [rows]), rtol=1e-4, atol=1e-3)
    for first in range(0, tiles - programs + 1, programs):
        share = cdiv((tiles - first) * k_tiles, programs)
        flags = torch.full((1 + 2 * programs,), rows)
        assert torch.equal(run(language, operands, flags, programs, first, share), whole)
        handed = [program for program in range(1, programs) if program * share % k_tiles]
        assert flags.tolist().count(rows + 1) == 2 * len(
            [program for program in handed if program * share < (tiles - first) * k_tiles]
        )


@pytest.mark.parametrize("sizes", [(300, 0, 129, 1), (128, 256)])
@pytest.mark.parametrize("n_dim", [260, 580])
def test_rows_meet_their_own_experts(language, sizes, n_dim):
    operands = made(len(sizes), sum(sizes), n_dim, 300)
    out = run(language, operands, torch.tensor(sizes).cumsum(0), 3, 0, 0)
    torch.testing.assert_close(out, exact(operands, sizes), rtol=1e-4, atol=1e-3)
