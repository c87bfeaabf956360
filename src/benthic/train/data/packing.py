"""Shuffled packing: documents to rows of `seq_len` tokens, every token exactly once an epoch.

Each epoch shuffles the documents and lays them end to end; all epochs together are one endless stream, cut
into rows of `seq_len` tokens. A row belongs to the epoch in which it starts, and the rows of an epoch are
shuffled once more, so that the pieces of a long document are spread over the epoch. Where a run stands is one
integer, the number of rows it has taken: any row can be found again from the seed alone.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import numpy as np

from benthic.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kept = TypeVar("Kept")
_DOCUMENTS: Final = 1
_ROWS: Final = 2
_KEPT_EPOCHS: Final = 3


@dataclass(frozen=True)
class Span:
    """`count` tokens of `document`, from its token `start` on, as it appears in `epoch`."""

    epoch: int
    document: int
    start: int
    count: int


class Rows(Protocol):
    """Says which tokens the n-th row holds."""

    seq_len: int

    def spans(self, position: int, count: int) -> list[Span]:
        """The tokens of the row at `position`, and what follows it, up to `count`; fewer leave padding."""
        ...


class Packing:
    """Says which tokens the n-th row holds: those of one endless stream.

    Args:
        lengths: tokens of each document, all positive.
        seq_len: tokens of a row.
        seed: of both shuffles.
    """

    def __init__(self, lengths: NDArray[np.int64], seq_len: int, seed: int) -> None:
        if seq_len < 1:
            msg = f"seq_len={seq_len} is no row. Set train.seq_len to 1 or more."
            raise ConfigError(msg)
        if len(lengths) == 0 or int(lengths.min()) < 1:
            shortest = int(lengths.min()) if len(lengths) else 0
            msg = f"{len(lengths)} documents, the shortest of {shortest} tokens, cannot be packed."
            raise DataError(msg)
        self._lengths, self.seq_len, self._seed = lengths, seq_len, seed
        self.epoch_tokens = int(lengths.sum())
        self._order: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._rows: dict[int, NDArray[np.int64]] = {}

    def epoch_of(self, position: int) -> int:
        """The epoch of the row at `position`: the one in which that row's stretch of the stream starts."""
        return position * self.seq_len // self.epoch_tokens

    def first_row(self, epoch: int) -> int:
        """The position of the first row of `epoch`."""
        return -(-epoch * self.epoch_tokens // self.seq_len)

    def spans(self, position: int, count: int) -> list[Span]:
        """The tokens at `count` places of the stream, from the start of the row at `position` on.

        `count` may exceed `seq_len`: what follows is what the targets of the last tokens need.
        """
        epoch = self.epoch_of(position)
        first = self.first_row(epoch)
        row = first + int(self._row_order(epoch)[position - first])
        at = row * self.seq_len - epoch * self.epoch_tokens
        return self._walk(epoch, at, count)

    def _walk(self, epoch: int, at: int, count: int) -> list[Span]:
        spans: list[Span] = []
        while count:
            epoch, at = epoch + at // self.epoch_tokens, at % self.epoch_tokens
            documents, starts = self._document_order(epoch)
            place = int(np.searchsorted(starts, at, side="right")) - 1
            taken = min(count, int(starts[place + 1]) - at)
            spans.append(Span(epoch, int(documents[place]), at - int(starts[place]), taken))
            at, count = at + taken, count - taken
        return spans

    def _row_order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._rows:
            count = self.first_row(epoch + 1) - self.first_row(epoch)
            self._rows = _newest(self._rows) | {epoch: shuffled(count, (self._seed, epoch, _ROWS))}
        return self._rows[epoch]

    def _document_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if epoch not in self._order:
            documents = shuffled(len(self._lengths), (self._seed, epoch, _DOCUMENTS))
            starts = np.concatenate([[0], np.cumsum(self._lengths[documents])]).astype(np.int64)
            self._order = _newest(self._order) | {epoch: (documents, starts)}
        return self._order[epoch]


class WholePacking:
    """Rows of whole documents: none is cut, what is left of a row stays empty.

    Documents are placed once, the longest first, each in the fullest row that has room (best fit
    decreasing); every epoch shuffles the rows. For conversations, whose replies need what came before.

    Args:
        lengths: tokens of each document, at most `seq_len`.
        seq_len: tokens of a row.
        seed: of the shuffles.

    Raises:
        DataError: documents are longer than a row.
    """

    def __init__(self, lengths: NDArray[np.int64], seq_len: int, seed: int) -> None:
        over = int((lengths > seq_len).sum())
        if over or len(lengths) == 0:
            msg = (
                f"{over} of {len(lengths)} documents are longer than train.seq_len={seq_len}, the longest "
                f"has {int(lengths.max(initial=0))} tokens. Raise train.seq_len, build conversations with "
                f"--max-tokens {seq_len}, or set data.packing=stream to let rows cut documents."
            )
            raise DataError(msg)
        self._lengths, self.seq_len, self._seed = lengths, seq_len, seed
        self._documents = _best_fit(lengths, seq_len)
        self._order: dict[int, NDArray[np.int64]] = {}

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return len(self._documents)

    def spans(self, position: int, count: int) -> list[Span]:  # noqa: ARG002 (nothing follows a row)
        """The documents of the row at `position`, whole."""
        epoch, number = divmod(position, self.rows)
        if epoch not in self._order:
            self._order = _newest(self._order) | {epoch: shuffled(self.rows, (self._seed, epoch, _ROWS))}
        documents = self._documents[int(self._order[epoch][number])]
        return [Span(epoch, document, 0, int(self._lengths[document])) for document in documents]


def _best_fit(lengths: NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Documents of each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect.bisect_left(room, (length, -1))
        free, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        bisect.insort(room, (free - length, row))
    return rows


def shuffled(count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation of `count` that depends on `key` alone, not on the version of any random generator.

    Indices are sorted by the splitmix64 hash of key and index.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix64(state + np.uint64(part % 2**64))
        hashes = _splitmix64(np.arange(count, dtype=np.uint64) + state)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _newest(kept: dict[int, Kept]) -> dict[int, Kept]:
    """The last epochs only, so that memory does not grow with the run."""
    return {epoch: kept[epoch] for epoch in sorted(kept)[-(_KEPT_EPOCHS - 1) :]}
