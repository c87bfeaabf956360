"""Drafts of one step, and the verdict on them.

A drafted decode has 1 + d rows: row j sees the newest token and the first j drafts, so the token drawn from
it is the sequence's next one if these drafts hold. Drawing is a function of (logits, seed, output position)
and draft j + 1 holds exactly when it is the token that row j draws. So what is put out is what would have
been drawn without drafts, token for token, whoever drafted and however well.

For a draft x that is fixed before its row is drawn this is the rejection sampling of Leviathan et al. and
Chen et al. (2023) with q = 1 at x: P(hold) = p(x), and what replaces a rejected x is distributed as p
without x. A drafter that draws with the same random number as the row (Daliri, Musco and Suresh 2024,
"Coupling without Communication and Drafter-Invariant Speculative Decoding") is accepted more often, and no
less exact.

Shape suffixes: S sequences that draw a token (decodes, then prefills), D decodes, K drafts, Q = K + 1
queries, R rows of logits: 1 + d for each decode, one for each prefill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from benthic.serve.transit import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Drafts:
    """What the decodes of a step verify.

    `counts` says how many drafts each has, at least one of them any. `offered` int64 on the device has as
    many columns as the most, and those behind a sequence's count mean nothing: a line for each decode, or
    with `slots` (which lines are theirs) one for each slot of the scheduler.
    """

    counts: tuple[int, ...]
    offered: Tensor
    slots: Tensor | None = None

    def _of_decodes(self) -> Tensor:
        return self.offered if self.slots is None else self.offered.index_select(0, self.slots)

    token_DK = functools.cached_property(_of_decodes)
    """The drafts of each decode; slots must not have been offered others meanwhile."""

    @property
    def queries(self) -> int:
        """Rows of the decode with the most drafts."""
        return 1 + self.offered.shape[1]

    @property
    def even(self) -> bool:
        """Whether all decodes have as many."""
        return min(self.counts) == self.queries - 1

    def places(self) -> NDArray[np.int64]:
        """How many drafts precede query q of each decode, [D, Q]; negative for rows that only pad.

        Padding comes first, because the last query of a sequence is the one that sees its whole context.
        """
        before_D = np.array(self.counts, dtype=np.int64)[:, None]
        return np.arange(self.queries) - (self.queries - 1) + before_D


class Verdict(NamedTuple):
    """How many drafts of each sequence held, the token drawn behind them, and its row of logits."""

    held_S: Tensor
    newest_S: Tensor
    row_S: Tensor


@dataclass(frozen=True)
class TrialRows:
    """Which row of logits judges which draft: the same for all steps whose sequences have so many drafts.

    `row_SQ` are the rows of every sequence (its last one repeated), `offered_DK` says which drafts count,
    `owner_R` and `place_R` are the sequence of each row and how many drafts it sees; on the device. `first`
    and `rows` are the first row and the number of rows of each sequence.
    """

    first: tuple[int, ...]
    rows: tuple[int, ...]
    row_SQ: Tensor
    offered_DK: Tensor
    owner_R: Tensor
    place_R: Tensor

    @classmethod
    def of(cls, counts: tuple[int, ...], queries: int, sequences: int, device: torch.device) -> TrialRows:
        """The rows of a step in which `sequences` draw tokens, decodes with `counts` drafts first."""
        rows_S = np.ones(sequences, dtype=np.int64)
        rows_S[: len(counts)] += counts
        first_S = np.cumsum(rows_S) - rows_S
        query_Q = np.arange(queries)
        row_SQ = first_S[:, None] + np.minimum(query_Q, rows_S[:, None] - 1)
        owner_R = np.repeat(np.arange(sequences), rows_S)
        return cls(
            first=tuple(first_S.tolist()),
            rows=tuple(rows_S.tolist()),
            row_SQ=to_device(row_SQ, device),
            offered_DK=to_device(query_Q[:-1] < np.array(counts)[:, None], device),
            owner_R=to_device(owner_R, device),
            place_R=to_device(np.arange(len(owner_R)) - first_S[owner_R], device),
        )


rows_of = functools.lru_cache(maxsize=4)(TrialRows.of)
"""`TrialRows.of`, kept for the newest compositions: most steps have those of the step before."""


@dataclass(frozen=True)
class Trial:
    """A step's drafts, and which row of logits judges which of them."""

    drafts: Drafts
    by: TrialRows

    @classmethod
    def of(cls, drafts: Drafts, sequences: int) -> Trial:
        """The rows of a step in which `sequences` draw tokens, decodes first."""
        return cls(drafts, rows_of(drafts.counts, drafts.queries, sequences, drafts.offered.device))

    @property
    def first(self) -> tuple[int, ...]:
        """The first row of each sequence."""
        return self.by.first

    def spread(self, ids: Sequence[str], positions: Sequence[int]) -> tuple[tuple[str, ...], list[int]]:
        """Whose row each is and how many tokens that sequence has put out before it; rows count on."""
        names = tuple([name for name, rows in zip(ids, self.by.rows, strict=True) for _ in range(rows)])
        places = [
            position + place
            for position, rows in zip(positions, self.by.rows, strict=True)
            for place in range(rows)
        ]
        return names, places

    def judge(self, token_R: Tensor) -> Verdict:
        """Find out which drafts are the tokens that were drawn; nothing waits for the device."""
        row_SQ = self.by.row_SQ
        drawn_SQ = token_R[row_SQ]
        decodes, most = self.drafts.token_DK.shape
        same_DK = (drawn_SQ[:decodes, :most] == self.drafts.token_DK) & self.by.offered_DK
        held_D1 = same_DK.cumprod(1).sum(1, keepdim=True)
        held_S1 = F.pad(held_D1, (0, 0, 0, len(row_SQ) - decodes)) if len(row_SQ) > decodes else held_D1
        newest_S = drawn_SQ.gather(1, held_S1).squeeze(1)
        return Verdict(held_S1.squeeze(1), newest_S, row_SQ.gather(1, held_S1).squeeze(1))

    def kept(self, verdict: Verdict) -> Tensor:
        """Which rows' tokens are put out, bool [R]."""
        return self.by.place_R <= verdict.held_S.index_select(0, self.by.owner_R)

    def seen(self, row_L: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts that some rows see: tokens int64 [L, K], and which of them count, bool [L, K]."""
        decodes, most = self.drafts.token_DK.shape
        owner_L = self.by.owner_R.index_select(0, row_L).clamp(max=decodes - 1)
        place_L1 = self.by.place_R.index_select(0, row_L).unsqueeze(1)
        counts_LK = torch.arange(most, device=row_L.device) < place_L1
        return self.drafts.token_DK.index_select(0, owner_L), counts_LK
