"""How FP8 products of a single weight fill multiprocessors: plain arithmetic of shapes."""

from __future__ import annotations

from typing import Final

from benthic.kernels.host import cdiv

ROWS: Final = 128
COLUMNS: Final = 192
CHUNK: Final = 128
HAND_OVER: Final = 4
"""Chunks that could be multiplied while sums of a tile are written and read."""
TILE: Final = 1.1
"""Chunks that a tile of ours takes besides its own, from an H200's times of products of 4 to 128 chunks."""
LIBRARY_COLUMNS: Final = 128
LIBRARY_TILE: Final = 2.4
"""The same of cuBLAS, with whose tiles, and the rate below, its times with 4,096 rows come out within 4 %."""
LIBRARY_RATE: Final = 1.07
"""Of cuBLAS within a tile, where ours is 1."""


def tail(tiles: int, k_tiles: int, processors: int) -> tuple[int, int]:
    """How many tiles are multiplied whole, and the chunks of a program in the others; 0 if there are none.

    The others are the last wave and the one before it: a program has at least a tile's chunks, so none is
    divided among more than two.
    """
    left = tiles % processors
    whole = tiles - left - processors
    share = cdiv((processors + left) * k_tiles, processors)
    if left == 0 or whole < 0 or 2 * k_tiles - share <= HAND_OVER:
        return tiles, 0
    return whole, share


def faster_than_library(rows: int, outer: int, inner: int, processors: int) -> bool:
    """Whether the busiest multiprocessor has less to do with our tiles than with cuBLAS'.

    cuBLAS multiplies faster, but writes no tile beside the next one's product, and its last wave stays as it
    is: ours win where K is short, or where that wave would be half empty. With less than a wave it has
    smaller tiles.
    """
    k_tiles, tiles = cdiv(inner, CHUNK), cdiv(rows, ROWS) * cdiv(outer, COLUMNS)
    if tiles < processors:
        return False
    whole, share = tail(tiles, k_tiles, processors)
    waves = cdiv(tiles, processors)
    ours = waves * (k_tiles + TILE)
    if share:
        ours += whole // processors * k_tiles + share + HAND_OVER - waves * k_tiles
    library = cdiv(cdiv(rows, ROWS) * cdiv(outer, LIBRARY_COLUMNS), processors) * (k_tiles + LIBRARY_TILE)
    return ours * COLUMNS < library * LIBRARY_COLUMNS / LIBRARY_RATE
