"""From a flat range of a row-major array to the few boxes that cover exactly its elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Box(NamedTuple):
    """A part of an array: where it begins and how long it is, along every dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def moved(self, by: Sequence[int]) -> Box:
        """The same box further along every dim."""
        return Box(tuple(offset + step for offset, step in zip(self.offsets, by, strict=True)), self.sizes)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of `[start, stop)` of an array of `shape`, in the order of its elements.

    At most `2 * len(shape) - 1`: the end of a row, whole rows, the beginning of a row, and so in every dim.
    Laid end to end they are the range, so each is one contiguous piece of it.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, stop // inner  # the first row touched, the first not finished
    if first == last:
        yield from _in_row(shape, first, start - first * inner, stop - first * inner)
        return
    whole = -(-start // inner)
    yield from _in_row(shape, first, start - first * inner, inner if whole > first else 0)
    if whole < last:
        yield Box((whole, *(0 for _ in shape[1:])), (last - whole, *shape[1:]))
    yield from _in_row(shape, last, 0, stop - last * inner)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes_of_range(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))
