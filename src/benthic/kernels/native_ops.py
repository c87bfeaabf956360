"""Ops through the library of `native_c`: float32 on a CPU, for inference.

They compute no gradients and read every float operand as float32: the table's verdicts keep other calls away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels.native import library
from benthic.kernels.reference.moe import Permuted, Routing, RowMaps, added, followed

if TYPE_CHECKING:
    from torch import Tensor


def _rows(x: Tensor) -> Tensor:
    """`x` itself if its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `benthic.kernels.ops.rms_norm`."""
    x = _rows(x) if x.dim() == 2 else x.contiguous()
    weight_D, width = weight_D.contiguous(), x.shape[-1]
    out = torch.empty(x.shape)
    stride = x.stride(0) if x.dim() == 2 else width
    library().add_rms_norm(
        x.data_ptr(),
        stride,
        None,
        0,
        weight_D.data_ptr(),
        None,
        out.data_ptr(),
        out.numel() // width,
        width,
        eps,
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `benthic.kernels.ops.add_rms_norm`."""
    if residual is None:
        return rms_norm(x, weight_D, eps), x
    x, residual, weight_D = x.contiguous(), residual.contiguous(), weight_D.contiguous()
    width = x.shape[-1]
    out, total = torch.empty(x.shape), torch.empty(x.shape)
    library().add_rms_norm(
        x.data_ptr(),
        width,
        residual.data_ptr(),
        width,
        weight_D.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        out.numel() // width,
        width,
        eps,
    )
    return out, total


def swiglu(gate_up: Tensor) -> Tensor:
    """See `benthic.kernels.ops.swiglu`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width))
    library().swiglu(gate_up.data_ptr(), 2 * width, out.data_ptr(), out.numel() // max(width, 1), width)
    return out


def rope(x: Tensor, cos_Tr2: Tensor, sin_Tr2: Tensor) -> Tensor:
    """See `benthic.kernels.ops.rope`."""
    x, cos_Tr2, sin_Tr2 = _rows(x), cos_Tr2.contiguous(), sin_Tr2.contiguous()
    heads, head_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
    out = torch.empty(x.shape)
    library().rope(
        x.data_ptr(),
        x.stride(0),
        head_stride,
        cos_Tr2.data_ptr(),
        sin_Tr2.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        heads,
        x.shape[-1] // 2,
    )
    return out


def rope_and_norm(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `benthic.kernels.ops.rope_and_norm`."""
    query, key = (rope(x, cos_Tr2, sin_Tr2) for x in (q_rope_THr, k_rope_Tr))
    return query, key, rms_norm(latent_TC, weight_C, eps)


def store_latent(cache_PBW: Tensor, latent_TC: Tensor, rope_Tr: Tensor, slot_T: Tensor) -> None:
    """See `benthic.kernels.ops.store_latent`."""
    latent_TC, rope_Tr, slot_T = _rows(latent_TC), _rows(rope_Tr), slot_T.to(torch.int64).contiguous()
    library().store_latent(
        cache_PBW.data_ptr(),
        latent_TC.data_ptr(),
        latent_TC.stride(0),
        rope_Tr.data_ptr(),
        rope_Tr.stride(0),
        slot_T.data_ptr(),
        latent_TC.shape[0],
        latent_TC.shape[1],
        rope_Tr.shape[1],
    )


def mla_decode(
    q_latent_SQHC: Tensor,
    q_rope_SQHr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    context_S: Tensor,
    *,
    scale: float,
) -> Tensor:
    """See `benthic.kernels.ops.mla_decode`; one sequence a thread, nothing is gathered."""
    q_latent_THC, q_rope_THr = _rows(q_latent_SQHC.flatten(0, 1)), _rows(q_rope_SQHr.flatten(0, 1))
    table_SP = _rows(block_table_SP.to(torch.int32))
    context_S = context_S.to(torch.int32).contiguous()
    sequences, queries, heads, latent = q_latent_SQHC.shape
    out = torch.empty((sequences, queries, heads, latent))
    failed = library().mla_decode(
        q_latent_THC.data_ptr(),
        q_latent_THC.stride(0),
        q_latent_THC.stride(1),
        q_rope_THr.data_ptr(),
        q_rope_THr.stride(0),
        q_rope_THr.stride(1),
        cache_PBW.data_ptr(),
        table_SP.data_ptr(),
        table_SP.stride(0),
        context_S.data_ptr(),
        out.data_ptr(),
        sequences,
        queries,
        heads,
        cache_PBW.shape[2],
        latent,
        cache_PBW.shape[1],
        scale,
    )
    if failed:
        longest = int(context_S.max())
        msg = f"mla_decode: no memory for the scores of {sequences} contexts up to {longest} tokens"
        raise MemoryError(msg)
    return out


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
    """See `benthic.kernels.ops.route`; among equal scores the lower expert comes first."""
    logits_TE = logits_TE.contiguous()
    bias_E = None if bias_E is None else bias_E.contiguous()
    tokens, experts = logits_TE.shape
    scores_TE = torch.empty((tokens, experts))
    expert_TK = torch.empty((tokens, top_k), dtype=torch.int32)
    weight_TK = torch.empty((tokens, top_k))
    grouped = n_group > 1 and topk_method != "greedy"
    library().route(
        logits_TE.data_ptr(),
        None if bias_E is None else bias_E.data_ptr(),
        scores_TE.data_ptr(),
        expert_TK.data_ptr(),
        weight_TK.data_ptr(),
        tokens,
        experts,
        top_k,
        n_group,
        topk_group,
        (2 if topk_method == "noaux_tc" else 1) if grouped else 0,
        scoring_func == "softmax",
        norm_topk_prob,
        routed_scaling_factor,
    )
    return Routing(scores_TE, expert_TK, weight_TK)


def permute(x_TD: Tensor, expert_TK: Tensor, num_experts: int, slot_T: Tensor | None = None) -> Permuted:
    """See `benthic.kernels.ops.permute`; a counting sort."""
    x_TD, expert_TK = x_TD.contiguous(), followed(expert_TK, slot_T).to(torch.int32).contiguous()
    (tokens, width), top_k = x_TD.shape, expert_TK.shape[1]
    rows_RD = torch.empty((tokens * top_k, width))
    ends_E = torch.empty(num_experts, dtype=torch.int32)
    row_TK = torch.empty((tokens, top_k), dtype=torch.int64)
    copy_R = torch.empty(tokens * top_k, dtype=torch.int64)
    library().permute(
        x_TD.data_ptr(),
        expert_TK.data_ptr(),
        rows_RD.data_ptr(),
        ends_E.data_ptr(),
        row_TK.data_ptr(),
        copy_R.data_ptr(),
        tokens,
        top_k,
        num_experts,
        width,
    )
    return Permuted(rows_RD, ends_E, RowMaps(row_TK, copy_R))


def unpermute(rows_RD: Tensor, maps: RowMaps, weight_TK: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensor:
    """See `benthic.kernels.ops.unpermute`."""
    rows_RD, weight_TK = rows_RD.contiguous(), weight_TK.to(torch.float32).contiguous()
    row_TK = maps.row_TK.contiguous()
    (tokens, top_k), width = row_TK.shape, rows_RD.shape[1]
    out_TD = torch.empty((tokens, width))
    library().unpermute(
        rows_RD.data_ptr(), row_TK.data_ptr(), weight_TK.data_ptr(), out_TD.data_ptr(), tokens, top_k, width
    )
    return added(out_TD, beside)


def linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T` for a float32 weight of stride 1 in its first dim; x [rows, in]."""
    x_RI = _rows(x_RI)
    outer, inner = weight_OI.shape
    out_RO = torch.empty((x_RI.shape[0], outer))
    library().linear(
        x_RI.data_ptr(),
        x_RI.stride(0),
        weight_OI.data_ptr(),
        weight_OI.stride(1),
        out_RO.data_ptr(),
        x_RI.shape[0],
        inner,
        outer,
    )
    return out_RO


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """See `benthic.kernels.ops.grouped_linear`; for weights whose outputs lie side by side in memory.

    Such weights are transposed views of [E, I, O]; a server lays them out so once, when it loads them.
    """
    x_RI, ends_E = x_RI.contiguous(), ends_E.to(torch.int32).contiguous()
    experts, outer, inner = weight_EOI.shape
    out_RO = torch.empty((x_RI.shape[0], outer))
    library().grouped_linear(
        x_RI.data_ptr(),
        weight_EOI.data_ptr(),
        weight_EOI.stride(0),
        weight_EOI.stride(2),
        ends_E.data_ptr(),
        out_RO.data_ptr(),
        x_RI.shape[0],
        experts,
        inner,
        outer,
    )
    return out_RO
