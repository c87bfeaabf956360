"""How programs of FP8 products divide tiles among themselves: the kernels' own functions, run by Python."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_fp8, gluon_fp8_gradient

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=9)


class Pointer(NamedTuple):
    """Some numbers and a place among them."""

    numbers: list[int]
    at: int = 0

    def __add__(self, more: int) -> Pointer:
        return Pointer(self.numbers, self.at + more)


def load(pointer: Pointer, mask: int = 1, other: int | None = None) -> int | None:
    return pointer.numbers[pointer.at] if mask else other


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    language = SimpleNamespace(load=load, minimum=min)
    for module in (gluon_fp8, gluon_fp8_gradient):
        monkeypatch.setattr(module, "gl", language)
        for name in ("ROWS", "COLUMNS", "BAND", "CHUNK"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(getattr(module, name), "value", None))


def ends_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 700), st.integers(1, 1500), st.integers(1, 140))
def test_every_row_and_column_is_written_once_by_its_own_expert(sizes, spare, n_dim, programs) -> None:
    ends, experts = ends_of(sizes), len(sizes)
    rows, n_tiles = ends[-1] + spare, -(-n_dim // gluon_fp8.COLUMNS)
    most_tiles = (rows // gluon_fp8.ROWS + experts + 1) * n_tiles
    seen: dict[tuple[int, int], int] = {}
    for program in range(min(programs, most_tiles)):
        place = (0, 0, 0, ends[0])
        tile = program
        place = gluon_fp8._expert_of.fn(tile, place, Pointer(ends), rows, experts, n_tiles)
        while place[0] <= experts:
            row, column = gluon_fp8._corner.fn(tile, place[1], place[2], place[3], n_tiles)
            for start in range(row, min(row + gluon_fp8.ROWS, place[3])):
                seen[start, column] = seen.get((start, column), 0) + 1
                assert ([*ends, rows][place[0] - 1] if place[0] else 0) <= start < [*ends, rows][place[0]]
            tile += min(programs, most_tiles)
            place = gluon_fp8._expert_of.fn(tile, place, Pointer(ends), rows, experts, n_tiles)
    assert len(seen) == rows * n_tiles
    assert set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 900), st.integers(1, 900), st.integers(1, 140))
def test_every_tile_of_a_weight_sums_the_chunks_of_its_expert(sizes, o_dim, i_dim, programs) -> None:
    ends, experts = ends_of(sizes), len(sizes)
    o_tiles, i_tiles = -(-o_dim // gluon_fp8_gradient.ROWS), -(-i_dim // gluon_fp8_gradient.COLUMNS)
    chunks = [-(-size // 128) for size in sizes]
    tiles, seen = experts * o_tiles * i_tiles, set()
    for program in range(min(programs, tiles)):
        place = (0, 0, 0, ends[0])
        for tile in range(program, tiles, min(programs, tiles)):
            expert, row, column = gluon_fp8_gradient._corner.fn(tile, o_tiles, i_tiles)
            place, count = gluon_fp8_gradient._chunks_of.fn(expert, place, Pointer(ends))
            assert (place[1], count) == (sum(chunks[:expert]), chunks[expert])
            seen.add((expert, row, column))
    assert len(seen) == tiles
    assert {row for _, row, _ in seen} == set(range(0, o_dim, 128))
    assert {column for *_, column in seen} == set(range(0, i_dim, 128))
