"""Definitions of attention over packed sequences and over the paged latent cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benthic.kernels.reference.fp8 import E4M3_MAX
from benthic.kernels.reference.norm import rope_and_norm, wide

if TYPE_CHECKING:
    from benthic.kernels.tile_lists import TileLists


class Slots(NamedTuple):
    """Where a layer's latents and rotated keys are written.

    Attributes:
        cache_PBW: the pages of the layer, contiguous: a latent of C, then a key of r.
        slot_T: integer, each row's `page * B + offset`; -1 for rows that are not kept. Slots must differ.
        alone: the pages are all that is read: neither latents nor keys are wanted as tensors of their own.
    """

    cache_PBW: Tensor
    slot_T: Tensor
    alone: bool

    def returned(self, k_rope_Tr: Tensor, latent_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Both, without any rows where only the pages are read."""
        return (k_rope_Tr[:0], latent_TC[:0]) if self.alone else (k_rope_Tr, latent_TC)


def attention(  # noqa: PLR0913 (packed attention has five operands and its lengths)
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    lists: TileLists | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T * scale + mask) v`, one sequence after another; returns `(out_THv, lse_TH)`.

    The causal mask is aligned to the end: the last query sees every key. A query that sees no key gives
    zeros and a log-sum-exp of -inf.
    """
    del max_seqlen_q, max_seqlen_k, lists  # the definition loops; only kernels size a grid by them
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for sequence in range(len(starts_q) - 1):
        rows = slice(starts_q[sequence], starts_q[sequence + 1])
        columns = slice(starts_k[sequence], starts_k[sequence + 1])
        out, lse = attend_one(q_THd[rows], k_THd[columns], v_THv[columns], scale=scale, causal=causal)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def attention_of_parts(  # noqa: PLR0913 (packed attention has its operands and its lengths)
    q_nope_THn: Tensor,
    q_rope_THr: Tensor,
    k_nope_THn: Tensor,
    k_rope_Tr: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    lists: TileLists | None = None,
) -> Tensor:
    """`attention` with `q = [q_nope; q_rope]` and `k = [k_nope; k_rope]`, k_rope being that of every head."""
    q_THd = torch.cat((q_nope_THn, q_rope_THr), dim=-1)
    rope_THr = k_rope_Tr.unsqueeze(1).expand(-1, k_nope_THn.shape[1], -1)
    k_THd = torch.cat((k_nope_THn, rope_THr), dim=-1)
    return attention(
        q_THd,
        k_THd,
        v_THv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        causal=True,
        lists=lists,
    )[0]


def attend_one(
    q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One sequence of `attention`, with the whole score matrix in memory."""
    groups = q_THd.shape[1] // k_THd.shape[1]
    k_THd = k_THd.repeat_interleave(groups, dim=1)
    v_THv = v_THv.repeat_interleave(groups, dim=1)
    acc = wide(q_THd.dtype)
    score_HTT = torch.einsum("ihd,jhd->hij", q_THd.to(acc), k_THd.to(acc)) * scale
    if causal:
        score_HTT = score_HTT.masked_fill(
            ~bottom_right(*score_HTT.shape[1:], device=q_THd.device), -torch.inf
        )
    lse_HT = torch.logsumexp(score_HTT, dim=-1)
    blind_HT = lse_HT == -torch.inf
    prob_HTT = torch.exp(score_HTT - lse_HT.masked_fill(blind_HT, 0.0).unsqueeze(-1))
    out_THv = torch.einsum("hij,jhv->ihv", prob_HTT, v_THv.to(acc))
    return out_THv.to(q_THd.dtype), lse_HT.transpose(0, 1)


def bottom_right(queries: int, keys: int, *, device: torch.device) -> Tensor:
    """Which keys each query sees when the last query sees every key: bool [queries, keys]."""
    row = torch.arange(queries, device=device).unsqueeze(1)
    return torch.arange(keys, device=device) <= row + (keys - queries)


def mla_decode(
    q_latent_SQHC: Tensor,
    q_rope_SQHr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    context_S: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Absorbed attention against the paged latent cache, one sequence after another.

    `score_j = (q_latent . c_j + q_rope . k_j) * scale`, `out = sum_j softmax(score)_j c_j`: attention with
    one key head whose value is the latent part of the key. The last query of a sequence sees all `context`
    tokens.
    """
    latent_dim = q_latent_SQHC.shape[-1]
    query_SQHW = torch.cat((q_latent_SQHC, q_rope_SQHr), dim=-1)
    out = torch.zeros_like(q_latent_SQHC)
    for sequence, context in enumerate(context_S.tolist()):
        if context == 0:
            continue
        pages = block_table_SP[sequence, : -(-context // cache_PBW.shape[1])].long()
        key_T1W = take_rows(cache_PBW, pages).flatten(0, 1)[:context].unsqueeze(1).to(query_SQHW.dtype)
        out[sequence] = attend_one(
            query_SQHW[sequence], key_T1W, key_T1W[..., :latent_dim], scale=scale, causal=True
        )[0]
    return out


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """`source[index]` along the first dim, also for FP8, which torch moves as bytes."""
    if source.dtype != torch.float8_e4m3fn:
        return source[index]
    return source.view(torch.uint8)[index].view(source.dtype)


def store_latent(cache_PBW: Tensor, latent_TC: Tensor, rope_Tr: Tensor, slot_T: Tensor) -> None:
    """Write each token's latent and rotary key into its slot (`page * B + offset`); slot -1 is skipped."""
    kept_T = slot_T >= 0
    rows_TW = torch.cat((latent_TC, rope_Tr), dim=-1)
    if cache_PBW.dtype == torch.float8_e4m3fn:
        # bytes, since torch moves FP8 rows by index on no device
        rows_TW = rows_TW.clamp(-E4M3_MAX, E4M3_MAX).to(cache_PBW.dtype).view(torch.uint8)
        cache_PBW = cache_PBW.view(torch.uint8)
    cache_PBW.view(-1, cache_PBW.shape[-1])[slot_T[kept_T].long()] = rows_TW[kept_T].to(cache_PBW.dtype)


def rope_norm_store(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
    into: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and normalise, then write to the cache."""
    query, key, latent = rope_and_norm(q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2)
    store_latent(into.cache_PBW, latent, key, into.slot_T)
    return query, *into.returned(key, latent)


def copy_blocks(source_LPBW: Tensor, from_R: Tensor, target_LPBW: Tensor, to_R: Tensor) -> None:
    """`target[:, to_r] = source[:, from_r]` where `from_r` is a block."""
    from_R, to_R = from_R[from_R >= 0], to_R[from_R >= 0]
    if source_LPBW.dtype == torch.float8_e4m3fn:  # bytes, since torch moves FP8 rows by index on no device
        source_LPBW, target_LPBW = source_LPBW.view(torch.uint8), target_LPBW.view(torch.uint8)
    copied_LRBW = source_LPBW[:, from_R.long().to(source_LPBW.device)].to(target_LPBW.device)
    target_LPBW[:, to_R.long().to(target_LPBW.device)] = copied_LRBW
