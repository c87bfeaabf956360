"""Which tokens of a microbatch a rank holds, when tensor and context parallelism divide them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.spec.layout import Layout, Place


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """One rank's tokens of `rows` packed rows of `seq_len` tokens, in the order in which it keeps them.

    Context parallelism cuts every row into `2 cp_degree` chunks and gives rank i the chunks i and
    `2 cp_degree - 1 - i`: under a causal mask early tokens see few keys and late ones many, so every rank has
    the same work. These are the tokens from which the rank's attention asks, row after row. Tensor
    parallelism divides them once more, between attention and the rest, into equal parts of every row.

    Every method returns int64 indices on the CPU.
    """

    rows: int
    seq_len: int
    cp: int = 0
    cp_degree: int = 1
    tp: int = 0
    tp_degree: int = 1

    @classmethod
    def of(cls, layout: Layout, place: Place, *, rows: int, seq_len: int) -> TokenShare:
        """The share of the rank at `place`; `Layout.problems` says which rows divide."""
        return cls(
            rows=rows,
            seq_len=seq_len,
            cp=place.cp,
            cp_degree=layout.cp_degree,
            tp=place.tp,
            tp_degree=layout.tp_degree,
        )

    @property
    def pieces(self) -> tuple[range, ...]:
        """The parts of a row that attention asks from here; chunks that touch are one piece."""
        if self.cp_degree == 1:
            return (range(self.seq_len),)
        chunk, last = self.seq_len // (2 * self.cp_degree), 2 * self.cp_degree - 1 - self.cp
        early = range(self.cp * chunk, (self.cp + 1) * chunk)
        late = range(last * chunk, (last + 1) * chunk)
        return (range(early.start, late.stop),) if early.stop == late.start else (early, late)

    @property
    def row_part(self) -> int:
        """How many tokens of each row are in this rank's stream."""
        return self.seq_len // (self.cp_degree * self.tp_degree)

    def attention(self) -> Tensor:
        """Of the tokens from which this rank's attention asks."""
        row_L = torch.cat([torch.arange(piece.start, piece.stop) for piece in self.pieces])
        return (torch.arange(self.rows)[:, None] * self.seq_len + row_L).flatten()

    def stream(self) -> Tensor:
        """Of the tokens whose residual stream is here."""
        return self.attention().view(self.rows, self.tp_degree, -1)[:, self.tp].flatten()

    def found(self) -> Tensor:
        """Where each token of the pack lies among those gathered from all context ranks in order."""
        return _found(self.rows, self.seq_len, self.cp_degree)


@functools.lru_cache(maxsize=8)
def _found(rows: int, seq_len: int, cp_degree: int) -> Tensor:
    shares = [
        TokenShare(rows=rows, seq_len=seq_len, cp=cp, cp_degree=cp_degree).attention()
        for cp in range(cp_degree)
    ]
    return torch.cat(shares).argsort()


def by_row(gathered_TX: Tensor, ranks: int, row_part: int) -> Tensor:
    """Tokens gathered rank by rank, row by row; each rank has `row_part` tokens of a row. One row is free."""
    return gathered_TX.unflatten(0, (ranks, -1, row_part)).transpose(0, 1).flatten(0, 2)


def by_rank(tokens_TX: Tensor, ranks: int, row_part: int) -> Tensor:
    """The inverse of `by_row`."""
    return tokens_TX.unflatten(0, (-1, ranks, row_part)).transpose(0, 1).flatten(0, 2)
