"""Public op: attention over packed sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from benthic.errors import ShapeError
from benthic.kernels.ops.heads import join_head_dims
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    anywhere,
    device_type,
    gluon_refusal,
    inference_only,
    no,
    on,
    one_dtype,
    reference,
    triton_runs,
    yes,
)
from benthic.kernels.tile_lists import TileLists

if TYPE_CHECKING:
    from torch import Tensor

_SDPA = on(
    "cpu",
    torch.float32,
    torch.float64,
    torch.bfloat16,
    reason="torch's fused CPU attention, one call a length",
)

_TRITON = triton_runs(
    torch.bfloat16,
    torch.float16,
    torch.float32,
    reason="our flash attention: any lengths and head dims, deterministic backward",
    dot=True,
)


def _gluon(case: Case) -> Verdict:
    """Our fastest kernels; docs/adr/0023 has their figures beside cuDNN's."""
    if (refusal := gluon_refusal(case)) is not None:
        return no(refusal)
    if case.dims[:2] not in ((64, 64), (128, 128), (192, 128)):
        return no(f"takes heads of (64, 64), (128, 128) and (192, 128) dims, not {case.dims[:2]}")
    return yes("our flash attention for Hopper: loads and products of their own warps; any lengths")


def _gluon_parts(case: Case) -> Verdict:
    """The same kernel on operands that lie where products and rotations left them."""
    if (refusal := gluon_refusal(case)) is not None:
        return no(refusal)
    if case.dims != (128, 64, 128):
        return no(f"takes heads of 128 + 64 and 128 dims, not {case.dims}")
    return yes("our flash attention for Hopper, which loads both parts of a head by themselves anyway")


def _cudnn(case: Case) -> Verdict:
    """The fastest library kernel for packs of one length: 532 / 404 TFLOP/s forward / backward on an H200.

    Measured at (192, 128), bfloat16, causal, 4 x 4096 tokens, 16 heads (torch 2.11, cuDNN 9.19). It
    prepares a plan for every new length, so only lengths that recur (multiples of 128) go there.
    """
    if case.device != "cuda" or case.dtype not in (torch.bfloat16, torch.float16):
        return no(f"runs on cuda in bfloat16 and float16, not on {case.device} in {case.dtype}")
    if not case.equal:
        return no("takes packs whose sequences all have one length, a multiple of 128")
    if case.dims[2] > 1 or any(dim % 8 or dim > 256 for dim in case.dims[:2]):
        return no(f"takes as many key as query heads, of at most 256 dims in eights, not {case.dims}")
    return yes("cuDNN 9: the fastest library kernel on Hopper for equal lengths (H200: 532 / 404 TFLOP/s)")


ATTENTION = Op(
    "attention",
    (
        Implementation("gluon", _gluon, "benthic.kernels.gluon_attention:attention"),
        Implementation("cudnn", _cudnn, "benthic.kernels.torch_attention:cudnn_attention"),
        Implementation("sdpa", _SDPA, "benthic.kernels.torch_attention:attention"),
        Implementation("triton", _TRITON, "benthic.kernels.triton_attention:attention"),
        reference("benthic.kernels.reference.attention:attention"),
    ),
    typical_dims=(192, 128, 1),
)

ATTENTION_OF_PARTS = Op(
    "attention_of_parts",
    (
        Implementation(
            "gluon",
            inference_only(one_dtype(_gluon_parts)),
            "benthic.kernels.gluon_attention:attention_of_parts",
        ),
        Implementation(
            "joined",
            anywhere("join_head_dims of queries and of keys, then attention: see the lines of these"),
            "benthic.kernels.ops.attention:joined",
        ),
        reference("benthic.kernels.reference.attention:attention_of_parts"),
    ),
    typical_dims=(128, 64, 128),
)


@overload
def attention(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool = ...,
    lists: TileLists | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool = ...,
    lists: TileLists | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


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
    causal: bool = True,
    lists: TileLists | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(q k^T * scale) v` within each sequence of a pack.

    Shapes: q [Tq, H, d], k [Tk, G, d], v [Tk, G, v] with G dividing H (query heads share key heads in order);
    cu_seqlens int32 [S + 1], running starts of the sequences, from 0 to Tq or Tk; max_seqlen the longest of
    each. The causal mask is aligned to the end, so with fewer queries than keys the last query sees every
    key. `lists` belongs to the bounds: layers that share it list their tiles once.
    Returns: out [Tq, H, v]; with `return_lse` also the natural log-sum-exp of the scaled scores, float32
    [Tq, H] (not differentiable). A query that sees no key gives zeros and -inf.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    Cost: 2 H (d + v) FLOPs a visible query-key pair; backward 2 H (3 d + 2 v).
    """
    _check(q_THd, k_THd, v_THv, cu_seqlens_q, cu_seqlens_k)
    case = Case(
        device_type(q_THd),
        q_THd.dtype,
        (q_THd.shape[-1], v_THv.shape[-1], q_THd.shape[1] // k_THd.shape[1]),
        _equal(q_THd, k_THd, cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k),
        grad=torch.is_grad_enabled() and (q_THd.requires_grad or k_THd.requires_grad or v_THv.requires_grad),
    )
    out_THv, lse = ATTENTION.choose(case, impl)(
        q_THd,
        k_THd,
        v_THv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        causal=causal,
        lists=TileLists() if lists is None else lists,
    )
    return (out_THv, _by_token(lse.detach())) if return_lse else out_THv


def attention_of_parts(  # noqa: PLR0913 (packed attention has its operands, two of them in parts, and its lengths)
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
    impl: str | None = None,
) -> Tensor:
    """Causal `attention` of heads whose last dims lie apart, those of keys once for all heads; to the bit.

    Shapes: q_nope [Tq, H, n], q_rope [Tq, H, r], k_nope [Tk, G, n], k_rope [Tk, r], v [Tk, G, v], of one
    dtype; the rest as `attention` of `join_head_dims(q_nope, q_rope)` and `join_head_dims(k_nope, k_rope)`,
    which are not written where a kernel reads the parts.
    Returns: out [Tq, H, v]. Where autograd records, the parts are joined.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    """
    if (
        q_nope_THn.shape[:2] != q_rope_THr.shape[:2]
        or q_rope_THr.shape[-1] != k_rope_Tr.shape[-1]
        or k_nope_THn.shape[0] != k_rope_Tr.shape[0]
        or q_nope_THn.shape[-1] != k_nope_THn.shape[-1]
    ):
        got = [tuple(x.shape) for x in (q_nope_THn, q_rope_THr, k_nope_THn, k_rope_Tr)]
        msg = f"attention_of_parts: parts of queries and keys {got} disagree in tokens, heads or dims"
        raise ShapeError(msg)
    _check(q_nope_THn, k_nope_THn, v_THv, cu_seqlens_q, cu_seqlens_k)
    operands = q_nope_THn, q_rope_THr, k_nope_THn, k_rope_Tr, v_THv
    case = Case(
        device_type(q_nope_THn),
        q_nope_THn.dtype,
        (q_nope_THn.shape[-1], q_rope_THr.shape[-1], v_THv.shape[-1]),
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in operands),
        mixed=any(x.dtype is not q_nope_THn.dtype for x in operands),
    )
    out_THv: Tensor = ATTENTION_OF_PARTS.choose(case, impl)(
        *operands,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        lists=TileLists() if lists is None else lists,
    )
    return out_THv


def joined(  # noqa: PLR0913 (as above)
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
    lists: TileLists,
) -> Tensor:
    """See `attention_of_parts`; the table is asked for each of three ops."""
    return attention(
        join_head_dims(q_nope_THn, q_rope_THr),
        join_head_dims(k_nope_THn, k_rope_Tr),
        v_THv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        lists=lists,
    )


def _by_token(lse: Tensor) -> Tensor:
    """`[T, H]` of what an implementation has: that, or cuDNN's `[S, H, L, 1]`."""
    return lse if lse.dim() == 2 else lse.squeeze(-1).transpose(1, 2).flatten(0, 1)


def _equal(q_THd: Tensor, k_THd: Tensor, sequences: int, longest_q: int, longest_k: int) -> bool:
    """Whether a pack on a GPU has one length, a multiple of 128, for queries and keys alike."""
    tokens = sequences * longest_q
    same = longest_q == longest_k and longest_q % 128 == 0
    return not q_THd.is_cpu and same and q_THd.shape[0] == tokens and k_THd.shape[0] == tokens


def _check(q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    if q_THd.dim() != 3 or k_THd.dim() != 3 or v_THv.dim() != 3:
        got = tuple(q_THd.shape), tuple(k_THd.shape), tuple(v_THv.shape)
        msg = f"attention: q, k, v are [tokens, heads, dim], not {got}"
        raise ShapeError(msg)
    if q_THd.shape[2] != k_THd.shape[2]:
        msg = f"attention: queries have {q_THd.shape[2]} dims a head but keys have {k_THd.shape[2]}"
        raise ShapeError(msg)
    if k_THd.shape[:2] != v_THv.shape[:2]:
        msg = (
            f"attention: keys are {tuple(k_THd.shape[:2])} tokens x heads but values {tuple(v_THv.shape[:2])}"
        )
        raise ShapeError(msg)
    if q_THd.shape[1] % k_THd.shape[1]:
        msg = f"attention: {q_THd.shape[1]} query heads are not a multiple of {k_THd.shape[1]} key heads"
        raise ShapeError(msg)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        msg = (
            f"attention: cu_seqlens_q has {cu_seqlens_q.numel() - 1} sequences but cu_seqlens_k has "
            f"{cu_seqlens_k.numel() - 1}"
        )
        raise ShapeError(msg)
