"""Which token goes where: index arithmetic of the exchanges, on whatever device the choice of experts is.

Shape suffixes here, beside the package's: A tokens that arrived at this rank (one row each, however many of
its experts are here), S rows that this rank sends, n ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benthic.kernels import ops


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


def choice(expert_TK: Tensor, *, per_rank: int, ranks: int) -> Choice:
    """Who gets which token, when rank i holds experts `[i * per_rank, (i + 1) * per_rank)`."""
    rank_TK = expert_TK.long() // per_rank
    chosen_TKn = rank_TK.unsqueeze(-1) == torch.arange(ranks, device=rank_TK.device)
    goes_Tn = chosen_TKn.any(dim=1)
    return Choice(rank_TK, goes_Tn, torch.stack((goes_Tn.sum(0), chosen_TKn.sum((0, 1))), dim=1))


def departures(goes_Tn: Tensor, rows: int) -> Departures:
    """Sort the `rows` copies that leave by destination; the host knows `rows`, so nothing waits for it."""
    goes_nT = goes_Tn.T.contiguous()
    leaving_first = torch.sort((~goes_nT).flatten().to(torch.uint8), stable=True).indices
    slot_nT = goes_nT.flatten().cumsum(0).view_as(goes_nT) - 1
    slot_Tn = torch.where(goes_nT, slot_nT, -1).T.contiguous()
    return Departures(leaving_first[:rows] % max(1, goes_Tn.shape[0]), slot_Tn)


def arrivals(expert_AK: Tensor, *, first: int, experts: int, rows: int) -> Arrivals:
    """Sort copies whose expert is in `[first, first + experts)` by expert, keeping the order of arrival.

    `rows` is at least their number. Other copies, also those of expert -1, are left out.
    """
    return Arrivals(*ops.place_copies(expert_AK, first=first, experts=experts, rows=rows))
