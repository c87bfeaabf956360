# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Flash attention backward for Hopper: two Gluon kernels, as in `triton_attention_backward`, no atomics.

In both one warp loads by TMA and two groups of warps multiply, with their weights in registers as left
operands. What each starts before it waits:

    dQ, 64 queries a group, over blocks of 64 keys (`gluon_query_gradient`):
        S_i = Q K_i^T,  dP_i = dO V_i^T,  dQ += dS_(i-1) K_(i-1)    then  P_i = 2^(S_i - lse)  and dS_i
    dK and dV, 64 keys a group, over blocks of 64 queries, scores turned round (`gluon_key_gradients`):
        S_i^T = K Q_i^T,  dK += dS_(i-1)^T Q_(i-1)                  then  P_i^T = 2^(S_i^T - lse)
        dP_i^T = V dO_i^T,  dV += P_i^T dO_i                        then  dS_i^T = P_i^T (dP_i^T - delta)

The first block has no weights before it: it multiplies zeros.
"""

from __future__ import annotations

import torch

from benthic.kernels.gluon_key_gradients import key_gradients
from benthic.kernels.gluon_query_gradient import query_gradient
from benthic.kernels.gluon_tiles import loadable, rows_of
from benthic.kernels.host import cdiv
from benthic.kernels.triton_attention_backward import row_dots, split_width
from benthic.kernels.triton_pack_tiles import grid_of

TILE = 128
"""Queries, or keys, of a program: 64 in each group of warps."""
BLOCK = 64
"""Keys, or queries, of a block in the ring."""
STAGES = 3
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
ENTRY_REGISTERS = 168
"""Of a thread before the groups divide them: 65,536 over three groups of 128 threads."""


def gradients(ctx, dout_THv):
    """Those of queries, keys and values, and None for the seven others that a forward pass takes."""
    if dout_THv is None:
        return (None,) * 10
    q_THd, k_THd, v_THv, out_THv, lse_HT, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    max_q, max_k, scale, causal, lists = ctx.settings
    nothing = (None,) * 7
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THd, k_THd, v_THv))
    if q_THd.shape[0] == 0 or k_THd.shape[0] == 0:
        return *(grad.zero_() for grad in grads), *nothing
    dout_THv = loadable(dout_THv)
    delta_HT = deltas(out_THv, dout_THv)
    operands = (q_THd, k_THd, v_THv, dout_THv, lse_HT, delta_HT, cu_seqlens_q, cu_seqlens_k)
    described = _described(operands, causal=causal)
    write_query_gradient(grads[0], operands, described, max_q, scale, lists)
    write_key_gradients(grads[1], grads[2], operands, described, max_k, scale, lists)
    return *grads, *nothing


def deltas(out_THv, dout_THv):
    """`out . dout` of each row, float32 [H, T]."""
    tokens, heads, value = out_THv.shape
    delta_HT = torch.empty(heads, tokens, dtype=torch.float32, device=out_THv.device)
    row_dots[(cdiv(tokens, 64), heads)](
        out_THv, dout_THv, delta_HT, tokens, dout_THv.stride(0), dout_THv.stride(1),
        HEADS=heads, V=value, V_PAD=value, BLOCK_M=64,
    )  # fmt: skip
    return delta_HT


def write_query_gradient(dq_THd, operands, described, max_q, scale, lists):
    """`operands`: queries, keys, values, gradients of the output, log-sum-exp and deltas [H, T], starts."""
    q_THd, k_THd, _v_THv, _dout_THv, lse_HT, delta_HT, starts_q, starts_k = operands
    blocks, strides, sizes = described
    tokens, heads, _ = q_THd.shape
    grid, (tiles, together, is_list) = grid_of(
        starts_q, tokens, max_q, TILE, heads, last_first=sizes["CAUSAL"], lists=lists
    )
    query_gradient[grid](
        *blocks, dq_THd, lse_HT, delta_HT, starts_q, starts_k, tiles, *strides, tokens, scale,
        HEADS=heads, GROUPS=heads // k_THd.shape[1], BLOCK_M=TILE, BLOCK_N=BLOCK, TOGETHER=together,
        LISTED=is_list, **sizes,
    )  # fmt: skip


def write_key_gradients(dk_THd, dv_THv, operands, described, max_k, scale, lists):
    """See `write_query_gradient`."""
    q_THd, k_THd, _v_THv, _dout_THv, lse_HT, delta_HT, starts_q, starts_k = operands
    blocks, strides, sizes = described
    key_heads = k_THd.shape[1]
    grid, (tiles, together, is_list) = grid_of(
        starts_k, k_THd.shape[0], max_k, TILE, key_heads, last_first=False, lists=lists
    )
    key_gradients[grid](
        *blocks, dk_THd, dv_THv, lse_HT, delta_HT, starts_q, starts_k, tiles, *strides,
        q_THd.shape[0], scale,
        KEY_HEADS=key_heads, GROUPS=q_THd.shape[1] // key_heads, BLOCK_M=BLOCK, BLOCK_N=TILE,
        TOGETHER=together, LISTED=is_list, **sizes,
    )  # fmt: skip


def _described(operands, *, causal):
    """Descriptors of blocks of both parts of queries and keys, of values and gradients; strides; sizes."""
    q_THd, k_THd, v_THv, dout_THv = operands[:4]
    d_1, d_2 = split_width(q_THd.shape[-1])
    value = v_THv.shape[-1]
    described = (
        rows_of(q_THd, BLOCK, d_1), rows_of(q_THd, BLOCK, d_2 or d_1), rows_of(dout_THv, BLOCK, value),
        rows_of(k_THd, BLOCK, d_1), rows_of(k_THd, BLOCK, d_2 or d_1), rows_of(v_THv, BLOCK, value),
    )  # fmt: skip
    strides = (q_THd.stride(1), dout_THv.stride(1), k_THd.stride(1), v_THv.stride(1))
    return described, strides, {
        "D_1": d_1, "D_2": d_2, "V": value, "STAGES": STAGES, "CAUSAL": causal,
        "REGISTERS": CONSUMER_REGISTERS, "FEW_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4, "maxnreg": ENTRY_REGISTERS,
    }  # fmt: skip
