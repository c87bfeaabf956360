"""How programs of products in Gluon divide tiles: the kernels' own functions, run by Python."""

from __future__ import annotations

import importlib.util

import pytest
from gluon_threads import Numbers, gluon_language
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import (
    gluon_fp8,
    gluon_fp8_three,
    gluon_fp8_three_gradient,
    gluon_fp8_tiles,
    gluon_grouped,
)

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=9)
MODULES = (gluon_fp8, gluon_fp8_three, gluon_fp8_three_gradient, gluon_fp8_tiles, gluon_grouped)
SHARED = ("expert_of", "corner", "chunks_of", "end_of")


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    language = gluon_language()
    for module in MODULES:
        monkeypatch.setattr(module, "gl", language)
        for name, constant in vars(module).copy().items():
            if name.isupper() and hasattr(constant, "value"):
                monkeypatch.setattr(module, name, constant.value)
            elif name in SHARED:
                monkeypatch.setattr(module, name, constant.fn)


def ends_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def found(module, tile, place, ends, rows, n_tiles):
    """The place to go on from, and expert, first row, end and first column of a tile."""
    experts = len(ends)
    place, at = module._find.fn(tile, place, Numbers(ends), rows, experts, n_tiles)
    if module is gluon_fp8:  # 128 columns of one scale, and 64 before or behind them
        wide, narrow = at[3:]
        assert wide % 128 == 0
        assert narrow in (wide - 64, wide + 128)
        at = (*at[:3], min(wide, narrow))
    return place, at


@pytest.mark.parametrize(
    ("module", "tall", "wide"),
    [(gluon_fp8, 128, 192), (gluon_fp8_three, 192, 128), (gluon_grouped, 256, 128)],
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(0, 700), st.integers(1, 1500), st.integers(1, 140))
def test_every_row_and_column_is_written_once_by_its_own_expert(
    module, tall, wide, sizes, spare, n_dim, programs
) -> None:
    ends, experts = ends_of(sizes), len(sizes)
    rows, n_tiles = ends[-1] + spare, -(-n_dim // wide)
    programs = min(programs, (rows // tall + experts + 1) * n_tiles)
    seen: dict[tuple[int, int], int] = {}
    for program in range(programs):
        place, at = found(module, program, (0, 0, 0, ends[0]), ends, rows, n_tiles)
        tile = program
        while at[0] <= experts:
            expert, row, end, column = at
            for start in range(row, min(row + tall, end)):
                seen[start, column] = seen.get((start, column), 0) + 1
                assert ([*ends, rows][expert - 1] if expert else 0) <= start < [*ends, rows][expert]
            tile += programs
            place, at = found(module, tile, place, ends, rows, n_tiles)
        assert min(at) >= 0  # behind the last tile too: its scales are looked for
    assert len(seen) == rows * n_tiles
    assert set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(1, 3000), st.integers(1, 900), st.integers(1, 140))
def test_every_tile_of_a_weight_sums_the_chunks_of_its_expert(sizes, o_dim, i_dim, programs) -> None:
    module, tall, wide = gluon_fp8_three_gradient, 192, 128
    ends, experts = ends_of(sizes), len(sizes)
    o_tiles, i_tiles = -(-o_dim // tall), -(-i_dim // wide)
    chunks = [-(-size // 128) for size in sizes]
    tiles, seen = experts * o_tiles * i_tiles, set()
    for program in range(min(programs, tiles)):
        place = (0, 0, 0, ends[0])
        for tile in range(program, tiles, min(programs, tiles)):
            expert, row, column = module._corner.fn(tile, o_dim, o_tiles, i_tiles)
            place, count = module.chunks_of(expert, place, Numbers(ends))
            assert (place[1], count) == (sum(chunks[:expert]), chunks[expert])
            seen.add((expert, row, column))
    assert len(seen) == tiles
    assert {row for _, row, _ in seen} == set(range(0, o_dim, tall))
    assert {column for *_, column in seen} == set(range(0, i_dim, wide))
