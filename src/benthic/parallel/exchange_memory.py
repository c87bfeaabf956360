"""Memory of every rank that every rank of one host can write, divided into mailboxes.

A mailbox takes one transfer: a slot of rows and a slot of side words for every token of every rank, so that
both ends know where a token goes without counting, and two flags a peer: *full*, raised by the writer, and
*free*, raised by the reader. A flag is raised by one side and taken down by the other, so nothing has to be
reset between transfers, and a captured CUDA graph may run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from benthic.errors import BackendError
from benthic.kernels import triton_exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.distributed import ProcessGroup

ALIGNED_WORDS: Final = 32
"""Parts start at multiples of 128 bytes."""


@dataclass(frozen=True)
class PeerMemory:
    """The same number of int32 words of every rank, all writable from here.

    Attributes:
        peers: each rank's words as this process reaches them, all zero at first.
        rank: this one.
    """

    peers: tuple[Tensor, ...]
    rank: int

    @property
    def words(self) -> Tensor:
        """This rank's own."""
        return self.peers[self.rank]

    @property
    def ranks(self) -> int:
        """How many ranks share it."""
        return len(self.peers)

    @classmethod
    def symmetric(cls, group: ProcessGroup, words: int, device: torch.device) -> PeerMemory:
        """Memory of GPUs that reach each other (NVLink), from torch's symmetric memory; a collective call.

        Raises:
            BackendError: a rank cannot reach another.
        """
        from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 (needs a CUDA build)

        own = symmetric.empty(words, dtype=torch.int32, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
        shared = symmetric.rendezvous(own, group)
        buffers = [shared.get_buffer(peer, (words,), torch.int32) for peer in range(group.size())]
        if not all(buffer.data_ptr() for buffer in buffers):
            msg = f"rank {group.rank()} of {group.size()} cannot reach all others: use AllToAllExchange"
            raise BackendError(msg)
        shared.barrier()
        buffers[group.rank()] = own
        return cls(tuple(buffers), group.rank())


@dataclass(frozen=True)
class Shape:
    """Words of each slot of a mailbox, and how many slots: tokens of a rank times ranks."""

    slots: int
    row_words: int
    side_words: int

    @property
    def words(self) -> int:
        """Of one mailbox, without flags."""
        return _aligned(self.slots * self.row_words) + _aligned(self.slots * self.side_words)


class Mailbox:
    """Room for one transfer in every rank's memory.

    Attributes:
        rows: int32 `[slots, row_words]`, what was written here.
        side: int32 `[slots, side_words]`.
        tables: int64 addresses by rank of both.
    """

    def __init__(self, memory: PeerMemory, shape: Shape, start: int, flags: int) -> None:
        side = start + _aligned(shape.slots * shape.row_words)
        self.rows = _matrix(memory.words, start, shape.slots, shape.row_words)
        self.side = _matrix(memory.words, side, shape.slots, shape.side_words)
        self.tables = (_table(memory, start), _table(memory, side))
        each = shape.slots // memory.ranks
        self._mine = [
            (
                _matrix(words, start + memory.rank * each * shape.row_words, each, shape.row_words),
                _matrix(words, side + memory.rank * each * shape.side_words, each, shape.side_words),
            )
            for words in memory.peers
        ]
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}
        self._memory = memory
        self._flags_table = _table(memory, 0)
        self._full, self._free = flags, flags + memory.ranks
        self.raise_free()

    def rows_in(self, dtype: torch.dtype) -> Tensor:
        """The rows in a dtype; one view for all transfers."""
        return self._in("rows", dtype)

    def side_in(self, dtype: torch.dtype) -> Tensor:
        """What lies beside them in a dtype; one view for all transfers."""
        return self._in("side", dtype)

    def _in(self, part: Literal["rows", "side"], dtype: torch.dtype) -> Tensor:
        key = part, dtype
        if key not in self._views:
            self._views[key] = (self.rows if part == "rows" else self.side).view(dtype)
        return self._views[key]

    def put(self, peer: int, rows_TW: Tensor | None, side_TW: Tensor | None) -> None:
        """Copy the first rows, and what lies beside them, of this rank's slots into a peer's memory.

        int32. On a GPU these are copies between contiguous memory, which a copy engine makes.
        """
        for slots, sent in zip(self._mine[peer], (rows_TW, side_TW), strict=True):
            if sent is not None:
                (slots if len(sent) == len(slots) else slots[: len(sent)]).copy_(sent)

    def raise_full(self) -> None:
        """Everything that this rank writes in this transfer is written."""
        triton_exchange.raise_flags(self._flags_table, self._full + self._memory.rank)

    def await_full(self) -> None:
        """Everything that all ranks write here is written."""
        triton_exchange.await_flags(self._memory.words, self._full, self._memory.ranks)

    def raise_free(self) -> None:
        """This rank has read all that was written to it."""
        triton_exchange.raise_flags(self._flags_table, self._free + self._memory.rank)

    def await_free(self) -> None:
        """All ranks have read what was written to them before."""
        triton_exchange.await_flags(self._memory.words, self._free, self._memory.ranks)


class Mailboxes:
    """Mailboxes of one kind, taken and given back in the same order on every rank.

    Which are taken is known to the host without asking the device, because every rank makes the same calls.
    """

    def __init__(self, name: str, boxes: list[Mailbox]) -> None:
        self._name = name
        self._all = len(boxes)
        self._spare = boxes[::-1]

    def take(self) -> Mailbox:
        """A mailbox that no transfer of this rank is in.

        Raises:
            BackendError: all are in flight.
        """
        if not self._spare:
            msg = (
                f"{self._all} transfers of this exchange are on their way {self._name} and it was built for "
                f"in_flight={self._all}. Finish one before starting the next, or raise in_flight."
            )
            raise BackendError(msg)
        return self._spare.pop()

    def give(self, box: Mailbox) -> None:
        """The transfer is over."""
        self._spare.append(box)


def words_needed(kinds: list[Shape], ranks: int, in_flight: int) -> int:
    """Words of each rank for `in_flight` mailboxes of each kind with their flags."""
    return _aligned(2 * ranks * in_flight * len(kinds)) + in_flight * sum(shape.words for shape in kinds)


def mailboxes(memory: PeerMemory, kinds: list[Shape], in_flight: int) -> Iterator[list[Mailbox]]:
    """`in_flight` mailboxes of each kind; flags lie before all of them."""
    start, flags = _aligned(2 * memory.ranks * in_flight * len(kinds)), 0
    for shape in kinds:
        boxes = []
        for _ in range(in_flight):
            boxes.append(Mailbox(memory, shape, start, flags))
            start += shape.words
            flags += 2 * memory.ranks
        yield boxes


def _aligned(words: int) -> int:
    return -(-words // ALIGNED_WORDS) * ALIGNED_WORDS


def _matrix(words: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return words[start : start + rows * columns].view(rows, columns)


def _table(memory: PeerMemory, start: int) -> Tensor:
    addresses = [words.data_ptr() + 4 * start for words in memory.peers]
    return torch.tensor(addresses, dtype=torch.int64, device=memory.words.device)
