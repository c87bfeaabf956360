# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Which tile of which sequence each program of packed attention works on, where sequences are unlike.

A grid of as many tiles for each sequence as the longest has is mostly programs without a tile when lengths
differ; each takes a multiprocessor for itself, since its shared memory is that of a program with one. A list
has a place for every tile and at most one more for each sequence.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from benthic.kernels.host import cdiv
from benthic.kernels.relaunch import remembered

HEADS_TOGETHER = 8
"""Of how many heads the longest tiles start first: a lone short sequence has few of them, and more heads read
more keys at once than the second-level cache keeps."""
FULL = 0.75
"""A grid is listed where its list is shorter than this part of it; the list costs a launch."""
MOST_SEQUENCES = 4096
"""Of a list, all of which each program that writes a part of it reads."""
SIZES = 64, 512, MOST_SEQUENCES
"""Sequences that a list is made for: kernels for each number of documents would be compiled amid a run."""


@remembered
@triton.jit(do_not_specialize=["sequences"])
def _list_tiles(
    starts_ptr, list_ptr, sequences,
    TILE: tl.constexpr, SEQUENCES: tl.constexpr, PLACES: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """(sequence, tile) of PLACES places; (-1, 0) behind the last tile."""
    each = tl.arange(0, SEQUENCES)
    inside = each < sequences
    start = tl.load(starts_ptr + each, mask=inside, other=0)
    tiles = (tl.load(starts_ptr + each + 1, mask=inside, other=0) - start + TILE - 1) // TILE
    ends = tl.cumsum(tiles, axis=0)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    before = (ends[None, :] <= place[:, None]) & inside[None, :]
    sequence = tl.sum(before.to(tl.int32), axis=1)
    tile = place - tl.max(tl.where(before, ends[None, :], 0), axis=1)
    if LAST_FIRST:
        own = tl.sum(tl.where(each[None, :] == sequence[:, None], tiles[None, :], 0), axis=1)
        tile = own - 1 - tile
    one = sequence < sequences
    tl.store(list_ptr + 2 * place, tl.where(one, sequence, -1))
    tl.store(list_ptr + 2 * place + 1, tl.where(one, tile, 0))  # below no sequence's rows, of which -1 has 0


def grid_of(starts_S1, rows, most, tile, heads, *, last_first, lists):
    """The grid that `gluon_tiles.place` reads, and `(tiles, TOGETHER, LISTED)` for it.

    Args:
        starts_S1: int32, where each sequence starts, and the end of the last.
        rows: of all sequences, or more.
        most: rows of the longest, or more.
        tile: rows of a tile.
        heads: each has all tiles.
        last_first: a sequence's last tile comes first.
        lists: the `TileLists` of these bounds.
    """
    sequences, together = starts_S1.shape[0] - 1, math.gcd(heads, HEADS_TOGETHER)
    whole = cdiv(most, tile)
    places = (rows + (tile - 1) * sequences) // tile  # as if all but one row of a tile were missing in each
    if places > FULL * whole * sequences or sequences > MOST_SEQUENCES:
        return (together, whole, heads // together * sequences), (starts_S1, together, False)
    tiles = lists.of(
        (starts_S1.data_ptr(), places, tile, last_first),
        lambda: listed(starts_S1, places, tile, last_first=last_first),
    )
    return (together, places, heads // together), (tiles, together, True)


def listed(starts_S1, places, tile, *, last_first):
    """int32 [places or more, 2]: sequence and tile; (-1, 0) where there are no more tiles."""
    sequences = starts_S1.shape[0] - 1
    padded = next(size for size in SIZES if size >= sequences)
    each = max(1, min(64, 8192 // padded))
    parts = cdiv(places, each)
    list_N2 = torch.empty(parts * each, 2, dtype=torch.int32, device=starts_S1.device)
    _list_tiles[(parts,)](
        starts_S1, list_N2, sequences,
        TILE=tile, SEQUENCES=padded, PLACES=each, LAST_FIRST=last_first, num_warps=4,
    )  # fmt: skip
    return list_N2
