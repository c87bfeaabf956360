"""Which token goes where: index arithmetic of the exchanges, on whatever device the choice of experts is.

Shape suffixes here, beside the package's: A tokens that arrived at this rank (one row each, however many of
its experts are here), S rows that this rank sends, n ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benthic.kernels import ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Choice(NamedTuple):
    """How many tokens and how many of their copies go to each rank.

    Attributes:
        rank_TK: int64, the rank that holds each chosen expert.
        goes_Tn: bool, whether any of a token's experts is on a rank.
        counts_n2: int64, tokens and copies for each rank.
    """

    rank_TK: Tensor
    goes_Tn: Tensor
    counts_n2: Tensor


class Departures(NamedTuple):
    """Rows as they leave, sorted by destination and by token within one.

    Attributes:
        token_S: int64, the token that each row is a copy of.
        slot_Tn: int64, the row of a token for a rank; -1 where it does not go there.
    """

    token_S: Tensor
    slot_Tn: Tensor


class Room(NamedTuple):
    """How many rows may arrive where the host must not wait for their number, as in a recorded step.

    Attributes:
        rows: of this rank's experts together, for each dispatch of a step in the order in which they start.
        over: int64 scalar, to which every dispatch that brought more adds 1: what was computed then is wrong.
    """

    rows: Sequence[int]
    over: Tensor


class Arrivals(NamedTuple):
    """Where the copies of the tokens that arrived lie among the rows sorted by local expert.

    Attributes:
        ends_E: int32, where each local expert's rows end.
        row_AK: int64, the row of copy k of an arrived token; -1 where its expert is on another rank.
        copy_R: int64, the inverse: row r is copy `copy_R[r] % K` of token `copy_R[r] // K`. Entries past
            `ends_E[-1]` are arbitrary but valid.
    """

    ends_E: Tensor
    row_AK: Tensor
    copy_R: Tensor

    def within(self, rows: int, over: Tensor) -> Arrivals:
        """The first `rows` rows; that there were more is added to `over`, and copies beyond are left out."""
        over.add_(self.ends_E[-1] > rows)
        inside_AK = self.row_AK.masked_fill(self.row_AK >= rows, -1)
        return Arrivals(self.ends_E.clamp(max=rows), inside_AK, self.copy_R[:rows])


def choice(expert_TK: Tensor, *, per_rank: int, ranks: int) -> Choice:
    """Who gets which token, when rank i holds experts `[i * per_rank, (i + 1) * per_rank)`."""
    goes_Tn, counts_n2 = ops.choose_ranks(expert_TK, per_rank=per_rank, ranks=ranks)
    return Choice(expert_TK.long() // per_rank, goes_Tn, counts_n2)


def departures(goes_Tn: Tensor, rows: int) -> Departures:
    """Sort the `rows` copies that leave by destination; the host knows `rows`, so nothing waits for it."""
    return Departures(*ops.place_departures(goes_Tn, rows=rows))


def arrivals(expert_AK: Tensor, *, first: int, experts: int, rows: int) -> Arrivals:
    """Sort copies whose expert is in `[first, first + experts)` by expert, keeping the order of arrival.

    `rows` is at least their number. Other copies, also those of expert -1, are left out.
    """
    return Arrivals(*ops.place_copies(expert_AK, first=first, experts=experts, rows=rows))
