"""How pages of contexts are cut into shares: the kernels' own function, run by Python."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import gluon_mla_shares as module

LEAST, MANY = module.LEAST_PAGES, 1024
CONTEXTS = st.one_of(
    st.lists(st.integers(0, 9000), min_size=1, max_size=40),
    st.lists(st.integers(4000, 4200), min_size=1, max_size=300),
    st.lists(st.integers(0, 200), min_size=500, max_size=600),
    st.builds(lambda context, count: [context] * count, st.integers(0, 5000), st.integers(1, 300)),
)


class Pointer(list):
    """Numbers; a sum with places is what lies there, and zeros behind the last."""

    def __add__(self, places):
        return np.array([*self, *[0] * (MANY + 1 - len(self))])[places]


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    language = SimpleNamespace(
        BlockedLayout=lambda *_: None,
        SliceLayout=lambda *_: None,
        arange=lambda start, end, layout: np.arange(start, end),
        load=lambda found, mask=True, other=0: np.where(mask, found, other),
        associative_scan=lambda x, axis, add: np.cumsum(x, axis),
        sum=lambda x, axis: x.sum(axis),
        max=lambda x, axis: x.max(axis),
        where=np.where,
        maximum=np.maximum,
        minimum=np.minimum,
    )
    monkeypatch.setattr(module, "gl", language)
    for name in ("PAGE", "SLACK", "MOST_A_WARP"):
        monkeypatch.setattr(module, name, getattr(module, name).value)
    for name in ("pages_of", "begins_and_ends"):
        monkeypatch.setattr(module, name, getattr(module, name).fn)


def shares_of(contexts: list[int], shares: int) -> list[list[tuple[int, int, int]]]:
    """Of each share its `(sequence, first page, pages)`, as the kernels walk over it."""
    found, pointer = [], Pointer(contexts)
    many = max(128, 2 ** (len(contexts) - 1).bit_length())
    for number in range(shares):
        sequence, page, left = module.share_of.fn(pointer, len(contexts), number, shares, LEAST, many)
        parts = []
        while left > 0:
            _context, pages = module.pages_of(pointer, sequence, page, left)
            if pages > 0:
                parts.append((int(sequence), int(page), int(pages)))
            sequence, page, left = sequence + 1, 0, left - pages
        found.append(parts)
    return found


def pages_in(share: list[tuple[int, int, int]]) -> int:
    return sum(pages for *_, pages in share)


def cuts(contexts: list[int], found: list[list[tuple[int, int, int]]]) -> int:
    return sum(map(len, found)) - sum(context > 0 for context in contexts)


def equal_length(contexts: list[int], shares: int) -> int:
    return max(-(-sum(-(-context // 64) for context in contexts) // shares), LEAST)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONTEXTS, st.integers(1, 140))
def test_every_page_lies_in_one_share_and_none_is_much_longer_than_equal_ones(contexts, shares) -> None:
    found = shares_of(contexts, shares)
    seen = [(sequence, at) for share in found for sequence, page, n in share for at in range(page, page + n)]
    expected = [(i, page) for i, context in enumerate(contexts) for page in range(-(-context // 64))]
    assert seen == expected
    length = equal_length(contexts, shares)
    assert max(map(pages_in, found)) <= length + length // 16
    # What `combine` counts on: parts of a sequence lie in adjacent shares, two places a share suffice.
    owners: dict[int, list[int]] = {}
    for number, share in enumerate(found):
        cut = []
        for sequence, page, n in share:
            owners.setdefault(sequence, []).append(number)
            begins, ends = module.begins_and_ends(contexts[sequence], page, n)
            cut += [] if begins and ends else [begins]
        assert sorted(set(cut)) == sorted(cut)
    assert all(own == list(range(own[0], own[-1] + 1)) for own in owners.values())


@pytest.mark.parametrize(
    ("sequences", "context", "shares", "length", "cut"),
    [
        (64, 4096, 66, 64, 0),
        (128, 4096, 66, 128, 0),
        (256, 8192, 66, 512, 0),
        (64, 4096, 132, 32, 64),
        (128, 4096, 132, 64, 0),
        (256, 1024, 132, 32, 0),
        (64, 1024, 132, 8, 64),
        (64, 4160, 132, 33, 64),
        (1, 4096, 132, 2, 31),
        (3, 500, 132, 2, 9),
        (100, 4096, 132, 49, 128),
    ],
    ids=str,
)
def test_equal_contexts_are_cut_where_they_end(sequences, context, shares, length, cut) -> None:
    found = shares_of([context] * sequences, shares)
    assert max(map(pages_in, found)) == length
    assert cuts([context] * sequences, found) == cut


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONTEXTS, st.integers(1, 140))
def test_there_are_fewer_cuts_than_shares(contexts, shares) -> None:
    assert cuts(contexts, shares_of(contexts, shares)) < shares
