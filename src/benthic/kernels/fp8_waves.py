"""How FP8 products of a single weight fill multiprocessors: plain arithmetic of shapes."""

from __future__ import annotations

from typing import Final, NamedTuple

from benthic.kernels.host import cdiv

CHUNK: Final = 128
"""Of K, after which sums are promoted."""


class Tiles(NamedTuple):
    """Tiles of a way to multiply; microseconds of one on an H200, a chunk and beside its chunks."""

    rows: int
    columns: int
    chunk: float
    beside: float


CUBLAS: Final = Tiles(128, 128, 0.436, 1.22)
THREE_GROUPS: Final = Tiles(192, 128, 0.699, 0.67)
TWO_GROUPS: Final = Tiles(128, 192, 0.76, 0.84)
"""From times of 4,096 rows of six products of 4 to 128 chunks, one after another so that the GPU is hot.
Those of 1,024 and 2,048 rows come out within 8 %, but for cuBLAS' of few tiles."""
HAND_OVER: Final = 4
"""Chunks that could be multiplied while sums of a tile are written and read."""
CLEAR: Final = 1.02
"""Times as long as ours cuBLAS must take for ours to run."""


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


def fastest(rows: int, outer: int, inner: int, processors: int) -> str:
    """The implementation whose busiest multiprocessor is done first: "cublas", "gluon_three" or "gluon".

    cuBLAS multiplies faster within a tile, but writes none beside the next one's product, and its last wave
    stays as it is: ours win where K is short, or where that wave would be half empty. With less than a wave
    it has smaller tiles.
    """
    if cdiv(rows, CUBLAS.rows) * cdiv(outer, CUBLAS.columns) < processors:
        return "cublas"
    k_tiles = cdiv(inner, CHUNK)
    times = {"gluon_three": _waves(rows, outer, THREE_GROUPS, processors) * _tile(THREE_GROUPS, k_tiles)}
    tiles = cdiv(rows, TWO_GROUPS.rows) * cdiv(outer, TWO_GROUPS.columns)
    whole, share = tail(tiles, k_tiles, processors)
    if share:
        waves, rest = whole // processors, share + HAND_OVER
        times["gluon"] = waves * _tile(TWO_GROUPS, k_tiles) + _tile(TWO_GROUPS, rest)
    else:
        times["gluon"] = cdiv(tiles, processors) * _tile(TWO_GROUPS, k_tiles)
    ours = min(times, key=lambda name: times[name])
    library = _waves(rows, outer, CUBLAS, processors) * _tile(CUBLAS, k_tiles)
    return ours if times[ours] * CLEAR < library else "cublas"


def _waves(rows: int, outer: int, tiles: Tiles, processors: int) -> int:
    return cdiv(cdiv(rows, tiles.rows) * cdiv(outer, tiles.columns), processors)


def _tile(tiles: Tiles, chunks: int) -> float:
    return chunks * tiles.chunk + tiles.beside
