"""Public mixture-of-experts ops: choose experts, sort rows by expert, multiply, bring rows home."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benthic.errors import ConfigError, ShapeError
from benthic.kernels.native import native_runs
from benthic.kernels.ops.norm import swiglu
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    Verdict,
    anywhere,
    device_type,
    gluon_refusal,
    inference_only,
    laid_out,
    no,
    on,
    one_dtype,
    reference,
    triton_refusal,
    triton_runs,
    with_few_rows,
    yes,
)

if TYPE_CHECKING:
    from benthic.kernels.reference.moe import Permuted, Routing, RowMaps

_GATHERS = on(
    "cpu",
    torch.float32,
    torch.float64,
    torch.bfloat16,
    reason="gathers both ways, float32 sums, hand-written gradients",
)
_LOOP = on("cpu", reason="one product an expert that has rows: widths that grouped_mm refuses")


_TRITON_ROWS = triton_runs(
    torch.bfloat16, torch.float16, torch.float32, reason="one gather each way, float32 sums, no atomics"
)
_FEW_COPIES = inference_only(
    with_few_rows(
        triton_runs(
            torch.bfloat16,
            torch.float16,
            torch.float32,
            reason="one kernel: every copy counts those before it, where a sort and a gather take three",
        )
    )
)
_TRITON_GROUPED = triton_runs(
    torch.bfloat16,
    torch.float16,
    torch.float32,
    reason="our grouped product: any width, rows counted on the device",
    dot=True,
)


def _grouped_mm_cpu(case: Case) -> Verdict:
    """The grouped product of torch wants rows of a multiple of 16 bytes; on a CPU float32 or bfloat16."""
    if case.device != "cpu" or case.dtype not in (torch.float32, torch.bfloat16):
        return no(f"runs on cpu in float32 and bfloat16, not on {case.device} in {case.dtype}")
    return _aligned(case, "torch's grouped product; its gradient needs no loop over experts")


def _grouped_mm_cuda(case: Case) -> Verdict:
    """The grouped product of torch: 492-660 TFLOP/s on an H200 (2.11) where ours makes 551-680."""
    if case.device != "cuda" or case.dtype != torch.bfloat16:
        return no(f"runs on cuda in bfloat16, not on {case.device} in {case.dtype}")
    refusal = triton_refusal(case.device)
    if refusal is not None:
        return no(f"its spare rows are cleared by a Triton kernel, and {refusal}")
    return _aligned(case, "torch's CUTLASS kernel, and one that clears the rows it leaves unwritten")


def gluon_experts(case: Case) -> Verdict:
    """Tiles by TMA, products by wgmma; the gradient of weights is the library's, in bfloat16."""
    if case.device != "cuda" or case.dtype != torch.bfloat16:
        return no(f"runs on cuda in bfloat16, not on {case.device} in {case.dtype}")
    if (refusal := gluon_refusal(case)) is not None:
        return no(refusal)
    if any(width % 64 for width in case.dims):
        return no(f"needs widths of a multiple of 64, which a step of its products has, not {case.dims}")
    return yes("our grouped product for Hopper: 551-680 TFLOP/s on an H200 where torch's makes 492-660")


def _gluon_swiglu(case: Case) -> Verdict:
    """`gluon_experts`, for weights in rows; nothing is kept for gradients."""
    verdict = inference_only(laid_out("rows", gluon_experts))(case)
    reason = "our grouped product for Hopper: gates meet ups before half as much is written"
    return yes(reason) if verdict.runs else verdict


def _gluon_dozens(case: Case) -> Verdict:
    """`gluon_experts`, for some dozens of rows an expert and weights in rows; keeps nothing for gradients."""
    verdict = inference_only(laid_out("rows", gluon_experts))(case)
    if verdict.runs and case.fastest != "gluon_dozens":
        return no("is made for some dozens of rows an expert")
    return yes("weights as the tall operand, on their way also between tiles") if verdict.runs else verdict


def _aligned(case: Case, reason: str) -> Verdict:
    if any(width * case.dtype.itemsize % 16 for width in case.dims):
        return no(f"needs rows of a multiple of 16 bytes, not {case.dims} elements of {case.dtype.itemsize}")
    return yes(reason)


_FEW_ROWS = inference_only(
    with_few_rows(
        triton_runs(
            torch.bfloat16,
            torch.float16,
            torch.float32,
            reason="weights read once, as the tall operand: 3.0 TB/s on an H100",
            dot=True,
        )
    )
)
_TRITON_ROUTE = one_dtype(triton_runs(torch.float32, reason="one kernel, where torch takes a dozen"))


_NATIVE = inference_only(native_runs("one call into C"))
_NATIVE_ROUTE = inference_only(one_dtype(native_runs("one call into C")))
_NATIVE_GROUPED = inference_only(
    laid_out("columns", native_runs("one call into C, weights streamed column by column"))
)

ROUTE = Op(
    "route",
    (
        Implementation("native", _NATIVE_ROUTE, "benthic.kernels.native_ops:route"),
        Implementation("triton", inference_only(_TRITON_ROUTE), "benthic.kernels.triton_route:route"),
        Implementation("triton_autograd", _TRITON_ROUTE, "benthic.kernels.triton_route:differentiable_route"),
        reference("benthic.kernels.reference.moe:route"),
    ),
)
PERMUTE = Op(
    "permute",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:permute"),
        Implementation("torch", _GATHERS, "benthic.kernels.torch_moe:permute"),
        Implementation("few_copies", _FEW_COPIES, "benthic.kernels.triton_permute_few:permute_few"),
        Implementation("triton", _TRITON_ROWS, "benthic.kernels.triton_permute:permute"),
        reference("benthic.kernels.reference.moe:permute"),
    ),
)
UNPERMUTE = Op(
    "unpermute",
    (
        Implementation("native", _NATIVE, "benthic.kernels.native_ops:unpermute"),
        Implementation("torch", _GATHERS, "benthic.kernels.torch_moe:unpermute"),
        Implementation("triton", _TRITON_ROWS, "benthic.kernels.triton_permute:unpermute"),
        reference("benthic.kernels.reference.moe:unpermute"),
    ),
)
GROUPED_LINEAR = Op(
    "grouped_linear",
    (
        Implementation("gluon_dozens", _gluon_dozens, "benthic.kernels.gluon_dozens:grouped_linear"),
        Implementation("few_rows", _FEW_ROWS, "benthic.kernels.triton_few_rows:grouped_linear"),
        Implementation("gluon", gluon_experts, "benthic.kernels.gluon_grouped:grouped_linear"),
        Implementation("grouped_mm_cuda", _grouped_mm_cuda, "benthic.kernels.triton_moe:grouped_mm"),
        Implementation("native", _NATIVE_GROUPED, "benthic.kernels.native_ops:grouped_linear"),
        Implementation("grouped_mm", _grouped_mm_cpu, "benthic.kernels.torch_moe:grouped_mm"),
        Implementation("loop", _LOOP, "benthic.kernels.torch_moe:loop"),
        Implementation("triton", _TRITON_GROUPED, "benthic.kernels.triton_moe:grouped_linear"),
        reference("benthic.kernels.reference.moe:grouped_linear"),
    ),
    typical_dims=(2048, 1408),
)
GROUPED_SWIGLU = Op(
    "grouped_swiglu",
    (
        Implementation("gluon_dozens", _gluon_dozens, "benthic.kernels.gluon_dozens:grouped_swiglu"),
        Implementation("few_rows", _FEW_ROWS, "benthic.kernels.triton_few_rows:grouped_swiglu"),
        Implementation("gluon", _gluon_swiglu, "benthic.kernels.gluon_grouped:grouped_swiglu"),
        Implementation(
            "two_ops",
            anywhere("grouped_linear, then swiglu: see the lines of these"),
            "benthic.kernels.ops.moe:two_ops",
        ),
        reference("benthic.kernels.reference.moe:grouped_swiglu"),
    ),
    typical_dims=(2048, 1408),
    trains=False,
)
FEW_ROWS = 32
"""Rows an expert, on average, up to which `few_rows` reads weights faster than tiles of 256 rows: on an H200
3.8 and 3.7 TB/s with 24 rows for each of 64 experts where those read 3.7 and 3.6, and 3.1 and 3.5 with 48."""
DOZENS_FROM = 17
"""Rows an expert, on average, from which and up to `FEW_ROWS` `gluon_dozens` comes first."""

FEW_COPIES = 2048
"""Copies up to which each of them counts those before it sooner than a sort in two passes ends."""

SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")


def route(  # noqa: PLR0913 (the gate's hyper-parameters, as in the model's config)
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
    impl: str | None = None,
) -> Routing:
    """Choose `top_k` experts per token; the bias steers the choice, not the weights.

    DeepSeek-V3 report eq. (13)-(16); `softmax` with `greedy` or `group_limited_greedy` is DeepSeek-V2's gate.
    Shapes: logits_TE float32 [tokens, experts]; bias_E float32 [experts] or None (read as 0).
    Returns: Routing(scores_TE float32, expert_TK int32 best first, weight_TK float32). Rows of weight_TK
    sum to `routed_scaling_factor` when `norm_topk_prob`. Differentiable in the logits through weights and
    scores.
    Raises: ShapeError when dtypes, experts, groups or top_k disagree; ConfigError for an unknown method.
    """
    _check_route(logits_TE, bias_E, top_k=top_k, n_group=n_group, topk_group=topk_group)
    if scoring_func not in SCORING_FUNCS or topk_method not in TOPK_METHODS:
        msg = (
            f"route: scoring_func={scoring_func!r}, topk_method={topk_method!r}; "
            f"known: {SCORING_FUNCS}, {TOPK_METHODS}"
        )
        raise ConfigError(msg)
    case = Case(
        device_type(logits_TE),
        logits_TE.dtype,
        grad=torch.is_grad_enabled() and logits_TE.requires_grad,
        mixed=bias_E is not None and bias_E.dtype is not logits_TE.dtype,
    )
    routing: Routing = ROUTE.choose(case, impl)(
        logits_TE,
        bias_E,
        scoring_func=scoring_func,
        topk_method=topk_method,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
    return routing


def permute(
    x_TD: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    *,
    slot_T: Tensor | None = None,
    impl: str | None = None,
) -> Permuted:
    """Copy every token to each of its experts, rows sorted by expert and by token within an expert.

    Tokens with a negative slot pad a batch: of few copies (`FEW_COPIES`), theirs go to the experts of the
    first token, so that no expert's weights are read for them alone. Of many, they take their own way.
    Shapes: x [T, D]; expert_TK integer [T, K] in [0, num_experts), distinct within a token; slot_T [T].
    Returns: Permuted(rows_RD with R = T * K, ends_E int32, maps). Differentiable in x; deterministic.
    Raises: ShapeError when tokens disagree.
    """
    if expert_TK.dim() != 2 or expert_TK.shape[0] != x_TD.shape[0]:
        msg = f"permute: {x_TD.shape[0]} tokens but expert_TK is {tuple(expert_TK.shape)}; expected [T, K]"
        raise ShapeError(msg)
    grad, few = torch.is_grad_enabled() and x_TD.requires_grad, expert_TK.numel() <= FEW_COPIES
    case = Case(device_type(x_TD), x_TD.dtype, grad=grad, few=few)
    slot_T = slot_T if few else None
    permuted: Permuted = PERMUTE.choose(case, impl)(x_TD, expert_TK, num_experts, slot_T)
    return permuted


def unpermute(
    rows_RD: Tensor,
    maps: RowMaps,
    weight_TK: Tensor,
    beside: tuple[Tensor, ...] = (),
    *,
    impl: str | None = None,
) -> Tensor:
    """`out_t = sum_k weight_tk * rows[row_tk]`: bring every token's rows home and sum them.

    Shapes: rows [R, D]; maps from `permute`; weight [T, K]; beside up to two tensors [T, D] of the rows'
    dtype. The K terms are summed in float32 in the order of k by gathers, so the result is deterministic;
    rounded once to the rows' dtype, then added to the sum of `beside` as two torch additions would be.
    Differentiable in rows, weights and beside.
    Raises: ShapeError when rows, maps, weights and `beside` disagree.
    """
    if len(beside) > 2 or any(x.shape[1:] != rows_RD.shape[1:] or x.dtype != rows_RD.dtype for x in beside):
        msg = (
            f"unpermute: rows are {tuple(rows_RD.shape)} in {rows_RD.dtype}, but beside them are "
            f"{[(tuple(x.shape), x.dtype) for x in beside]}; at most two of the same width and dtype"
        )
        raise ShapeError(msg)
    if weight_TK.shape != maps.row_TK.shape or rows_RD.shape[0] != maps.copy_R.shape[0]:
        msg = (
            f"unpermute: {rows_RD.shape[0]} rows and weights {tuple(weight_TK.shape)} disagree with maps of "
            f"{maps.copy_R.shape[0]} rows and {tuple(maps.row_TK.shape)} copies"
        )
        raise ShapeError(msg)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (rows_RD, weight_TK, *beside))
    case = Case(device_type(rows_RD), rows_RD.dtype, grad=grad)
    out: Tensor = UNPERMUTE.choose(case, impl)(rows_RD, maps, weight_TK, beside)
    return out


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, *, impl: str | None = None) -> Tensor:
    """`out_r = W_e x_r` for rows sorted by expert; expert e owns rows `ends[e-1] .. ends[e]`.

    Shapes: x [R, I], weight [E, O, I], one dtype; ends int32 [E], not decreasing, at most R. Rows past
    `ends[-1]` give zeros and receive zero gradient. An expert without rows has zero gradient.
    Differentiable in x and weight.
    Raises: ShapeError when operands disagree; BackendError when `impl` cannot run.
    Cost: 2 R I O FLOPs forward, twice that backward.
    """
    case = _grouped_case("grouped_linear", x_RI, weight_EOI, ends_E, impl)
    out: Tensor = GROUPED_LINEAR.choose(case, impl)(x_RI, weight_EOI, ends_E)
    return out


def grouped_swiglu(x_RI: Tensor, weight_EGI: Tensor, ends_E: Tensor, *, impl: str | None = None) -> Tensor:
    """`silu(gate) * up`, where gate and up are the halves of what `grouped_linear` gives; to the bit.

    Shapes: x [R, I], weight [E, 2F, I] with all gates first -> [R, F]; the rest as `grouped_linear`. Sums are
    rounded to the operands' dtype before SwiGLU, also where they are not written.
    Raises: ShapeError when operands disagree or 2F is odd; BackendError when `impl` cannot run.
    """
    case = _grouped_case("grouped_swiglu", x_RI, weight_EGI, ends_E, impl)
    inner, both = case.dims
    if both % 2:
        msg = f"grouped_swiglu: outputs are gates and ups, so they must be even, not {both}"
        raise ShapeError(msg)
    out: Tensor = GROUPED_SWIGLU.choose(case._replace(dims=(inner, both // 2)), impl)(
        x_RI, weight_EGI, ends_E
    )
    return out


def two_ops(x_RI: Tensor, weight_EGI: Tensor, ends_E: Tensor) -> Tensor:
    """See `grouped_swiglu`; the table is asked for each of the two."""
    return swiglu(grouped_linear(x_RI, weight_EGI, ends_E))


def _grouped_case(name: str, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, impl: str | None) -> Case:
    """The case of a product of experts whose operands fit."""
    if x_RI.shape[1] != weight_EOI.shape[2] or x_RI.dtype != weight_EOI.dtype:
        msg = (
            f"{name}: rows are {x_RI.shape[1]} wide in {x_RI.dtype} but weights expect "
            f"{weight_EOI.shape[2]} in {weight_EOI.dtype}"
        )
        raise ShapeError(msg)
    if ends_E.shape != weight_EOI.shape[:1] or ends_E.dtype != torch.int32:
        msg = (
            f"{name}: {weight_EOI.shape[0]} experts but ends has shape {tuple(ends_E.shape)} in "
            f"{ends_E.dtype}; expected int32, one end per expert"
        )
        raise ShapeError(msg)
    rows, experts = x_RI.shape[0], weight_EOI.shape[0]
    dozens = DOZENS_FROM * experts <= rows <= FEW_ROWS * experts
    return Case(
        device_type(x_RI),
        x_RI.dtype,
        (weight_EOI.shape[2], weight_EOI.shape[1]),
        grad=torch.is_grad_enabled() and (x_RI.requires_grad or weight_EOI.requires_grad),
        few=rows <= FEW_ROWS * experts,
        fastest=impl or ("gluon_dozens" if dozens else ""),
        layout="columns" if weight_EOI.stride(1) == 1 else "rows",
    )


def _check_route(
    logits_TE: Tensor, bias_E: Tensor | None, *, top_k: int, n_group: int, topk_group: int
) -> None:
    experts = logits_TE.shape[-1]
    if logits_TE.dtype not in (torch.float32, torch.float64):
        msg = f"route: logits are {logits_TE.dtype}; the gate works in float32, so compute x W^T in float32"
        raise ShapeError(msg)
    if bias_E is not None and bias_E.shape != (experts,):
        msg = f"route: {experts} experts but a bias of shape {tuple(bias_E.shape)}"
        raise ShapeError(msg)
    if experts % n_group or topk_group > n_group:
        msg = f"route: {experts} experts, n_group={n_group}, topk_group={topk_group} do not fit"
        raise ShapeError(msg)
    if top_k > experts // n_group * topk_group:
        reachable = experts // n_group * topk_group
        msg = f"route: top_k={top_k} exceeds the {reachable} experts of {topk_group} groups"
        raise ShapeError(msg)
