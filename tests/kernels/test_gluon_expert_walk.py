"""How programs of experts' weight gradients divide tiles: the kernel's own functions, run by Python."""

from __future__ import annotations

import importlib.util

import pytest
from gluon_threads import Numbers, gluon_language
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_expert_gradient as kernel


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gl", gluon_language())
    for name in ("LEFT", "RIGHT", "BAND"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name).value)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 140))
def test_every_tile_of_every_expert_is_summed_once(experts, left_dim, right_dim, programs) -> None:
    left_tiles, right_tiles = -(-left_dim // 128), -(-right_dim // 256)
    tiles = experts * left_tiles * right_tiles
    seen = [
        kernel._corner.fn(tile, left_tiles, right_tiles)
        for program in range(min(programs, tiles))
        for tile in range(program, tiles, min(programs, tiles))
    ]
    expected = {
        (expert, left, right)
        for expert in range(experts)
        for left in range(0, left_dim, 128)
        for right in range(0, right_dim, 256)
    }
    assert len(seen) == tiles
    assert set(seen) == expected


@pytest.mark.parametrize("number", range(0, 22 * 8 - 16, 16))
def test_tiles_of_a_moment_share_their_columns(number) -> None:
    corners = [kernel._corner.fn(tile, 22, 8) for tile in range(number, number + 16)]
    assert len({left for _, left, _ in corners}) <= 22
    assert len({right for *_, right in corners}) <= 4


def test_an_expert_owns_the_rows_from_the_end_of_the_one_before() -> None:
    ends = Numbers([0, 20, 20, 60])
    found = [kernel._rows_of.fn(ends, expert) for expert in range(4)]
    assert found == [(0, 0), (0, 20), (20, 20), (20, 60)]
