"""Public ops on the paged latent cache: store this step's tokens, attend to all, copy from another cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.native import native_runs
from benthic.kernels.ops.norm import check_rope_and_norm, rope_and_norm
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    anywhere,
    device_type,
    gluon_refusal,
    hopper_refusal,
    inference_only,
    laid_out,
    no,
    on,
    one_dtype,
    reference,
    triton_refusal,
    triton_runs,
    yes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.attention import Slots

FEW_ROWS = 32
"""Query-head pairs of a sequence up to which pages are the tall operand; more are so themselves."""


def _paged_refusal(case: Case) -> str | None:
    """Why our kernels for Hopper do not take a cache as wide as queries; None: they do."""
    return gluon_refusal(case) or _dims_refusal(case)


def _dims_refusal(case: Case) -> str | None:
    if case.dims != (512, 64, 64):
        return f"takes latents of 512 dims, rotary keys of 64 and pages of 64 tokens, not {case.dims}"
    return None


def _gluon(case: Case) -> Verdict:
    """Few rows a sequence, where reading pages is all that matters (docs/adr/0024)."""
    if (refusal := _paged_refusal(case)) is not None:
        return no(refusal)
    if not case.few:
        return no(f"takes at most {FEW_ROWS} query-head pairs a sequence")
    return yes("our paged kernel for Hopper: a warp loads pages, 3.6 to 4.3 TB/s on an H200")


def _gluon_wide(case: Case) -> Verdict:
    """Many rows a sequence, where products matter as much as reading (docs/adr/0024)."""
    if (refusal := _paged_refusal(case)) is not None:
        return no(refusal)
    if case.few:
        return no(f"takes more than {FEW_ROWS} query-head pairs a sequence")
    return yes("our paged kernel for Hopper: loads, scores and values overlap, 380 to 560 TFLOP/s on an H200")


def _gluon_fp8(case: Case) -> Verdict:
    """Few rows a sequence and a cache in E4M3, which four more warps widen (docs/adr/0024)."""
    if case.device != "cuda" or case.dtype is not torch.float8_e4m3fn:
        return no(f"takes a cache on cuda in E4M3, not on {case.device} in {case.dtype}")
    if case.mixed:
        return no("takes queries in bfloat16")
    refusal = triton_refusal("cuda") or hopper_refusal() or _dims_refusal(case)
    if refusal is not None:
        return no(refusal)
    if not case.few:
        return no(f"takes at most {FEW_ROWS} query-head pairs a sequence")
    return yes("our paged kernel for Hopper: a warp loads pages, four widen them, 1.4 to 2.2 TB/s on an H200")


_GLUON = inference_only(one_dtype(laid_out("rows", _gluon)))
_GLUON_FP8 = inference_only(laid_out("rows", _gluon_fp8))
_GLUON_WIDE = inference_only(one_dtype(laid_out("rows", _gluon_wide)))
_NATIVE = inference_only(
    one_dtype(laid_out("rows", native_runs("one sequence a thread, pages read in place")))
)
_NATIVE_STORE = inference_only(one_dtype(native_runs("one call into C")))
_TORCH = inference_only(
    on("cpu", torch.float32, torch.float64, reason="library products: heads as rows over gathered pages")
)

_TRITON_DECODE = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        reason="our paged kernel: pages read once for all heads, contexts split to fill the GPU",
        dot=True,
    )
)
_TRITON_STORE = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        reason="one kernel, nothing waits for the host",
    )
)

_TRITON_NORM_STORE = inference_only(
    one_dtype(
        triton_runs(
            torch.bfloat16,
            torch.float16,
            torch.float32,
            reason="one kernel, which writes what it rotates and norms into the cache",
        )
    )
)

MLA_DECODE = Op(
    "mla_decode",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:mla_decode"),
        Implementation("torch", _TORCH, "benthic.kernels.torch_attention:mla_decode"),
        Implementation("gluon", _GLUON, "benthic.kernels.gluon_mla:mla_decode"),
        Implementation("gluon_wide", _GLUON_WIDE, "benthic.kernels.gluon_mla_wide:mla_decode"),
        Implementation("gluon_fp8", _GLUON_FP8, "benthic.kernels.gluon_mla_fp8:mla_decode"),
        Implementation("triton", _TRITON_DECODE, "benthic.kernels.triton_mla:mla_decode"),
        reference("benthic.kernels.reference.attention:mla_decode"),
    ),
    typical_dims=(512, 64, 64),
    trains=False,
)
STORE_LATENT = Op(
    "store_latent",
    (
        Implementation("native", _NATIVE_STORE, "benthic.kernels.native_ops:store_latent"),
        Implementation("triton", _TRITON_STORE, "benthic.kernels.triton_mla:store_latent"),
        reference("benthic.kernels.reference.attention:store_latent"),
    ),
    typical_dims=(576,),
    trains=False,
)
ROPE_NORM_STORE = Op(
    "rope_norm_store",
    (
        Implementation("triton", _TRITON_NORM_STORE, "benthic.kernels.triton_rope:rope_and_norm"),
        Implementation(
            "two_ops",
            anywhere("rope_and_norm, then store_latent: see the lines of them"),
            "benthic.kernels.ops.decode:norm_then_store",
        ),
        reference("benthic.kernels.reference.attention:rope_norm_store"),
    ),
    trains=False,
)
COPY_BLOCKS = Op(
    "copy_blocks",
    (
        Implementation("triton", _TRITON_STORE, "benthic.kernels.triton_mla:copy_blocks"),
        reference("benthic.kernels.reference.attention:copy_blocks"),
    ),
    typical_dims=(576,),
    trains=False,
)


def mla_decode(
    q_latent_SQHC: Tensor,
    q_rope_SQHr: Tensor,
    cache_PBW: Tensor,
    block_table_SP: Tensor,
    context_S: Tensor,
    *,
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Absorbed MLA attention of the last `Q` tokens of each sequence against the paged latent cache.

    DeepSeek-V2 report appendix C in the absorbed order: `score = (q_latent . c + q_rope . k_rope) * scale`,
    `out = softmax(score) c`.
    Shapes: q_latent [S, Q, H, C] (queries times W^UK), q_rope [S, Q, H, r]; cache [pages, block, C + r],
    the latent first; block_table int32 [S, P], whose entries past the context are never read; context int32
    [S] counts all cached tokens including these Q, so query j sees `context - (Q - 1 - j)` of them.
    `context = 0` gives zeros.
    A cache in E4M3 is widened to the queries' dtype as it is read.
    Returns: out [S, Q, H, C] in the queries' dtype; multiply by W^UV for values.
    For inference: where autograd records, only the definition runs.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    Cost: reads `sum(context) * (C + r)` elements once; 2 H Q (2 C + r) FLOPs a cached token.
    """
    _check_decode(q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S)
    dtype = cache_PBW.dtype
    usual = torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype
    case = Case(
        device_type(cache_PBW),
        dtype,
        (q_latent_SQHC.shape[3], q_rope_SQHr.shape[3], cache_PBW.shape[1]),
        grad=torch.is_grad_enabled()
        and (q_latent_SQHC.requires_grad or q_rope_SQHr.requires_grad or cache_PBW.requires_grad),
        mixed=q_latent_SQHC.dtype is not usual or q_rope_SQHr.dtype is not usual,
        few=q_latent_SQHC.shape[1] * q_latent_SQHC.shape[2] <= FEW_ROWS,
        layout="rows" if cache_PBW.is_contiguous() else "strided",
    )
    out: Tensor = MLA_DECODE.choose(case, impl)(
        q_latent_SQHC, q_rope_SQHr, cache_PBW, block_table_SP, context_S, scale=scale
    )
    return out


def store_latent(
    cache_PBW: Tensor, latent_TC: Tensor, rope_Tr: Tensor, slot_T: Tensor, *, impl: str | None = None
) -> None:
    """Write each token's latent and rotary key into its slot of the cache, in place.

    Shapes: cache [pages, block, C + r] contiguous; latent [T, C]; rope [T, r]; slot integer [T] =
    `page * block + offset`, and -1 for tokens that are not kept (padding). Slots must differ.
    A cache in E4M3 takes what lies beyond 448 as 448: it has no infinity.
    For inference: where autograd records, only the definition runs.
    Raises: ShapeError when widths or tokens disagree or the cache has gaps; BackendError when `impl` cannot
    run.
    """
    _check_store("store_latent", cache_PBW, latent_TC, rope_Tr, slot_T)
    dtype = cache_PBW.dtype
    case = Case(
        device_type(cache_PBW),
        dtype,
        (cache_PBW.shape[-1],),
        grad=torch.is_grad_enabled()
        and (latent_TC.requires_grad or rope_Tr.requires_grad or cache_PBW.requires_grad),
        mixed=latent_TC.dtype is not dtype or rope_Tr.dtype is not dtype,
    )
    STORE_LATENT.choose(case, impl)(cache_PBW, latent_TC, rope_Tr, slot_T)


def _check_store(name: str, cache_PBW: Tensor, latent_TC: Tensor, rope_Tr: Tensor, slot_T: Tensor) -> None:
    tokens = latent_TC.shape[0]
    if cache_PBW.shape[-1] != latent_TC.shape[1] + rope_Tr.shape[1]:
        msg = (
            f"{name}: the cache is {cache_PBW.shape[-1]} wide but a token has {latent_TC.shape[1]} "
            f"latent + {rope_Tr.shape[1]} rotary elements"
        )
        raise ShapeError(msg)
    if rope_Tr.shape[0] != tokens or slot_T.shape != (tokens,):
        msg = (
            f"{name}: {tokens} latents, {rope_Tr.shape[0]} rotary keys, slots {tuple(slot_T.shape)}; one each"
        )
        raise ShapeError(msg)
    if not cache_PBW.is_contiguous():
        msg = (
            f"{name}: a cache of {tuple(cache_PBW.shape)} has strides {cache_PBW.stride()}; "
            "allocate it contiguous, since slots are counted through it"
        )
        raise ShapeError(msg)


def rope_norm_store(  # noqa: PLR0913 (the operands of two ops)
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
    into: Slots,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_and_norm`, then `store_latent` of its keys and latents: the bits of the two, in one pass.

    Shapes: as for the two. Where nothing but the cache is read, the keys and latents that come back have no
    rows: `[0, r]` and `[0, C]`.
    For inference: where autograd records, only the definitions run.
    Raises: ShapeError when operands disagree or the cache has gaps; BackendError when `impl` cannot run.
    """
    check_rope_and_norm("rope_norm_store", q_rope_THr, k_rope_Tr, latent_TC, weight_C, cos_Tr2, sin_Tr2)
    _check_store("rope_norm_store", into.cache_PBW, latent_TC, k_rope_Tr, into.slot_T)
    dtype, operands = latent_TC.dtype, (q_rope_THr, k_rope_Tr, latent_TC, weight_C)
    case = Case(
        device_type(latent_TC),
        dtype,
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in operands),
        mixed=any(x.dtype is not dtype for x in operands)
        or into.cache_PBW.dtype not in (dtype, torch.float8_e4m3fn),
    )
    out: tuple[Tensor, Tensor, Tensor] = ROPE_NORM_STORE.choose(case, impl)(
        q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2, into
    )
    return out


def norm_then_store(
    q_rope_THr: Tensor,
    k_rope_Tr: Tensor,
    latent_TC: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_Tr2: Tensor,
    sin_Tr2: Tensor,
    into: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rope_norm_store`; the table is asked for each of the two."""
    query, key, latent = rope_and_norm(q_rope_THr, k_rope_Tr, latent_TC, weight_C, eps, cos_Tr2, sin_Tr2)
    store_latent(into.cache_PBW, latent, key, into.slot_T)
    return query, *into.returned(key, latent)


def copy_blocks(
    source_LPBW: Tensor, from_R: Tensor, target_LPBW: Tensor, to_R: Tensor, *, impl: str | None = None
) -> None:
    """`target[:, to_r] = source[:, from_r]` for all layers, in place: blocks from or to another cache.

    Shapes: source [L, P, block, W] and target [L, P', block, W], both contiguous and of one dtype; from, to
    integer [R] on the device that copies. On a GPU the source may be the memory of another GPU that this one
    can read, and source or target pinned memory of the host; one kernel then loads or stores over the link
    and nothing is kept in between. Blocks in `to` must differ; -1 in `from` copies nothing.
    For inference: where autograd records, only the definition runs.
    Raises: ShapeError when the caches' layers, blocks or dtypes disagree, or one has gaps; BackendError when
    `impl` cannot run.
    """
    shapes = [(x.shape[0], *x.shape[2:], x.dtype) for x in (source_LPBW, target_LPBW)]
    if shapes[0] != shapes[1] or from_R.shape != to_R.shape:
        msg = (
            f"copy_blocks: from {tuple(source_LPBW.shape)} {source_LPBW.dtype} to "
            f"{tuple(target_LPBW.shape)} {target_LPBW.dtype}, blocks {tuple(from_R.shape)} to "
            f"{tuple(to_R.shape)}; only the number of pages may differ"
        )
        raise ShapeError(msg)
    if not (source_LPBW.is_contiguous() and target_LPBW.is_contiguous()):
        msg = (
            f"copy_blocks: strides {source_LPBW.stride()} and {target_LPBW.stride()}; both caches must be "
            "contiguous, since a block is copied in one go"
        )
        raise ShapeError(msg)
    case = Case(
        device_type(to_R),
        target_LPBW.dtype,
        (target_LPBW.shape[3],),
        grad=torch.is_grad_enabled() and source_LPBW.requires_grad,
    )
    COPY_BLOCKS.choose(case, impl)(source_LPBW, from_R, target_LPBW, to_R)


def _check_decode(
    q_latent_SQHC: Tensor, q_rope_SQHr: Tensor, cache_PBW: Tensor, block_table_SP: Tensor, context_S: Tensor
) -> None:
    if q_latent_SQHC.shape[:3] != q_rope_SQHr.shape[:3]:
        msg = (
            f"mla_decode: q_latent is {tuple(q_latent_SQHC.shape[:3])} sequences x queries x heads "
            f"but q_rope is {tuple(q_rope_SQHr.shape[:3])}"
        )
        raise ShapeError(msg)
    width = q_latent_SQHC.shape[3] + q_rope_SQHr.shape[3]
    if cache_PBW.shape[2] != width:
        msg = f"mla_decode: the cache is {cache_PBW.shape[2]} wide but queries are {width} (latent + rope)"
        raise ShapeError(msg)
    sequences = q_latent_SQHC.shape[0]
    if block_table_SP.shape[0] != sequences or context_S.shape[0] != sequences:
        msg = (
            f"mla_decode: {sequences} sequences of queries, {block_table_SP.shape[0]} rows of block_table, "
            f"{context_S.shape[0]} contexts; one each"
        )
        raise ShapeError(msg)
