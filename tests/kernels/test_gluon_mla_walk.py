"""What MLA decode reads of pages that contexts end in, by the kernel's own loading warp, run by Python."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import gluon_threads

from benthic.kernels import gluon_mla, gluon_mla_rows, gluon_mla_shares
from benthic.kernels.gluon_mla_rows import BOX, PIECES

RING, PAGE, TABLE = 25, 64, 40


class Table:
    """Block tables, one sequence a row of `TABLE` entries."""

    def __init__(self, rows, at=0):
        self.rows, self.at = rows, at

    def __add__(self, more):
        return Table(self.rows, self.at + int(more))


class Cache:
    """A matrix of tokens, loaded in blocks of `height`; each token that is read is counted."""

    def __init__(self, tokens, height, read):
        self.tokens, self.height, self.read = tokens, height, read
        self.block_type = SimpleNamespace(nbytes=height * 64 * 2)

    def block(self, first, column):
        found = torch.zeros(self.height, 64)
        if first >= 0:
            found[:] = self.tokens[first : first + self.height, column : column + 64]
            self.read[first : first + self.height] += 1
        else:
            assert first <= -self.height  # wholly before the first token: zeros, and nothing is read
        return found


def load(cache, corner, bar, tile):
    tile.store(cache.block(int(corner[0]), int(corner[1])))
    bar.came(size=-cache.block_type.nbytes)


def loaded(pointer, *, mask=True, other=0):
    if not mask:
        return other
    if isinstance(pointer, Table):
        return pointer.rows[pointer.at // TABLE][pointer.at % TABLE]
    return torch.tensor(pointer)


@pytest.fixture(autouse=True)
def in_python(monkeypatch):
    gl = gluon_threads.gluon_language(load=loaded, where=gluon_threads.where)
    own = {
        "gl": gl,
        "load": load,
        "view": lambda ring, _dtype, shape, _layout: type(ring)(ring.data.view(shape)),
    }
    gluon_threads.in_python(monkeypatch, [gluon_mla_shares, gluon_mla_rows, gluon_mla], **own)


class Contexts(list):
    def __add__(self, sequence):
        return self[int(sequence)]


def walked(contexts, share):
    """Pages as they come, `(number, ring)` each, and how often each token of the cache was read."""
    pages = [-(-context // PAGE) for context in contexts]
    order = torch.randperm(sum(pages)).tolist()
    rows = [[order.pop() for _ in range(n)] + [2**30] * (TABLE - n) for n in pages]
    tokens = torch.randn(sum(pages) * PAGE, 576)
    read = torch.zeros(len(tokens), dtype=torch.int64)
    ring = gluon_threads.Tiles(torch.full((RING, PAGE, 64), torch.nan))
    full, empty = (gluon_threads._new_bars(4, 1) for _ in range(2))
    woken = gluon_threads.Barrier(1)
    woken.came(arrivals=1)
    found = []

    def use():
        base = 0
        for number in range(int(share[2])):
            gluon_threads._wait(full.index(number % 4), number // 4 & 1)
            found.append(torch.cat([ring.data[(base + piece) % RING] for piece in range(PIECES.value)], 1))
            empty.index(number % 4).came(arrivals=1)
            base = (base + PIECES.value) % RING

    def produce():
        caches = Cache(tokens, PAGE, read), Cache(tokens, BOX.value, read)
        bars = full, None, empty, None
        where = Table(rows), Contexts(contexts), TABLE
        gluon_mla._produce(*caches, *where, ring, bars, woken, share, RING)

    gluon_threads.specialize([(use, ()), (produce, ())])
    return tokens, rows, read, found


def test_what_lies_behind_a_context_is_read_to_the_end_of_sixteen_tokens_and_no_further():
    torch.manual_seed(0)
    contexts = [130, 0, 64, 1, 700, 65, 16, 1000, 63, 17]
    total = sum(-(-context // PAGE) for context in contexts)
    tokens, rows, read, found = walked(contexts, (torch.tensor(0), 0, total))
    number, wanted = 0, torch.zeros_like(read)
    for sequence, context in enumerate(contexts):
        for page in range(-(-context // PAGE)):
            own = min(context - page * PAGE, PAGE)
            reached = -(-own // BOX.value) * BOX.value
            first = rows[sequence][page] * PAGE
            wanted[first : first + reached] = PIECES.value
            assert torch.equal(found[number][:own], tokens[first : first + own])
            assert (found[number][reached:] == 0).all()
            number += 1
    assert number == total
    assert torch.equal(read, wanted)


def test_a_share_that_ends_within_a_context_reads_whole_pages():
    tokens, rows, read, found = walked([300, 200], (torch.tensor(0), 2, 4))
    assert torch.equal(found[0], tokens[rows[0][2] * PAGE :][:PAGE])
    assert torch.equal(found[3], tokens[rows[1][0] * PAGE :][:PAGE])
    assert int((read > 0).sum()) == 64 + 64 + 48 + 64


def test_only_a_box_that_the_context_ends_in_is_cleared_behind_it():
    for base in (0, 9, 20):
        for tokens in (1, 15, 17, 40, 63):
            ring = gluon_threads.Tiles(torch.ones(RING, PAGE, 64))
            gluon_mla_rows._clear_foreign_tokens(ring, base, tokens, RING)
            kept = torch.ones(RING, PAGE, 64)
            last = tokens // BOX.value * BOX.value + BOX.value
            for piece in range(8):  # keys that are rotated have no weight
                kept[(base + piece) % RING, tokens:last] = 0
            assert torch.equal(ring.data, kept)
