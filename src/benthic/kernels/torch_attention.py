"""Attention through torch's fused kernels: on a CPU, and cuDNN for equal-length packs on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from benthic.kernels.reference.attention import bottom_right

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.tile_lists import TileLists

# Above this many cached elements a sequence, copying pages of all sequences into one padded batch costs
# more than one call per sequence (measured on two AVX2 cores: 16 sequences of 200 x 96 elements 460 us
# against 814, of 600 x 160 2268 against 1646).
_GATHER_LIMIT = 65_536


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
    """See `benthic.kernels.ops.attention`; CPU, float32, float64 and bfloat16.

    Packs of equal lengths are one batched call, others one call a sequence. Values are padded to the width of
    keys, because the fused CPU kernel takes one width (about twice as fast at (192, 128) as the unfused one).
    """
    del lists
    width, value = q_THd.shape[-1], v_THv.shape[-1]
    groups = q_THd.shape[1] // k_THd.shape[1]
    if groups > 1:
        k_THd, v_THv = k_THd.repeat_interleave(groups, dim=1), v_THv.repeat_interleave(groups, dim=1)
    wider = max(width, value)
    q_THd, k_THd, v_THv = _widen(q_THd, wider), _widen(k_THd, wider), _widen(v_THv, wider)
    if _equal(q_THd, cu_seqlens_q, max_seqlen_q) and _equal(k_THd, cu_seqlens_k, max_seqlen_k):
        packs = [(q_THd, k_THd, v_THv)]
        sequences = cu_seqlens_q.numel() - 1
    else:
        packs = _split(q_THd, k_THd, v_THv, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
        sequences = 1
    parts = [_attend(*pack, sequences, scale=scale, causal=causal) for pack in packs]
    if len(parts) == 1:
        out_THv, lse_TH = parts[0]
    else:
        out_THv = torch.cat([out for out, _ in parts])
        lse_TH = torch.cat([lse for _, lse in parts])
    return (out_THv if wider == value else out_THv[..., :value]), lse_TH


def _split(
    q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, starts_q: list[int], starts_k: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            q_THd[starts_q[i] : starts_q[i + 1]],
            k_THd[starts_k[i] : starts_k[i + 1]],
            v_THv[starts_k[i] : starts_k[i + 1]],
        )
        for i in range(len(starts_q) - 1)
    ]


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _equal(x: Tensor, cu_seqlens: Tensor, longest: int) -> bool:
    """Whether every sequence has the longest length: only then do they add up to the pack."""
    return x.shape[0] == (cu_seqlens.numel() - 1) * longest


def _attend(
    q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, sequences: int, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of `sequences` sequences of one length; returns `(out_THv, lse_TH)`."""
    tokens, heads = q_THd.shape[:2]
    if tokens == 0 or k_THd.shape[0] == 0:
        return v_THv.new_zeros(tokens, heads, v_THv.shape[2]), v_THv.new_full((tokens, heads), -torch.inf)
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q_THd, k_THd, v_THv))
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and queries != keys and queries > 1:
        mask = bottom_right(queries, keys, device=q.device)
        if queries > keys:  # the first queries see no key: keep them out of the softmax
            return _attend_blind(q_THd, k_THd, v_THv, sequences, scale=scale)
        mask = torch.zeros((), dtype=q.dtype).masked_fill(~mask, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 (returns the lse)
        q, k, v, 0.0, causal and queries == keys, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _attend_blind(
    q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, sequences: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    """More queries than keys under a causal mask: the surplus first ones give zeros and -inf."""
    heads, width = q_THd.shape[1:]
    q_SLHd = q_THd.unflatten(0, (sequences, -1))
    blind = q_SLHd.shape[1] - k_THd.shape[0] // sequences
    out, lse = _attend(q_SLHd[:, blind:].flatten(0, 1), k_THd, v_THv, sequences, scale=scale, causal=True)
    out_SLHv = F.pad(out.unflatten(0, (sequences, -1)), (0, 0, 0, 0, blind, 0))
    lse_SLH = F.pad(lse.unflatten(0, (sequences, -1)), (0, 0, blind, 0), value=-torch.inf)
    return out_SLHv.reshape(-1, heads, width), lse_SLH.reshape(-1, heads)


def cudnn_attention(  # noqa: PLR0913 (packed attention has five operands and its lengths)
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
    """Attention of an equal-length pack by cuDNN's fused kernel; CUDA, bfloat16 and float16.

    The table offers it only for packs whose sequences all have one length, and as many keys as queries.
    The log-sum-exp stays as cuDNN has it, [S, H, L, 1].
    """
    del cu_seqlens_k, max_seqlen_q, max_seqlen_k, lists
    out_THv, lse_SHL = _Cudnn.apply(q_THd, k_THd, v_THv, cu_seqlens_q.numel() - 1, causal, scale)
    return out_THv, lse_SHL


class _Cudnn(torch.autograd.Function):
    """Both kernels on views by sequence, one view an operand: autograd would make two each way."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THv: Tensor,
        sequences: int,
        causal: bool,  # noqa: FBT001
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Save operands, output, log-sum-exp and what dropout, which there is none of, would need."""
        operands = tuple(_by_sequence(x, sequences) for x in (q_THd, k_THd, v_THv))
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001 (returns the lse)
            *operands,
            attn_bias=None,
            compute_log_sumexp=True,
            dropout_p=0.0,
            is_causal=causal,
            return_debug_mask=False,
            scale=scale,
        )
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = result
        ctx.save_for_backward(*operands, out, lse, seed, offset, None, cu_q, cu_k)
        ctx.settings, ctx.scale = (max_q, max_k, 0.0, causal), scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return _by_token(out), lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the operands."""
        dout_THv = grads[0]
        if dout_THv is None:
            return (None,) * 6
        operands = ctx.saved_tensors
        dout = _by_sequence(dout_THv, operands[0].shape[0])
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
            dout, *operands, *ctx.settings, scale=ctx.scale
        )
        return *(_by_token(each) for each in found), None, None, None


def _by_sequence(x_THd: Tensor, sequences: int) -> Tensor:
    """`[T, H, d]` as `[S, H, L, d]`, all sequences being of one length: one view."""
    tokens, heads, width = x_THd.shape
    length, (token, head, column) = tokens // sequences, x_THd.stride()
    return x_THd.as_strided((sequences, heads, length, width), (length * token, head, token, column))


def _by_token(x_SHLd: Tensor) -> Tensor:
    """`[S, H, L, d]` as `[T, H, d]`: one view where sequences follow one another in memory."""
    sequences, heads, length, width = x_SHLd.shape
    sequence, head, token, column = x_SHLd.stride()
    if sequences > 1 and sequence != length * token:
        return x_SHLd.transpose(1, 2).flatten(0, 1)
    return x_SHLd.as_strided((sequences * length, heads, width), (token, head, column))


def mla_decode(
    q_latent_SQHC: Tensor,
    q_rope_SQHr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    context_S: Tensor,
    *,
    scale: float,
) -> Tensor:
    """See `benthic.kernels.ops.mla_decode`; CPU. Heads and queries are rows, so the latent is read once.

    Contexts decide how sequences share calls: short ones are padded into one batch, long ones go one by one.
    """
    query_SQHW = torch.cat((q_latent_SQHC, q_rope_SQHr), dim=-1).to(cache_PBW.dtype)
    contexts = context_S.tolist()
    longest = max(contexts, default=0)
    if longest == 0:
        return torch.zeros_like(q_latent_SQHC)
    if longest * cache_PBW.shape[-1] <= _GATHER_LIMIT and min(contexts) >= query_SQHW.shape[1]:
        out = _decode_together(query_SQHW, cache_PBW, block_table_SP, context_S, longest, scale)
    else:
        out = _decode_apart(query_SQHW, cache_PBW, block_table_SP, contexts, scale)
    return out[..., : q_latent_SQHC.shape[-1]].to(q_latent_SQHC.dtype)


def _decode_together(
    query_SQHW: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    context_S: Tensor,
    longest: int,
    scale: float,
) -> Tensor:
    """All sequences in two batched products over pages copied side by side; every query sees a key."""
    sequences, queries, heads, width = query_SQHW.shape
    pages_SP = block_table_SP[:, : -(-longest // cache_PBW.shape[1])]
    column_L = torch.arange(pages_SP.shape[1] * cache_PBW.shape[1])
    kept_SL = column_L < context_S.unsqueeze(1)
    # Entries of a block table past the context may be anything: read page 0 there instead.
    pages_SP = pages_SP.masked_fill(~kept_SL[:, :: cache_PBW.shape[1]], 0)
    key_SLW = cache_PBW[pages_SP].view(sequences, -1, width)
    score_SAL = torch.baddbmm(
        key_SLW.new_empty(()),
        query_SQHW.view(sequences, -1, width),
        key_SLW.transpose(1, 2),
        beta=0,
        alpha=scale,
    )
    hidden = ~kept_SL.view(sequences, 1, 1, -1)
    if queries > 1:
        seen_SQ = context_S.unsqueeze(1) - torch.arange(queries - 1, -1, -1)
        hidden = column_L >= seen_SQ.view(sequences, queries, 1, 1)
    score_SQHL = score_SAL.view(sequences, queries, heads, -1).masked_fill_(hidden, -torch.inf)
    prob_SAL = torch.softmax(score_SQHL, dim=-1).view(sequences, queries * heads, -1)
    # Masked keys get weight 0, but 0 times a NaN left in an unused slot is NaN: clear those rows.
    key_SLW.masked_fill_(~kept_SL.unsqueeze(-1), 0.0)
    return torch.bmm(prob_SAL, key_SLW).view_as(query_SQHW)


def _decode_apart(
    query_SQHW: Tensor, cache_PBW: Tensor, block_table_SP: Tensor, contexts: list[int], scale: float
) -> Tensor:
    """One fused attention call a sequence, without padding."""
    queries, heads, width = query_SQHW.shape[1:]
    block = cache_PBW.shape[1]
    out = torch.zeros_like(query_SQHW)
    for sequence, context in enumerate(contexts):
        if context == 0:
            continue
        key_LW = cache_PBW[block_table_SP[sequence, : -(-context // block)]].view(-1, width)[:context]
        first = max(queries - context, 0)  # queries before the first token see nothing and stay zero
        query_AW = query_SQHW[sequence, first:].reshape(-1, width)
        mask = None
        if queries - first > 1:
            seen = bottom_right(queries - first, context, device=key_LW.device).repeat_interleave(
                heads, dim=0
            )
            mask = torch.zeros((), dtype=key_LW.dtype).masked_fill(~seen, -torch.inf)
        rows = F.scaled_dot_product_attention(
            query_AW[None, None], key_LW[None, None], key_LW[None, None], attn_mask=mask, scale=scale
        )
        out[sequence, first:] = rows.view(-1, heads, width)
    return out
