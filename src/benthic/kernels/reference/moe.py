"""Definitions of the mixture-of-experts ops: choosing experts, moving rows, multiplying by each expert."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.kernels.reference.norm import rms_norm, swiglu, wide


class Routing(NamedTuple):
    """Which experts a token goes to.

    Attributes:
        scores_TE: float32 affinities of every token to every expert (without bias).
        expert_TK: int32 chosen experts, best first.
        weight_TK: float32 weights of the chosen experts, differentiable.
    """

    scores_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor


class RowMaps(NamedTuple):
    """Where every copy of a token went.

    Attributes:
        row_TK: int64, the row that holds copy k of token t.
        copy_R: int64, the inverse: row r holds copy `copy_R[r] % K` of token `copy_R[r] // K`.
    """

    row_TK: Tensor
    copy_R: Tensor


class Permuted(NamedTuple):
    """Rows sorted by expert: `rows_RD`, where each expert's rows end `ends_E` (int32), and `maps`."""

    rows_RD: Tensor
    ends_E: Tensor
    maps: RowMaps


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x W^T` in float32."""
    return F.linear(x_TD.float(), weight_ED.float())


def gate_gradients(dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """`dlogits W` and `dlogits^T x` in float32, rounded once."""
    dx_TD = (dlogits_TE @ weight_ED.float()).to(x_TD.dtype)
    return dx_TD, (dlogits_TE.t() @ x_TD.float()).to(weight_ED.dtype)


def route(  # noqa: PLR0913 (the gate's hyper-parameters)
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    scoring_func: str,
    topk_method: str,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Routing:
    """`s = sigmoid(logits)` or softmax; `s' = s + bias` chooses; `s` weighs (V3 eq. 13-16).

    With groups, only experts of the `topk_group` best groups may be chosen. A group's score is the sum of
    its two best `s'` (`noaux_tc`) or its best one (`group_limited_greedy`); experts of other groups are
    masked with -inf, since with 0 a masked expert beats one whose biased score is negative.
    """
    scores_TE = torch.sigmoid(logits_TE) if scoring_func == "sigmoid" else torch.softmax(logits_TE, dim=-1)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if n_group > 1 and topk_method != "greedy":
        best = 2 if topk_method == "noaux_tc" else 1
        choice_TE = keep_groups(choice_TE, n_group=n_group, topk_group=topk_group, best=best)
    expert_TK = torch.topk(choice_TE, top_k, dim=-1, sorted=True).indices
    weight_TK = scores_TE.gather(1, expert_TK)
    if norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(scores_TE, expert_TK.to(torch.int32), weight_TK * routed_scaling_factor)


def keep_groups(choice_TE: Tensor, *, n_group: int, topk_group: int, best: int) -> Tensor:
    """Mask with -inf the experts outside the `topk_group` groups with the largest sum of `best` scores."""
    choice_TGe = choice_TE.unflatten(1, (n_group, -1))
    group_TG = choice_TGe.topk(min(best, choice_TGe.shape[-1]), dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_TG.topk(topk_group, dim=-1).indices, value=True)
    return choice_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)


def row_maps(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, RowMaps]:
    """Sort copies by expert, keeping token order within one: `(ends_E int32, maps)`."""
    flat = expert_TK.reshape(-1)
    expert_R, copy_R = torch.sort(flat, stable=True)
    row = torch.empty_like(copy_R)
    row[copy_R] = torch.arange(copy_R.numel(), device=row.device)
    experts = torch.arange(num_experts, dtype=flat.dtype, device=flat.device)
    ends_E = torch.searchsorted(expert_R, experts, right=True, out_int32=True)  # no host synchronisation
    return ends_E, RowMaps(row.view_as(expert_TK), copy_R)


def permute(x_TD: Tensor, expert_TK: Tensor, num_experts: int, slot_T: Tensor | None = None) -> Permuted:
    """Copy every token to each of its experts, rows sorted by expert."""
    ends_E, maps = row_maps(followed(expert_TK, slot_T), num_experts)
    return Permuted(x_TD[maps.copy_R // expert_TK.shape[1]], ends_E, maps)


def followed(expert_TK: Tensor, slot_T: Tensor | None) -> Tensor:
    """The choice, where tokens with a negative slot take the first token's."""
    return expert_TK if slot_T is None else torch.where((slot_T < 0)[:, None], expert_TK[:1], expert_TK)


def unpermute(rows_RD: Tensor, maps: RowMaps, weight_TK: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensor:
    """`out_t = sum_k weight_tk * rows[row_tk]`, summed in float32 in the order of k; see `added`."""
    acc = wide(rows_RD.dtype)
    rows_TKD = rows_RD[maps.row_TK].to(acc)
    return added((rows_TKD * weight_TK.to(acc).unsqueeze(-1)).sum(dim=1).to(rows_RD.dtype), beside)


def unpermute_norm(
    rows_RD: Tensor,
    maps: RowMaps,
    weight_TK: Tensor,
    beside: tuple[Tensor, ...],
    norm_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The norm of what `unpermute` gives, and that."""
    out_TD = unpermute(rows_RD, maps, weight_TK, beside)
    return rms_norm(out_TD, norm_D, eps), out_TD


def added(out_TD: Tensor, beside: tuple[Tensor, ...]) -> Tensor:
    """The tensors of `beside` added up, then `out`: every sum is rounded to their dtype."""
    return functools.reduce(torch.add, (*beside, out_TD))


def gather_copies(x_AD: Tensor, copy_R: Tensor, ends_E: Tensor, top_k: int) -> Tensor:
    """`rows_r = x[copy_r // top_k]`; rows past `ends_E[-1]` are zeros."""
    rows_RD = x_AD.new_zeros(copy_R.shape[0], x_AD.shape[1])
    rows = int(ends_E[-1])
    rows_RD[:rows] = x_AD[copy_R[:rows] // top_k]
    return rows_RD


def sum_copies(rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor | None) -> Tensor:
    """`out_a = sum_k weight_ak * rows[row_ak]` over the copies that are here, in float32, in order."""
    acc = wide(rows_RD.dtype)
    out_AD = torch.zeros(row_AK.shape[0], rows_RD.shape[1], dtype=acc, device=rows_RD.device)
    for k in range(row_AK.shape[1] if rows_RD.shape[0] else 0):
        row_A = row_AK[:, k]
        value_AD = rows_RD[row_A.clamp(min=0)].to(acc)
        if weight_AK is not None:
            value_AD = value_AD * weight_AK[:, k, None].to(acc)
        out_AD += value_AD.masked_fill_(row_A[:, None] < 0, 0)
    return out_AD.to(rows_RD.dtype)


def sum_copies_backward(
    dout_AD: Tensor, rows_RD: Tensor, row_AK: Tensor, weight_AK: Tensor
) -> tuple[Tensor, Tensor]:
    """`drows[row_ak] = weight_ak * dout_a` and `dweight_ak = dout_a . rows[row_ak]`, 0 for absent copies."""
    acc = wide(rows_RD.dtype)
    drows_RD, dweight_AK = torch.zeros_like(rows_RD), torch.zeros_like(weight_AK)
    for k in range(row_AK.shape[1]):
        here = row_AK[:, k] >= 0
        row, dout = row_AK[here, k], dout_AD[here].to(acc)
        drows_RD[row] = (dout * weight_AK[here, k, None].to(acc)).to(rows_RD.dtype)
        dweight_AK[here, k] = (dout * rows_RD[row].to(acc)).sum(dim=1).to(weight_AK.dtype)
    return drows_RD, dweight_AK


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`out_r = W_e x_r` for the rows of each expert; rows past `ends_E[-1]` are zeros."""
    outs, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        outs.append(x_RI[start:end] @ weight_EOI[expert].T)
        start = end
    outs.append(x_RI.new_zeros(x_RI.shape[0] - start, weight_EOI.shape[1]))
    return torch.cat(outs)


def grouped_swiglu(x_RI: Tensor, weight_EGI: Tensor, ends_E: Tensor) -> Tensor:
    """`silu(gate) * up` of the halves of `grouped_linear`."""
    return swiglu(grouped_linear(x_RI, weight_EGI, ends_E))


def weight_gradient(dy_RO: Tensor, x_RI: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`dy^T x`, summed in float32 (float64 operands in float64)."""
    acc = wide(x_RI.dtype)
    return (dy_RO.to(acc).T @ x_RI.to(acc)).to(dtype)


def grouped_weight_gradient(dy_RO: Tensor, x_RI: Tensor, ends_E: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`dy_e^T x_e` over the rows of each expert."""
    out_EOI = x_RI.new_zeros(ends_E.shape[0], dy_RO.shape[1], x_RI.shape[1], dtype=dtype)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            out_EOI[expert] = weight_gradient(dy_RO[start:end], x_RI[start:end], dtype=dtype)
        start = end
    return out_EOI


def add_weight_gradient(into: Tensor, dy_RO: Tensor, x_RI: Tensor, *, fresh: bool = False) -> None:
    """`into += dy^T x`, multiplied and summed in into's dtype; with `fresh`, `into = dy^T x`."""
    if fresh:
        into.zero_()
    into.addmm_(dy_RO.to(into.dtype).T, x_RI.to(into.dtype))


def add_grouped_weight_gradient(
    into_EOI: Tensor, dy_RO: Tensor, x_RI: Tensor, ends_E: Tensor, *, fresh: bool, squares: bool = False
) -> Tensor | None:
    """`into_e += dy_e^T x_e` over the rows of each expert."""
    if fresh:
        into_EOI.zero_()
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            add_weight_gradient(into_EOI[expert], dy_RO[start:end], x_RI[start:end])
        start = end
    return squares_of(into_EOI) if squares else None


def squares_of(x: Tensor) -> Tensor:
    """The sum of squares of all elements, read from memory: one element."""
    return torch.linalg.vector_norm(x).square().view(1)
