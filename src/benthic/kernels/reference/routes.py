"""Definitions of the ops that say where an exchange's rows lie."""

from __future__ import annotations

import torch
from torch import Tensor


def place_copies(expert_AK: Tensor, *, first: int, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort copies by local expert, keeping the order of arrival; others are left out."""
    local_AK = expert_AK - first
    here_AK = (local_AK >= 0) & (local_AK < experts)
    key_AK = torch.where(here_AK, local_AK, experts)
    expert_sorted, copy = torch.sort(key_AK.flatten(), stable=True)
    row = torch.empty_like(copy)
    row[copy] = torch.arange(copy.numel(), device=copy.device)
    each = torch.arange(experts, dtype=expert_sorted.dtype, device=copy.device)
    ends_E = torch.searchsorted(expert_sorted, each, right=True, out_int32=True)
    return ends_E, torch.where(here_AK, row.view_as(key_AK), -1), copy[:rows]


def choose_ranks(expert_TK: Tensor, *, per_rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Whether any of a token's experts is on each rank; tokens and copies for each."""
    rank_TK = expert_TK.long() // per_rank
    chosen_TKn = rank_TK.unsqueeze(-1) == torch.arange(ranks, device=rank_TK.device)
    goes_Tn = chosen_TKn.any(dim=1)
    return goes_Tn, torch.stack((goes_Tn.sum(0), chosen_TKn.sum((0, 1))), dim=1)


def place_departures(goes_Tn: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
    """Sort the copies that leave by destination and by token within one."""
    goes_nT = goes_Tn.T.contiguous()
    leaving_first = torch.sort((~goes_nT).flatten().to(torch.uint8), stable=True).indices
    slot_nT = goes_nT.flatten().cumsum(0).view_as(goes_nT) - 1
    slot_Tn = torch.where(goes_nT, slot_nT, -1).T.contiguous()
    return leaving_first[:rows] % max(1, goes_Tn.shape[0]), slot_Tn


def home_slots(
    expert_TK: Tensor, dweight_SK: Tensor | None, *, per_rank: int, ranks: int, max_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Slot `n max_tokens + t` of token t wherever one of its experts is, and its weights' gradients there."""
    token_T1 = torch.arange(expert_TK.shape[0], device=expert_TK.device).unsqueeze(1)
    rank_TK, rank_n = expert_TK.long() // per_rank, torch.arange(ranks, device=expert_TK.device)
    goes_Tn = (rank_TK.unsqueeze(-1) == rank_n).any(dim=1)
    slot_Tn = torch.where(goes_Tn, rank_n * max_tokens + token_T1, -1)
    if dweight_SK is None:
        return slot_Tn, None
    k = torch.arange(expert_TK.shape[1], device=expert_TK.device)
    return slot_Tn, dweight_SK[rank_TK * max_tokens + token_T1, k]
